"""Attention over listed tokens, listed blocks, or everything, split over programs and merged by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .follow import follow
from .int8 import dequantised
from .rows import locate, query_of
from .scatter import scatter
from .tiles import NATIVE, Tiles, padded
from .tuples import extended
from .visible import is_visible

# Base-2 exponents: one multiplication less for each weight
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_query(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t,
               D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The heads of one query token, [ROWS, DP]."""
    g = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None]
    q = query_of(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, GROUP)
    return tl.load(q + g * q_stride_h + d, (g < GROUP) & (d < D), other=0.0)


@triton.jit
def attend_range(
    query, k, v, scales, ids, pages, arrived, now, visible, first, end, position, scale, k_stride_s, v_stride_s,
    page_stride_k, page_stride_v, visible_stride,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MODE: tl.constexpr, PAGED: tl.constexpr, WHICH: tl.constexpr, INT8: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc [ROWS, DP], top [ROWS], total [ROWS]) of entries ``first`` to ``end``, none past the query's position.

    An entry is a token of ``ids`` (MODE "tokens"), a token of the blocks in ``ids`` ("blocks"), or a slot ("all").
    PAGED: block n lies at page ``pages[n]`` of k and v, ``page_stride`` apart; WHICH "arrived" are tokens of pages
    whose ``arrived`` is ``now``, "resident" those of all others. With INT8 k and v are codes, exact in the query's
    dtype, and a token's two ``scales`` are multiplied to its score and to its weight. With MASKED a head attends to
    what ``visible`` [GROUP, visible_stride] says.
    """
    d = tl.arange(0, DP)
    lane = tl.arange(0, TILE)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    for start in tl.range(first, end, TILE, num_stages=STAGES):
        place = start + lane
        if MODE == "all":
            slot = place
        elif MODE == "blocks":
            slot = tl.load(ids + place // BLOCK_SIZE, place < end, other=0) * BLOCK_SIZE + place % BLOCK_SIZE
        else:
            slot = tl.load(ids + place, place < end, other=0)
        seen = (place < end) & (slot <= position)
        if MASKED:
            g = tl.arange(0, ROWS)[:, None]
            sees = is_visible(visible + g * visible_stride, slot[None], seen[None] & (g < GROUP))
        if PAGED:
            page = tl.load(pages + slot // BLOCK_SIZE, seen, other=0).to(tl.int64)
            if WHICH != "all":
                is_new = tl.load(arrived + page, seen, other=0) == now
                seen = seen & (is_new if WHICH == "arrived" else ~is_new)
            inside = slot % BLOCK_SIZE
            key_at, value_at = page * page_stride_k + inside * k_stride_s, page * page_stride_v + inside * v_stride_s
        else:
            slot = slot.to(tl.int64)
            key_at, value_at = slot * k_stride_s, slot * v_stride_s
        keys = tl.load(k + key_at[:, None] + d[None], seen[:, None] & (d < D)[None], other=0)
        values = tl.load(v + value_at[:, None] + d[None], seen[:, None] & (d < D)[None], other=0)
        if INT8:
            scale_at = (page * BLOCK_SIZE + inside) * 2
            key_scale = tl.load(scales + scale_at, seen, other=0.0)
            value_scale = tl.load(scales + scale_at + 1, seen, other=0.0)
            keys = keys.to(query.dtype)
            if query.dtype == tl.float16:
                # Its least numbers are too large for a weight of a small value's scale
                values = dequantised(values, value_scale[:, None], tl.float16)
            else:
                values = values.to(query.dtype)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        if INT8:
            score *= key_scale[None]
        score = tl.where(seen[None], score, float("-inf"))
        if MASKED:
            score = tl.where(sees, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weight, 1)
        if INT8 and query.dtype != tl.float16:
            weight *= value_scale[None]
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@triton.jit
def set_aside(acc, top, total, partial, partial_lse, entry, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
              ROWS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Part ``entry`` of a row's output and its log-sum-exp, for :func:`finish` to merge."""
    g = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None]
    at = entry * GROUP + g
    scatter(partial + at * D + d, acc / tl.maximum(total, 1e-37)[:, None], (g < GROUP) & (d < D), NATIVE)
    lse = tl.broadcast_to(_lse(top, total)[:, None], acc.shape)
    scatter(partial_lse + at + tl.zeros_like(d), lse, (g < GROUP) & (d == 0), NATIVE)


@triton.jit
def finish(acc, top, total, partial, partial_lse, arrival, out, lse, row, head, T,
           D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
           PROGRAMS: tl.constexpr, BEFORE: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Write the row's output: at once, or by the last of its programs. True in that program, and in a single one.

    BEFORE parts of the row are there already, set aside by an earlier launch.
    """
    PARTS: tl.constexpr = BEFORE + PROGRAMS
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    inside = (g < GROUP)[:, None] & (d < D)[None]
    out += head * GROUP * T * D
    lse += head * GROUP * T
    last = True
    if PARTS == 1:
        result = acc / tl.maximum(total, 1e-37)[:, None]
        tl.store(out + (g * T + row % T)[:, None] * D + d[None], result.to(out.dtype.element_ty), inside)
        tl.store(lse + g * T + row % T, _natural(_lse(top, total)), g < GROUP)
    else:
        partial += row * PARTS * GROUP * D
        partial_lse += row * PARTS * GROUP
        set_aside(acc, top, total, partial, partial_lse, BEFORE + tl.program_id(0), D, DP, GROUP, ROWS, NATIVE)
        tl.debug_barrier()
        if PROGRAMS > 1:
            last = tl.atomic_add(arrival, 1, sem="acq_rel") == PROGRAMS - 1
        if last:
            if PROGRAMS > 1:
                tl.store(arrival, 0)
            _merge(partial, partial_lse, out, lse, row % T, T, D, GROUP, PARTS, min(DP * GP, 512), min(PARTS, 16))
    return last


@triton.jit
def _lse(top, total):
    """Base-2 log-sum-exp; -inf where nothing was seen."""
    return tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-37)), float("-inf"))


@triton.jit
def _natural(lse):
    """From base 2 to base e."""
    return lse * 0.6931471805599453


@triton.jit
def _merge(partial, partial_lse, out, lse, t, T,
           D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
           AT_ONCE: tl.constexpr):  # fmt: skip
    """Sum of the parts, each by its share of the total weight; COLUMNS of the heads' channels at once.

    A thread has its channels of AT_ONCE parts at once, and needs nothing of other threads.
    """
    for start in tl.static_range(0, GROUP * D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        g = column // D
        there = column < GROUP * D
        top = tl.full((COLUMNS,), float("-inf"), tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        acc = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, PARTS, AT_ONCE):
            parts, lses = (), ()
            higher = top
            for i in tl.static_range(AT_ONCE):
                # A vector: the interpreter has no conjunction of a number's truth with a vector's
                p = tl.zeros_like(column) + (first + i)
                mine = there & (p < PARTS)
                part_lse = tl.load(partial_lse + p * GROUP + g, mine, other=float("-inf"), cache_modifier=".cg")
                part = tl.load(partial + p * GROUP * D + column, mine, other=0.0, cache_modifier=".cg")
                higher = tl.maximum(higher, part_lse)
                lses = extended(lses, part_lse)
                parts = extended(parts, part)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            fade = tl.exp2(top - shift)
            total, acc, top = total * fade, acc * fade, higher
            for i in tl.static_range(AT_ONCE):
                weight = tl.exp2(lses[i] - shift)
                total += weight
                acc += weight * parts[i]
        result = acc / tl.maximum(total, 1e-37)
        at = g * T + t
        tl.store(out + at * D + column % D, result.to(out.dtype.element_ty), there)
        tl.store(lse + at, _natural(_lse(top, total)), there & (column % D == 0))


@triton.jit
def attend(
    q, k, v, seq_lens, ids, counts, partial, partial_lse, arrivals, out, lse,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    n_heads, T, K, per_program, scale,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, MODE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) attends to entries ``i * per_program`` and on of the row's list; the last program merges."""
    follow(NATIVE)
    row, head, position = locate(seq_lens, n_heads, T)
    if MODE == "all":
        # What the row holds is shared, not what the cache has room for
        n = position + 1
        per_program = tl.cdiv(tl.cdiv(n, PROGRAMS), TILE) * TILE
    elif MODE == "blocks":
        n = tl.load(counts + row) * BLOCK_SIZE
    else:
        n = tl.load(counts + row)
    query = load_query(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, D, DP, GROUP, ROWS)
    k += head // n_heads * k_stride_b + head % n_heads * k_stride_h
    v += head // n_heads * v_stride_b + head % n_heads * v_stride_h
    first = tl.program_id(0) * per_program
    acc, top, total = attend_range(
        query, k, v, ids, ids + row * K, ids, ids, 0, ids, first, tl.minimum(n, first + per_program), position, scale,
        k_stride_s, v_stride_s, 0, 0, 0, D, DP, GROUP, ROWS, BLOCK_SIZE, MODE, False, "all", False, False, TILE,
        STAGES, PRECISION,
    )  # fmt: skip
    finish(acc, top, total, partial, partial_lse, arrivals + row, out, lse, row, head, T,
           D, DP, GROUP, GP, ROWS, PROGRAMS, 0, NATIVE)  # fmt: skip


def launch_attend(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, ids: Tensor | None, counts: Tensor | None, arrivals: Tensor,
    *, by_block: bool, block_size: int, scale: float, tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, HQ, T, D] in q's dtype and lse float32 [B, HQ, T] over tokens or blocks ``ids`` int32 [R, K].

    Without ``ids`` over every token up to the query's position. ``arrivals`` int32 [R]: zeros before and after.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    rows, group = b * hkv * t, hq // hkv
    entries = k.shape[2] if ids is None else ids.shape[1]
    most = entries * block_size if by_block else entries
    tile = tiles.attend_tile
    per_program = -(-most // (tiles.programs * tile)) * tile
    programs = -(-most // per_program)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(b, hq, t, device=q.device)
    partial = lse.new_empty(rows, programs, group, d) if programs > 1 else lse
    partial_lse = lse.new_empty(rows, programs, group) if programs > 1 else lse
    attend[(programs, rows)](
        q, k, v, seq_lens, arrivals if ids is None else ids, arrivals if counts is None else counts,
        partial, partial_lse, arrivals, out, lse,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), hkv, t, entries, per_program, scale,
        D=d, DP=padded(d, 16), GROUP=group, GP=padded(group), ROWS=padded(group, 16), BLOCK_SIZE=block_size,
        MODE="all" if ids is None else "blocks" if by_block else "tokens", TILE=tile, STAGES=tiles.attend_stages,
        PROGRAMS=programs, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NATIVE=NATIVE, num_warps=tiles.warps, launch_pdl=NATIVE,
    )  # fmt: skip
    return out, lse
