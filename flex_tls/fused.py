"""The ``triton`` backend: two-level decoding in four launches, as one custom op that ``torch.compile`` traces."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from .config import TLSConfig
from .index import MAX_QUERY_TOKENS, KVIndex
from .mods import query_positions
from .selection import BlockSelection, TokenSelection

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

INSTALLED = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_here(device: torch.device) -> str | None:
    """What keeps the fused kernels from ``device``; None if nothing does."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if device.type != "cuda" and not _interpreted():
        return f"its kernels need a CUDA device, got {device}"
    return None


def why_not_fused(q: Tensor, k: Tensor, v: Tensor, cfg: TLSConfig, *, has_mods: bool, scale: float) -> str | None:
    """What keeps a call from the fused kernels; None if nothing does."""
    if has_mods:
        return "it takes no score_mod and no mask_mod"
    if cfg.index != "lowrank":
        return f"it scores token labels, index='lowrank', got index={cfg.index!r}"
    if cfg.group_reduce == "softmax_max":
        return "its kernels have no group_reduce='softmax_max'"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, got {q.dtype}"
    if q.shape[2] > MAX_QUERY_TOKENS:
        return f"it takes up to {MAX_QUERY_TOKENS} query tokens, got {q.shape[2]}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return f"it reads keys and values along a contiguous head dimension, got strides {k.stride()} and {v.stride()}"
    if scale <= 0:
        return f"it takes a positive scale, got {scale}"
    obstacle = why_not_here(q.device)
    if obstacle is None and q.dtype == torch.bfloat16 and _interpreted():
        return "triton's interpreter multiplies bfloat16 as integers (3.7)"
    return obstacle


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, slowly, for tests; it says so itself."""
    from .kernels.tiles import NATIVE

    return not NATIVE


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, scale: float, seq_lens: Tensor | None = None
) -> Parts:
    """(out [B, HQ, T, D], lse float32 [B, HQ, T], block ids [R, K], counts [R], token ids [R, M], counts [R]).

    ``seq_lens`` int64 [B] in place of the index's own, for a step that counts for all layers at once.
    """
    labels = index.labels
    assert labels.bits is not None
    n_dims = labels.to_query.shape[-1]
    seq_lens = index.seq_lens if seq_lens is None else seq_lens
    parts: Parts = fused_attention(
        q, k, v, seq_lens, labels.codes, labels.to_query, labels.low, labels.step, index.arrivals,
        bits=labels.bits, block_size=cfg.block_size, kept_blocks=cfg.kept_blocks, token_budget=cfg.token_budget,
        sinks=cfg.sink_tokens, recent=cfg.recent_tokens, scale=scale,
        filter_dims=min(cfg.filter_dims or n_dims, n_dims),
        block_reduce=cfg.block_reduce, group_reduce=cfg.group_reduce,
    )  # fmt: skip
    return parts


@torch.library.custom_op("flex_tls::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, bits: int, block_size: int, kept_blocks: int, token_budget: int | None, sinks: int, recent: int,
    scale: float, filter_dims: int, block_reduce: str, group_reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Level 1, level 2 and attention. ``arrivals`` int32 [3, R] is all zeros before and after."""
    from .kernels.ask import launch_ask
    from .kernels.attend import launch_attend
    from .kernels.filter_blocks import launch_filter_blocks
    from .kernels.select_tokens import launch_select_tokens
    from .kernels.tiles import tiles_for

    q = q if q.stride(-1) == 1 else q.contiguous()
    n_slots = codes.shape[-1]
    candidates = min(kept_blocks * block_size, n_slots)
    by_block = token_budget is None or token_budget >= candidates
    selected = candidates if by_block else int(token_budget or 0)
    rows = q.shape[0] * codes.shape[1] * q.shape[2]
    tiles = tiles_for(
        q.device, head_dim=q.shape[3], group=q.shape[1] // codes.shape[1], rows=rows, n_slots=n_slots,
        block_size=block_size, selected=selected,
    )  # fmt: skip
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call,unused-ignore]
        asked, base, unit = launch_ask(
            q, to_query, low, step, bits=bits, n_words=codes.shape[2], filter_dims=filter_dims
        )  # fmt: skip
        blocks, block_counts = launch_filter_blocks(
            codes, seq_lens, asked, base, unit, arrivals[0], n_query_tokens=q.shape[2], bits=bits,
            block_size=block_size, kept=kept_blocks, sinks=sinks, recent=recent, scale=scale,
            filter_dims=filter_dims, block_reduce=block_reduce, group_reduce=group_reduce, tiles=tiles,
        )  # fmt: skip
        if by_block:
            ids, counts = blocks.new_empty(rows, 0), torch.empty_like(block_counts)
        else:
            ids, counts = launch_select_tokens(
                codes, seq_lens, asked, base, unit, blocks, block_counts, arrivals[1], n_query_tokens=q.shape[2],
                bits=bits, block_size=block_size, kept=selected, sinks=sinks, recent=recent, scale=scale,
                group_reduce=group_reduce, tiles=tiles,
            )  # fmt: skip
        out, lse = launch_attend(
            q, k, v, seq_lens, blocks if by_block else ids, block_counts if by_block else counts, arrivals[2],
            by_block=by_block, block_size=block_size, scale=scale, tiles=tiles,
        )  # fmt: skip
        return out, lse, blocks, block_counts, ids, counts


@fused_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, bits: int, block_size: int, kept_blocks: int, token_budget: int | None, sinks: int, recent: int,
    scale: float, filter_dims: int, block_reduce: str, group_reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
