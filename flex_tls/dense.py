"""Full attention over the cache: prefill, long chunks, short contexts, and the layers that stay dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import fold_groups, unfold_groups
from .mods import query_positions

# Elements of a boolean mask that one call may make: 64 MiB. Longer chunks of queries are cut
MASK_ELEMENTS = 2**26


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Attention of left-aligned prompts to themselves. q [B, HQ, T, D], k and v [B, HKV, T, D] -> [B, HQ, T, D].

    A row's padding lies behind its tokens, where causality hides it: no mask is made. With ``window`` a query sees
    itself and the ``window - 1`` tokens before it.
    """
    t = q.shape[2]
    if window is not None and window < t:
        lens = torch.full((q.shape[0],), t, dtype=torch.int64, device=q.device)
        return dense_attention(q, k, v, lens, scale=scale, window=window)
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and q.dtype == torch.float32:
        # No CUDA kernel takes float32 and groups (torch 2.11): all scores would be written, 44 GB for 24 x 7k tokens
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    same_length: bool = False,
) -> Tensor:
    """Attention of each row's last T tokens to all of the row. q [B, HQ, T, D], k and v [B, HKV, S, D].

    Args:
        q: queries, right aligned: query t of row b sits at position ``seq_lens[b] - T + t``.
        k: keys, left aligned; slots from ``seq_lens[b]`` on are not seen, and must be finite.
        v: values, as ``k``.
        seq_lens: int64 [B].
        scale: of the scores.
        window: sliding window, as in :func:`causal_attention`.
        same_length: every row holds exactly S tokens, so that one query token needs no mask.

    Returns:
        [B, HQ, T, D]. A query before its row's start (padding) gets finite numbers without a meaning.
    """
    group, hkv = q.shape[1] // k.shape[1], k.shape[1]
    b, t, s = q.shape[0], q.shape[2], k.shape[2]
    if t == 1 and same_length and (window is None or window >= s):
        # Folded, so that no backend has to repeat the keys for the heads of a group
        return unfold_groups(F.scaled_dot_product_attention(fold_groups(q, hkv), k, v, scale=scale), group)
    rows = max(1, MASK_ELEMENTS // (b * group * s))
    # A padding query would see nothing; softmax over nothing is NaN on some devices
    positions = query_positions(seq_lens, t).clamp_min(0)
    slot = torch.arange(s, device=q.device)
    parts = []
    for chunk, position in zip(q.split(rows, dim=2), positions.split(rows, dim=1), strict=True):  # type: ignore[no-untyped-call,unused-ignore]
        mask = slot <= position[..., None]
        if window is not None:
            mask &= slot > position[..., None] - window
        mask = mask[:, None].repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(fold_groups(chunk, hkv), k, v, attn_mask=mask, scale=scale)
        parts.append(unfold_groups(out, group))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
