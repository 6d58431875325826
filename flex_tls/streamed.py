"""Dense attention of a prompt's chunk to itself and to a past that comes in pieces, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .dense import with_lse
from .masks import fold_groups, unfold_groups

# (row, tokens) -> the row's first tokens as pieces (k, v), each [HKV, S', D], on the queries' device
Past = Callable[[int, int], Iterable[tuple[Tensor, Tensor]]]


def streamed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], counts: Sequence[int], past: Past, *, scale: float
) -> Tensor:
    """Causal attention of each row's new tokens to all of the row, with memory for one piece of the past.

    Args:
        q: [B, HQ, T, D], left aligned as ``k``.
        k, v: the new tokens' keys and values, [B, HKV, T, D], left aligned.
        starts: tokens that each row held before.
        counts: new tokens of each row.
        past: reads what the row held before.
        scale: of the scores.

    Returns:
        [B, HQ, T, D]; zeros where a row has no token.
    """
    result = torch.zeros_like(q)
    hkv, group = k.shape[1], q.shape[1] // k.shape[1]
    for row, (start, n) in enumerate(zip(starts, counts, strict=True)):
        if n == 0:
            continue
        queries = q[row : row + 1, :, :n]
        own = (x[row : row + 1, :, :n].repeat_interleave(group, 1) for x in (k, v))
        out, lse = attention_with_lse(queries, *own, scale=scale, causal=True)
        # The whole past is seen by every query: heads of a group fold into rows, and keys need no repeating
        folded = fold_groups(queries, hkv)
        out, lse = fold_groups(out.float(), hkv), lse.reshape(1, hkv, group * n)
        for keys, values in past(row, start):
            more = attention_with_lse(folded, keys[None], values[None], scale=scale, causal=False)
            out, lse = merge(out, lse, *more)
        result[row, :, :n] = unfold_groups(out, group)[0].to(q.dtype)
    return result


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of q [B, H, T, D] to k and v [B, H, S, D], and the log-sum-exp of its scores, float32 [B, H, T].

    By the fused kernel that torch prefers, where it gives a log-sum-exp.
    """
    found = with_lse(q, k, v, scale, causal=causal)
    if found is not None:
        return found
    if not q.is_cuda:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ v.to(wide)).to(q.dtype), lse
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    # Its rows are padded to a multiple of 32
    return efficient[0], efficient[1][..., : q.shape[2]]


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from its results over each; out [..., T, D], lse [..., T], wide."""
    both = torch.logaddexp(lse, more_lse)
    # A query that saw nothing yet has no weight in either
    shift = torch.where(both.isneginf(), 0.0, both)
    out = out * (lse - shift).exp()[..., None] + more.to(out.dtype) * (more_lse - shift).exp()[..., None]
    return out, both
