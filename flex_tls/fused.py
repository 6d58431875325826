"""The ``triton`` backend: two-level decoding in one launch, as one custom op that ``torch.compile`` traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compiled import compiled
from .config import TLSConfig
from .device import DTYPES, is_interpreted, why_not_here
from .index import MAX_QUERY_TOKENS, KVIndex
from .mods import MaskMod, apply_mods, query_positions
from .selection import BlockSelection, TokenSelection, pack_words
from .summaries import MinMaxSummary

if TYPE_CHECKING:
    from .kernels.tiles import Tiles

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, *, has_score_mod: bool, scale: float) -> str | None:
    """What keeps a call from the fused kernels; None if nothing does."""
    if has_score_mod:
        return "it takes no score_mod"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, got {q.dtype}"
    if q.shape[2] > MAX_QUERY_TOKENS:
        return f"it takes up to {MAX_QUERY_TOKENS} query tokens, got {q.shape[2]}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return f"it reads keys and values along a contiguous head dimension, got strides {k.stride()} and {v.stride()}"
    if scale <= 0:
        return f"it takes a positive scale, got {scale}"
    obstacle = why_not_here(q.device)
    if obstacle is None and q.dtype == torch.bfloat16 and is_interpreted():
        return "triton's interpreter multiplies bfloat16 as integers (3.7)"
    return obstacle


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, scale: float, seq_lens: Tensor | None = None,
    mask_mod: MaskMod | None = None,
) -> Parts:  # fmt: skip
    """(out [B, HQ, T, D], lse float32 [B, HQ, T], block ids [R, K], counts [R], token ids [R, M], counts [R]).

    ``seq_lens`` int64 [B] in place of the index's own, for a step that counts for all layers at once.
    """
    seq_lens = index.seq_lens if seq_lens is None else seq_lens
    parts: Parts = fused_attention(
        q, k, v, seq_lens, *labels_of(index), token_budget=cfg.token_budget, **options_of(index, cfg, scale),
        **summary_of(index), visible=None if mask_mod is None else visible_to(q, index, seq_lens, mask_mod),
    )  # fmt: skip
    return parts


def labels_of(index: KVIndex) -> tuple[Tensor, ...]:
    """What all ops take of an index."""
    labels = index.labels
    return labels.codes, labels.to_query, labels.low, labels.step, index.arrivals


def options_of(index: KVIndex, cfg: TLSConfig, scale: float) -> dict[str, Any]:
    """What all ops take of labels and configuration."""
    n_dims = index.labels.to_query.shape[-1]
    # Elsewhere level 1 reads none of a label, or all of it
    filter_dims = cfg.filter_dims if cfg.index == "lowrank" else None
    return {
        "bits": index.labels.words or (), "block_size": cfg.block_size, "kept_blocks": cfg.kept_blocks,
        "sinks": cfg.sink_tokens, "recent": cfg.recent_tokens, "scale": scale,
        "filter_dims": min(filter_dims or n_dims, n_dims), "block_reduce": cfg.block_reduce,
        "group_reduce": cfg.group_reduce,
    }  # fmt: skip


def summary_of(index: KVIndex) -> dict[str, Any]:
    """By what level 1 scores blocks, for the op that takes every kind of index."""
    if index.summary is None:
        return {"kind": index.cfg.index}
    tensors = index.summary.tensors
    if isinstance(index.summary, MinMaxSummary):
        return {
            "kind": "box", "summary": tensors["low"], "beside": tensors["high"], "radius": index.summary.radius
        }  # fmt: skip
    return {"kind": "mean", "summary": tensors["total"], "beside": tensors["count"]}


def visible_to(q: Tensor, index: KVIndex, seq_lens: Tensor, mask_mod: MaskMod) -> Tensor:
    """What each head of q [B, HQ, T, D] sees, causality included: int32 [B, HQ, T, W], a bit for every slot.

    The mod is compiled and evaluated anew in every call; inside a caller's own ``torch.compile`` it is traced.
    """
    slots = (index.n_blocks * index.cfg.block_size, index.capacity_tokens)
    sizes = (index.n_kv_heads, q.shape[1] // index.n_kv_heads, q.shape[2], *slots)
    run = _visible
    # On a CPU the kernels are interpreted, and this is the least of it
    if q.is_cuda and not torch.compiler.is_compiling():
        run = compiled(_visible, (seq_lens,), sizes, None, mask_mod)
    with torch.no_grad():
        return run(seq_lens, *sizes, mask_mod)


def _visible(seq_lens: Tensor, hkv: int, group: int, t: int, n_slots: int, capacity: int, mask_mod: MaskMod) -> Tensor:
    scores = torch.zeros(seq_lens.shape[0], hkv, group, t, n_slots, device=seq_lens.device)
    seen = apply_mods(scores, query_positions(seq_lens, t), capacity, None, mask_mod).isfinite()
    return pack_words(seen).flatten(1, 2)


def tiles_of(q: Tensor, codes: Tensor, kept_tokens: int) -> Tiles:
    """Settings of a launch, and of the op that only says what the launch returns: those must be the same."""
    from .kernels.tile_table import tiles_for

    (b, hq, t, d), hkv = q.shape, codes.shape[1]
    return tiles_for(
        q.device, head_bytes=d * q.element_size(), group=hq // hkv, rows=b * hkv * t, kept_tokens=kept_tokens
    )


def launch(
    q: Tensor, k: Tensor | None, v: Tensor | None, seq_lens: Tensor, codes: Tensor, *labels: Tensor, block_size: int,
    kept_blocks: int, given: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """The kernel with its settings, on the tensors' device."""
    from .kernels.two_level import launch_two_level

    q = q if q.stride(-1) == 1 else q.contiguous()
    kept = min(kept_blocks, codes.shape[3] // block_size) if given is None else given.blocks.shape[1]
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call,unused-ignore]
        return launch_two_level(
            q, k, v, seq_lens, codes, *labels, block_size=block_size, kept_blocks=kept_blocks, given=given,
            tiles=tiles_of(q, codes, kept * block_size), **options,
        )  # fmt: skip


@torch.library.custom_op("flex_tls::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, bits: list[int], block_size: int, kept_blocks: int, token_budget: int | None, sinks: int,
    recent: int, scale: float, filter_dims: int, block_reduce: str, group_reduce: str, kind: str = "lowrank",
    summary: Tensor | None = None, beside: Tensor | None = None, radius: float = 1.0, visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Level 1, level 2 and attention. ``arrivals`` int32 [3, R] is all zeros before and after."""
    out, lse, work = launch(
        q, k, v, seq_lens, codes, to_query, low, step, arrivals, bits=tuple(bits), block_size=block_size,
        kept_blocks=kept_blocks, token_budget=token_budget, sinks=sinks, recent=recent, scale=scale,
        filter_dims=filter_dims, block_reduce=block_reduce, group_reduce=group_reduce, kind=kind, summary=summary,
        beside=beside, radius=radius, visible=visible,
    )  # fmt: skip
    return out, lse, work.blocks, work.block_counts, work.ids, work.counts


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, bits: list[int], block_size: int, kept_blocks: int, token_budget: int | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, n_blocks = q.shape[0] * codes.shape[1] * q.shape[2], codes.shape[-1] // block_size
    kept = min(kept_blocks, n_blocks)
    by_block = token_budget is None or token_budget >= kept * block_size
    counts = arrivals.new_empty(rows)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32),
        arrivals.new_empty(rows, kept), counts, arrivals.new_empty(rows, 0 if by_block else token_budget or 0),
        torch.empty_like(counts),
    )  # fmt: skip


def selections(parts: Parts, q: Tensor, index: KVIndex, cfg: TLSConfig) -> tuple[BlockSelection, TokenSelection]:
    """What the fused kernels chose, in the form that the other backends give."""
    _, _, ids, counts, tokens, _ = parts
    b, hkv, t = index.batch_size, index.n_kv_heads, q.shape[2]
    group = q.shape[1] // hkv
    blocks = BlockSelection(
        ids.view(b, hkv, t, -1), counts.view(b, hkv, t), index.n_blocks, cfg.block_size, group, index.capacity_tokens
    )
    positions = query_positions(index.seq_lens, t)
    n_slots = index.n_blocks * cfg.block_size
    if tokens.shape[1]:
        mask = torch.zeros(b, hkv, t, n_slots + 1, dtype=torch.bool, device=q.device)
        mask = mask.scatter(3, tokens.view(b, hkv, t, -1).long(), True)[..., :-1]
    else:
        mask = blocks.kept().repeat_interleave(cfg.block_size, -1)
        mask = mask & (torch.arange(n_slots, device=q.device) <= positions[:, None, :, None])
    return blocks, TokenSelection.from_mask(mask, positions, group)
