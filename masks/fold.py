"""Folding query heads into query rows, so that any group size takes FlexAttention's decode kernel.

Under ``enable_gqa`` a BlockMask that differs between KV heads silently gives wrong results (docs/design.md, section 4);
folded, query row r of KV head h is query head ``h * G + r // T``, token ``r % T``.
"""

from __future__ import annotations

from torch import Tensor


def fold_groups(q: Tensor, n_kv_heads: int) -> Tensor:
    """[B, HQ, T, D] -> [B, HKV, G * T, D]; a view where q is contiguous."""
    b, hq, t, d = q.shape
    if hq % n_kv_heads:
        raise ValueError(f"q: expected HQ to be a multiple of HKV = {n_kv_heads}, got {hq}")
    return q.reshape(b, n_kv_heads, hq // n_kv_heads * t, d)


def unfold_groups(x: Tensor, group: int) -> Tensor:
    """Undo :func:`fold_groups` for outputs [B, HKV, G * T, D] or log-sum-exps [B, HKV, G * T]."""
    b, hkv, rows = x.shape[:3]
    if rows % group:
        raise ValueError(f"x: expected rows (G * T) to be a multiple of G = {group}, got {rows}")
    return x.reshape(b, hkv * group, rows // group, *x.shape[3:])
