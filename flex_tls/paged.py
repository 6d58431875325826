"""Two-level attention over a pool of block slots, in two halves: between them somebody brings blocks into the pool.

:func:`score` is level 1; :func:`attend_pages` is level 2 and attention, over the blocks that are there. With all
selected blocks there both together are :func:`flex_tls.two_level_attention`.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .attention import Attended, Backend, resolve_backend
from .compiled import compiled
from .config import TLSConfig
from .flex import kernel_options
from .index import KVIndex
from .masks import block_mask, fold_groups, token_score_mod, unfold_groups
from .mods import MaskMod, ScoreMod
from .pages import Pages
from .reference import attention_reference
from .selection import (
    BlockSelection,
    TokenSelection,
    block_scores,
    keep_blocks,
    label_block_scores,
    level_scores,
    tokens_from_scores,
)

WHY_NOT_PAGED = "outside of tls.generate's compiled step its kernels read no pool of block slots"
PagedBackend = Literal["reference", "flex"]


class Scored(NamedTuple):
    """Level 1 of one chunk of queries.

    Attributes:
        tokens: label scores for level 2, float32 [B, HKV, G, T, N * BLOCK].
        labels: label scores of blocks, float32 [B, HKV, G, T, N], over which level 2 compares heads.
        blocks: what level 1 ranked, float32 [B, HKV, G * T, N].
        chosen: the blocks that it keeps.
    """

    tokens: Tensor
    labels: Tensor
    blocks: Tensor
    chosen: BlockSelection


def paged_backend(backend: Backend, device: torch.device) -> PagedBackend:
    """The backend that reads a pool on ``device``.

    Raises:
        BackendUnavailable: ``"triton"`` was asked for, whose kernels read whole caches.
    """
    chosen = resolve_backend(backend, device, WHY_NOT_PAGED)
    return cast(PagedBackend, chosen)


def earlier(index: KVIndex, n_tokens: int) -> KVIndex:
    """The same index as it was ``n_tokens`` tokens ago, for queries that are not the last; shares every buffer."""
    if not n_tokens:
        return index
    view = copy.copy(index)
    view.seq_lens = index.seq_lens - n_tokens
    return view


def score(
    q: Tensor, index: KVIndex, cfg: TLSConfig, backend: PagedBackend, mask_mod: MaskMod | None, scale: float,
    score_mod: ScoreMod | None = None,
) -> Scored:  # fmt: skip
    """Level 1 for q [B, HQ, T, D], the last T tokens of each row of ``index``."""
    if backend == "reference" or torch.compiler.is_compiling():
        return _score(q, index, cfg, score_mod, mask_mod, scale)
    run = compiled(_score, (q, index.labels.codes), (cfg, index.cfg, scale), score_mod, mask_mod)
    with torch.no_grad():
        result: Scored = run(q, index, cfg, score_mod, mask_mod, scale)
    return result


def attend_pages(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, scored: Scored, kept: BlockSelection, index: KVIndex,
    cfg: TLSConfig, backend: PagedBackend, mask_mod: MaskMod | None, scale: float, score_mod: ScoreMod | None = None,
) -> Attended:  # fmt: skip
    """Level 2 inside the blocks ``kept``, and attention to its choice.

    Args:
        q: [B, HQ, T, D], as in :func:`score`.
        k, v: the pool's, [B, HKV, P * BLOCK, D]; slots of kept blocks must be finite, others are not read.
        pages: where blocks sit.
        scored: of :func:`score`.
        kept: blocks to look at, each of them in the pool.
        index, cfg, backend, mask_mod, scale, score_mod: as in :func:`score`.

    Returns:
        Output, log-sum-exp (reference alone), and the selections that were used.
    """
    if backend == "reference":
        tokens = tokens_from_scores(index, cfg, kept, scored.tokens, scored.labels)
        keys, values = (pages.gathered(x)[:, :, : index.capacity_tokens] for x in (k, v))
        out, lse = attention_reference(q, keys, values, tokens, scale=scale, score_mod=score_mod, mask_mod=mask_mod)
        return Attended(out, lse.float(), kept, tokens)
    arguments = (q, k, v, pages, scored.tokens, scored.labels, kept, index, cfg, score_mod, mask_mod, scale)
    if torch.compiler.is_compiling():
        return Attended(*_attend(*arguments)[:4])
    layouts = (q, k, v, *pages[:2], scored.tokens, kept.indices)
    run = compiled(_attend, layouts, (cfg, index.cfg, index.capacity_tokens, scale), score_mod, mask_mod)
    with torch.no_grad():
        return Attended(*run(*arguments)[:4])


def _score(
    q: Tensor, index: KVIndex, cfg: TLSConfig, score_mod: ScoreMod | None, mask_mod: MaskMod | None, scale: float
) -> Scored:
    tokens, few = level_scores(q, index, cfg, score_mod, mask_mod, scale)
    blocks = block_scores(q, index, cfg, few, mask_mod, scale)
    return Scored(tokens, label_block_scores(few, cfg), blocks.flatten(2, 3), keep_blocks(blocks, index, cfg))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, scores: Tensor, labels: Tensor, kept: BlockSelection, index: KVIndex,
    cfg: TLSConfig, score_mod: ScoreMod | None, mask_mod: MaskMod | None, scale: float,
) -> tuple[Tensor, None, BlockSelection, TokenSelection, TokenSelection]:  # fmt: skip
    tokens = tokens_from_scores(index, cfg, kept, scores, labels)
    placed = pages.place_tokens(tokens)
    folded = fold_groups(q, k.shape[1])
    out = flex_attention(  # type: ignore[call-overload]
        folded, k, v,
        score_mod=token_score_mod(placed, score_mod, mask_mod, pages),
        block_mask=block_mask(pages.place_blocks(kept)),
        scale=scale,
        kernel_options=kernel_options(q.device, folded.shape[2], k.shape[0] * k.shape[1]),
    )  # fmt: skip
    # What the mod captures is an output, for torch's C++ template (docs/design.md, section 4)
    return unfold_groups(out, kept.group), None, kept, tokens, placed
