"""A product of few rows with a matrix of weights, at the speed at which memory gives these: a skinny GEMM.

A program takes a few rows of weights whole. Its threads multiply and add what they loaded, without shared memory and
without tensor cores, which are for more rows of inputs; their sums meet once, at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .follow import follow, prefetch
from .tiles import NATIVE, padded
from .tuples import extended, stacked

# Neighbours in memory that a thread loads at once: 16 bytes of bfloat16
PIECE: tl.constexpr = tl.constexpr(8)


class Tile(NamedTuple):
    """How the work is cut: rows and columns of weights that a program takes at once, its warps, and hints ahead.

    ``ahead``: columns that it asks for before the kernel ahead is done.
    """

    rows: int
    columns: int
    warps: int
    ahead: int


# By rows of inputs; of eleven, the fastest on an H100 for Qwen3-8B's shapes (docs/design.md, section 9)
TILES = (Tile(2, 2048, 8, 0), Tile(4, 2048, 8, 1024), Tile(8, 1024, 4, 1024), Tile(8, 1024, 4, 1024))


@triton.jit
def _halves(x):
    """Even and odd columns of x [..., 2 * N]."""
    return tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))  # noqa: RUF005 - Triton cannot unpack


@triton.jit
def _columns(x):
    """Columns of x [..., PIECE * N] as PIECE float32 tensors [..., N]: what a thread has loaded at once, one by one."""
    parts = (x,)
    for level in tl.static_range(3):
        halves = ()
        for i in tl.static_range(2**level):
            even, odd = _halves(parts[i])
            halves = extended(extended(halves, even), odd)
        parts = halves
    floats = ()
    for i in tl.static_range(PIECE):
        floats = extended(floats, parts[i].to(tl.float32))
    return floats


@triton.jit
def _add_products(total, weights, inputs):
    for i in tl.static_range(PIECE):
        total += weights[i] * inputs[i][None]
    return total


@triton.jit
def skinny_product(
    x, weight, bias, out, x_stride, weight_stride, N, K,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, BIAS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Program i computes BN columns of out [ROWS, N] = x [ROWS, K] @ weight [N, K]^T."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    weight += tl.minimum(n, N - 1).to(tl.int64)[:, None] * weight_stride
    if AHEAD > 0:
        prefetch(weight + tl.minimum(tl.arange(0, AHEAD // 64) * 64, K - 1)[None])
    follow(NATIVE)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = extended(sums, tl.zeros((BN, BK // PIECE), tl.float32))
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        there = k < K
        weights = _columns(tl.load(weight + k[None], there[None], other=0.0, eviction_policy="evict_first"))
        more = ()
        for m in tl.static_range(ROWS):
            inputs = _columns(tl.load(x + m * x_stride + k, there, other=0.0))
            more = extended(more, _add_products(sums[m], weights, inputs))
        sums = more
    # All rows of inputs cross the threads at once
    result = tl.sum(stacked(sums, ROWS), 1)
    if BIAS:
        result += tl.load(bias + n, n < N, other=0.0).to(tl.float32)[:, None]
    m = tl.arange(0, result.shape[1])[None]
    tl.store(out + m * N + n[:, None], result.to(out.dtype.element_ty), (m < ROWS) & (n < N)[:, None])


def launch_skinny_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product x [M, K] @ weight [N, K]^T + bias [N] -> [M, N]; M from 1 to 4, columns contiguous, summed in float32."""
    (rows, k), n = x.shape, weight.shape[0]
    assert rows <= len(TILES)
    tile = TILES[rows - 1]
    columns = min(tile.columns, padded(k, 64))
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    skinny_product[(triton.cdiv(n, tile.rows),)](
        x, weight, weight if bias is None else bias, out, x.stride(0), weight.stride(0), n, k,
        ROWS=rows, BN=tile.rows, BK=columns, AHEAD=tile.ahead if NATIVE else 0,
        BIAS=bias is not None, NATIVE=NATIVE, num_warps=tile.warps, launch_pdl=NATIVE,
    )  # fmt: skip
    return out
