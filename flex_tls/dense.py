"""Full attention over the cache: prefill, long chunks, short contexts, and the layers that stay dense."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

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


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], *, scale: float) -> Tensor:
    """As :func:`dense_attention` without a window, for long chunks of queries over a past: no mask is made.

    A row's past, which all of its queries see, and the chunk itself, causal, are two calls of the fused kernel that
    torch prefers for the shapes, merged by log-sum-exp. Rows of unequal lengths are taken one by one. Where torch has
    no fused kernel with a log-sum-exp (float32 on CUDA) this is :func:`dense_attention`.

    Args:
        q: queries [B, HQ, T, D], right aligned, as there.
        k: keys [B, HKV, S, D]; slots from ``lens[b]`` on are not read.
        v: values, as ``k``.
        lens: tokens of each row, the chunk's own included, on the host.
        scale: of the scores.

    Returns:
        [B, HQ, T, D]; 0 for a query before its row's start (padding).
    """
    if len(set(lens)) > 1:
        rows = zip(q.split(1), k.split(1), v.split(1), lens, strict=True)  # type: ignore[no-untyped-call,unused-ignore]
        return torch.cat([chunk_attention(*row[:3], row[3:], scale=scale) for row in rows])
    n, t = lens[0], q.shape[2]
    if n < t:
        out = q.new_zeros(q.shape)
        if n:
            out[:, :, t - n :] = chunk_attention(q[:, :, t - n :], k, v, lens, scale=scale)
        return out
    past, (k, v) = n - t, (x[:, :, :n] for x in (k, v))
    own = with_lse(q, k[:, :, past:], v[:, :, past:], scale, causal=True)
    if own is None:
        return dense_attention(q, k, v, torch.full((q.shape[0],), n, device=q.device), scale=scale)
    if past == 0:
        return own[0]
    before = with_lse(q, k[:, :, :past], v[:, :, :past], scale, causal=False)
    assert before is not None
    # The past's share of each query's softmax
    share = torch.sigmoid(before[1] - own[1])[..., None]
    return torch.lerp(own[0].float(), before[0].float(), share).to(q.dtype)


def with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp float32 [B, HQ, T] by the fused kernel that torch prefers; None if it gives no such."""
    gqa = q.shape[1] != k.shape[1]
    best = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=gqa)
    aten = torch.ops.aten
    if best == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    elif best != SDPBackend.FLASH_ATTENTION.value or (q.is_cuda and q.shape[3] % 8):
        return None
    elif q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse.reshape(q.shape[:3])
