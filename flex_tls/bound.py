"""How much attention a step may have missed at most, from the blocks' bounding boxes alone.

A box holds, per channel, the smallest and the largest key of its block, so that no key in it scores higher than
``sum_c max(q_c low_c, q_c high_c)`` (Quest, arXiv 2406.10774). With n_b tokens of block b left out, the weight left out
is at most ``sum_b n_b exp(bound_b)``, next to the ``exp(lse)`` that was attended to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .index import KVIndex
from .mods import MaskMod, apply_mods
from .selection import TokenSelection
from .summaries import MinMaxSummary


def missed_mass_bound(
    q: Tensor,
    index: KVIndex,
    tokens: TokenSelection,
    lse: Tensor,
    *,
    scale: float | None = None,
    mask_mod: MaskMod | None = None,
) -> Tensor:
    """Upper bound on the share of full attention's weight that lies outside of ``tokens``: float32 [B, HQ, T], 0 to 1.

    Args:
        q: queries [B, HQ, T, D].
        index: of kind "quest" or "box", which hold boxes ("box" damps them when it ranks; here they count in full).
        tokens: what was attended to.
        lse: [B, HQ, T], log-sum-exp of the attended scores, natural log.
        scale: of the scores, 1/sqrt(D) by default.
        mask_mod: what it hides is not missed.

    A query that may look nowhere misses nothing. There is no bound under a ``score_mod``, which may raise any score.

    Raises:
        ValueError: an index without boxes.
    """
    if not isinstance(index.summary, MinMaxSummary):
        raise ValueError(
            f"index: expected kind 'quest' or 'box', whose boxes bound scores, got {index.cfg.index!r}; build the "
            "index with one of them"
        )
    b, hq, t, d = q.shape
    hkv, n, size = index.n_kv_heads, index.n_blocks, index.cfg.block_size
    asked = q.float().reshape(b, hkv, hq // hkv * t, d)
    low, high = (index.summary.tensors[name][:, :, :-1].float().transpose(-1, -2) for name in ("low", "high"))
    filled = high >= low
    low, high = torch.where(filled, low, 0.0), torch.where(filled, high, 0.0)
    best = asked.clamp_min(0) @ high + asked.clamp_max(0) @ low
    # What float32 may have lost in 2 D products and their sum; the true bound is never above
    slack = 2 * d * torch.finfo(torch.float32).eps * (asked.abs() @ torch.maximum(low.abs(), high.abs()))
    best = (best + slack).view(b, hkv, hq // hkv, t, n) * (1 / math.sqrt(d) if scale is None else scale)
    seen = torch.zeros(b, hkv, hq // hkv, t, n * size, device=q.device)
    seen = apply_mods(seen, tokens.positions, index.capacity_tokens, None, mask_mod).isfinite()
    left_out = (seen & ~tokens.mask[:, :, None]).view(*seen.shape[:-1], n, size).sum(-1)
    missed = (best + left_out.log()).logsumexp(-1).reshape(b, hq, t)
    # -inf minus -inf is NaN, where nothing is missed and nothing attended to
    return torch.where(missed.isneginf(), 0.0, (missed - lse.float()).sigmoid())
