"""The rest of a step that waits: attention over chosen tokens whose blocks came during it, merged with the others.

:mod:`.two_level` has set aside its parts over what was resident; while it ran, the missing blocks travelled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend import attend_range, finish, load_query
from .rows import locate, share
from .tiles import NATIVE, Tiles, padded


@triton.jit
def attend_arrived(
    q, k, v, scales, seq_lens, ids, counts, pages, arrived, clock, partial, partial_lse, arrivals, out, lse,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    page_stride_k, page_stride_v, scale_stride_h, n_pages, n_heads, T, N, K, scale,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BY_BLOCK: tl.constexpr, INT8: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) looks at its share of the row's list; the last one merges all parts."""
    row, head, position = locate(seq_lens, n_heads, T)
    first, end = share(tl.load(counts + row), PROGRAMS)
    if BY_BLOCK:
        first, end = first * BLOCK_SIZE, end * BLOCK_SIZE
    query = load_query(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, D, DP, GROUP, ROWS)
    k += head // n_heads * k_stride_b + head % n_heads * k_stride_h
    v += head // n_heads * v_stride_b + head % n_heads * v_stride_h
    acc, top, total = attend_range(
        query, k, v, scales + head * scale_stride_h, ids + row * K, pages + head * N, arrived + head * n_pages,
        tl.load(clock + head), ids, first, end, position, scale, k_stride_s, v_stride_s, page_stride_k, page_stride_v,
        0, D, DP, GROUP, ROWS, BLOCK_SIZE, "blocks" if BY_BLOCK else "tokens", True, "arrived", INT8, False, TILE,
        STAGES, PRECISION,
    )  # fmt: skip
    finish(acc, top, total, partial, partial_lse, arrivals + row, out, lse, row, head, T,
           D, DP, GROUP, GP, ROWS, PROGRAMS, PROGRAMS, NATIVE)  # fmt: skip


def launch_attend_arrived(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, seq_lens: Tensor, ids: Tensor, counts: Tensor,
    pages: Tensor, arrived: Tensor, clock: Tensor, partial: Tensor, partial_lse: Tensor, arrivals: Tensor, *,
    by_block: bool, block_size: int, scale: float, tiles: Tiles,
) -> Tensor:  # fmt: skip
    """Output [B, HQ, T, D] in q's dtype, of all of ``ids``.

    ``ids`` int32 [R, K], tokens or blocks, of which ``counts`` int32 [R] count; ``partial`` float32
    [R, 2 * programs, G, D] and ``partial_lse`` [R, 2 * programs, G], whose second half is written. k, v, scales, pages,
    arrived and clock are as in :func:`.two_level.launch_two_level`.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    rows, group, programs = b * hkv * t, hq // hkv, tiles.programs
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), partial_lse.new_empty(b, hq, t)
    attend_arrived[(programs, rows)](
        q, k, v, arrivals if scales is None else scales, seq_lens, ids, counts, pages, arrived, clock, partial,
        partial_lse, arrivals, out, lse,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(-2),
        v.stride(0), v.stride(1), v.stride(-2), k.stride(2), v.stride(2), 0 if scales is None else scales.stride(1),
        arrived.shape[2], hkv, t, pages.shape[-1], ids.shape[1], scale,
        D=d, DP=padded(d, 16), GROUP=group, GP=padded(group), ROWS=padded(group, 16), BLOCK_SIZE=block_size,
        BY_BLOCK=by_block, INT8=scales is not None, TILE=tiles.attend_tile, STAGES=tiles.attend_stages,
        PROGRAMS=programs, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NATIVE=NATIVE, num_warps=tiles.warps,
    )  # fmt: skip
    return out
