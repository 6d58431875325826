"""Attention over gathered tokens, split over the selection and merged by log-sum-exp, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .follow import follow
from .rows import locate
from .tiles import NATIVE, Tiles, padded


@triton.jit
def attend(
    q, k, v, seq_lens, ids, counts, partial, partial_lse, arrivals, out, lse,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    n_heads, T, K, per_split, scale,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BY_BLOCK: tl.constexpr, ALL: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    SP: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) attends to entries ``i * per_split`` and on of the row's list; the last program merges.

    ``ids`` holds tokens [K], or with BY_BLOCK blocks [K] of which every token up to the query's position counts; with
    ALL it is not read, and every token up to the query's position counts.
    """
    follow(NATIVE)
    row, head, position = locate(seq_lens, n_heads, T)
    split = tl.program_id(0)
    b, h, t = head // n_heads, head % n_heads, row % T
    ids += row * K
    if ALL:
        n = position + 1
    else:
        n = tl.load(counts + row)
        if BY_BLOCK:
            n *= BLOCK_SIZE
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    lane = tl.arange(0, TILE)
    inside = (g < GROUP)[:, None] & (d < D)[None]
    query = tl.load(q + b * q_stride_b + (h * GROUP + g)[:, None] * q_stride_h + t * q_stride_t + d[None], inside,
                    other=0.0)  # fmt: skip
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    # Base-2 exponents: one multiplication less for each weight
    log2e: tl.constexpr = 1.4426950408889634
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    end = tl.minimum(n, (split + 1) * per_split)
    for start in range(split * per_split, end, TILE):
        place = start + lane
        if ALL:
            slot = place
        elif BY_BLOCK:
            slot = tl.load(ids + place // BLOCK_SIZE, place < end, other=0) * BLOCK_SIZE + place % BLOCK_SIZE
        else:
            slot = tl.load(ids + place, place < end, other=0)
        seen = (place < end) & (slot <= position)
        slot = slot.to(tl.int64)
        keys = tl.load(k + slot[:, None] * k_stride_s + d[None], seen[:, None] & (d < D)[None], other=0.0)
        values = tl.load(v + slot[:, None] * v_stride_s + d[None], seen[:, None] & (d < D)[None], other=0.0)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * log2e)
        score = tl.where(seen[None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    out += (b * n_heads + h) * GROUP * T * D
    lse += (b * n_heads + h) * GROUP * T
    if SPLITS == 1:
        _finish(acc, top, total, out, lse, g, d, t, T, inside, D, GROUP)
    else:
        entry = (row * SPLITS + split) * GROUP
        tl.store(partial + (entry + g)[:, None] * D + d[None], acc / tl.maximum(total, 1e-37)[:, None], inside)
        tl.store(partial_lse + entry + g, _lse(top, total), g < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals + row, 0)
            _merge(partial + row * SPLITS * GROUP * D, partial_lse + row * SPLITS * GROUP, out, lse, t, T,
                   D, DP, GROUP, GP, SPLITS, SP)  # fmt: skip


@triton.jit
def _lse(top, total):
    """Base-2 log-sum-exp; -inf where nothing was seen."""
    return tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-37)), float("-inf"))


@triton.jit
def _merge(partial, partial_lse, out, lse, t, T,
           D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr,
           SP: tl.constexpr):  # fmt: skip
    """Sum of the splits' outputs, each by its share of the total weight."""
    s = tl.arange(0, SP)[:, None]
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    inside = (g < GROUP)[:, None] & (d < D)[None]
    weight = tl.load(partial_lse + s * GROUP + g[None], (s < SPLITS) & (g < GROUP)[None], other=float("-inf"),
                     cache_modifier=".cg")  # fmt: skip
    top = tl.max(weight, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(weight - shift[None]), 0)
    result = tl.zeros((GP, DP), tl.float32)
    for i in tl.static_range(SPLITS):
        entry = (i * GROUP + g)[:, None]
        part = tl.load(partial + entry * D + d[None], inside, other=0.0, cache_modifier=".cg")
        # In the shape of the part: a layout of its own would have to be converted, split by split
        one = tl.load(partial_lse + entry + (d * 0)[None], inside, other=float("-inf"), cache_modifier=".cg")
        result += part * tl.exp2(one - shift[:, None])
    _finish(result, shift, total, out, lse, g, d, t, T, inside, D, GROUP)


@triton.jit
def _finish(acc, top, total, out, lse, g, d, t, T, inside, D: tl.constexpr, GROUP: tl.constexpr):
    """Write one query token's heads: ``acc`` over its ``total`` weight, and the natural log-sum-exp."""
    result = acc / tl.maximum(total, 1e-37)[:, None]
    tl.store(out + (g * T + t)[:, None] * D + d[None], result.to(out.dtype.element_ty), inside)
    tl.store(lse + g * T + t, _lse(top, total) * 0.6931471805599453, g < GROUP)


def launch_attend(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, ids: Tensor | None, counts: Tensor | None, arrivals: Tensor,
    *, by_block: bool, block_size: int, scale: float, tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, HQ, T, D] in q's dtype and lse float32 [B, HQ, T] over tokens or blocks ``ids`` int32 [R, K].

    Without ``ids`` over every token up to the query's position.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    rows, group = b * hkv * t, hq // hkv
    entries = k.shape[2] if ids is None else ids.shape[1]
    most = entries * block_size if by_block else entries
    tile = tiles.attend_tile
    per_split = -(-most // (tiles.attend_splits * tile)) * tile
    splits = -(-most // per_split)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(b, hq, t, device=q.device)
    partial = lse.new_empty(rows, splits, group, d) if splits > 1 else lse
    partial_lse = lse.new_empty(rows, splits, group) if splits > 1 else lse
    attend[(splits, rows)](
        q, k, v, seq_lens, arrivals if ids is None else ids, arrivals if counts is None else counts,
        partial, partial_lse, arrivals, out, lse,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), hkv, t, entries, per_split, scale,
        D=d, DP=padded(d, 16), GROUP=group, GP=padded(group), ROWS=padded(group, 16), BLOCK_SIZE=block_size,
        BY_BLOCK=by_block, ALL=ids is None, TILE=tile, SPLITS=splits, SP=padded(splits),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", NATIVE=NATIVE, num_warps=tiles.attend_warps,
        num_stages=tiles.attend_stages, launch_pdl=NATIVE,
    )  # fmt: skip
    return out, lse
