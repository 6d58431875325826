"""A user's ``score_mod`` and ``mask_mod``, in logical coordinates, evaluated on whole score tensors.

``flex_attention`` calls a mod per element inside its kernel; selection and the reference need the same numbers for
a tensor [B, HKV, G, T, S]. Indices are int64 tensors that broadcast against it: b row, h query head, q_idx query
position, kv_idx key position. A mod must therefore be element-wise, which is what ``flex_attention`` asks too, and
tensors that it captures must cover every slot (0 to S - 1) and head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Keys that are copied to float32 at once
PIECE_TOKENS = 16384


def query_positions(seq_lens: Tensor, n_query_tokens: int) -> Tensor:
    """Positions int64 [B, T] of a chunk that ends each row; negative where a row is shorter than the chunk."""
    return seq_lens[:, None] - n_query_tokens + torch.arange(n_query_tokens, device=seq_lens.device)


def apply_mods(
    scores: Tensor, positions: Tensor, n_slots: int, score_mod: ScoreMod | None, mask_mod: MaskMod | None
) -> Tensor:
    """Scaled scores [B, HKV, G, T, S'] after the mods, -inf where masked or not causal. positions int64 [B, T].

    S' may round ``n_slots`` up to whole blocks: mods never see a key position past ``n_slots - 1``.
    """
    b, hkv, group, _, s = scores.shape
    device = scores.device
    row = torch.arange(b, device=device).view(b, 1, 1, 1, 1)
    head = torch.arange(hkv * group, device=device).view(1, hkv, group, 1, 1)
    query = positions[:, None, None, :, None]
    key = torch.arange(s, device=device).view(1, 1, 1, 1, s)
    keep = key <= query
    # A row shorter than the chunk has negative positions: nothing is kept, but a mod may index with them
    query = query.clamp_min(0)
    key = key.clamp_max(n_slots - 1)
    if score_mod is not None:
        scores = score_mod(scores, row, head, query, key)
    if mask_mod is not None:
        keep = keep & mask_mod(row, head, query, key)
    return torch.where(keep, scores, -torch.inf)


def exact_scores(q: Tensor, k: Tensor, positions: Tensor, *, scale: float, mask_mod: MaskMod | None = None) -> Tensor:
    """Scores of full attention: float32 [B, HKV, G, T, S], -inf where masked or not causal.

    q [B, HQ, T, D], k [B, HKV, S, D], positions int64 [B, T].
    """
    b, hq, t, d = q.shape
    hkv, s = k.shape[1], k.shape[2]
    # A group's heads as rows of one product: broadcast, each of them would have a copy of the keys. And these in
    # float32 a piece at a time
    rows = q.float().reshape(b, hkv, hq // hkv * t, d) * scale
    pieces = (k[:, :, first : first + PIECE_TOKENS] for first in range(0, s, PIECE_TOKENS))
    scores = torch.cat([rows @ piece.float().transpose(-1, -2) for piece in pieces], -1)
    return apply_mods(scores.view(b, hkv, hq // hkv, t, s), positions, s, None, mask_mod)
