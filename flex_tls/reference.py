"""The oracle: two-level attention in plain PyTorch, eager, on any device. Slow, obvious, and exact.

Scores, softmax and sums are in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mods import MaskMod, ScoreMod, apply_mods
from .selection import TokenSelection


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: TokenSelection,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected tokens. q [B, HQ, T, D], k and v [B, HKV, S, D] -> out [B, HQ, T, D], lse [B, HQ, T].

    out has q's dtype; lse is natural-log, in the accumulation dtype. A query with nothing to see gets 0 and -inf.
    Keys and values that are not selected are never read: they may hold NaN.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = tokens.mask[..., : k.shape[2]]
    seen = mask.any(2)[..., None]
    k, v = (torch.where(seen, x, 0.0).to(wide) for x in (k, v))
    folded = q.to(wide).view(b, hkv, hq // hkv, t, d)
    scores = folded @ k[:, :, None].transpose(-1, -2) * scale
    scores = apply_mods(scores, tokens.positions, k.shape[2], score_mod, mask_mod)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isneginf(), 0.0, lse)[..., None]).exp()
    out = weights @ v[:, :, None]
    return out.reshape(b, hq, t, d).to(q.dtype), lse.reshape(b, hq, t)
