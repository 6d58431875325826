"""Quest's block filter: scores from per-channel minima and maxima, and the blocks kept, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_tls.kernels.follow import follow
from flex_tls.kernels.keep_best import make_key
from flex_tls.kernels.tiles import NATIVE, n_processors, padded

from .choose import choose, chunk_of

# Blocks scored at once
TILE = 32


@triton.jit
def score_boxes(
    q, low, high, words, keys, arrivals, ids, counts, N, K, key_stride,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) scores TILES times PER blocks; the row's last program chooses."""
    follow(NATIVE)
    row = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    low += row * N * D
    high += row * N * D
    keys += row * key_stride
    query = tl.load(q + (row * GROUP + g)[:, None] * D + d[None], (g < GROUP)[:, None] & (d < D)[None], other=0.0)
    # max(q low, q high) is q high where q is positive and q low where it is not: two products for all heads at once
    above = tl.where(query > 0, query, 0.0).to(query.dtype)
    below = tl.where(query > 0, 0.0, query).to(query.dtype)
    for i in range(TILES):
        block = (tl.program_id(0) * TILES + i) * PER + tl.arange(0, PER)
        place = block[:, None] * D + d[None]
        inside = (block < N)[:, None] & (d < D)[None]
        highs = tl.load(high + place, inside, other=0.0)
        lows = tl.load(low + place, inside, other=0.0)
        score = tl.dot(above, tl.trans(highs), input_precision=PRECISION)
        score = tl.dot(below, tl.trans(lows), score, input_precision=PRECISION)
        rank = tl.max(tl.where((g < GROUP)[:, None], score, float("-inf")), 0)
        tl.store(keys + block, make_key(rank, block < N, block == N - 1, False).to(tl.int16), block < N)
    choose(words + row * (key_stride // 2), arrivals + row, ids, ids + row * K, counts + row, N, K, N, BN, CHUNKS, KP,
           BLOCK_SIZE, False, NATIVE)  # fmt: skip


def launch_score_boxes(
    q: Tensor, low: Tensor, high: Tensor, arrivals: Tensor, *, kept: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The best ``kept`` blocks of every KV head: ids int32 [R, kept], ascending, and counts int32 [R].

    q [B, HQ, 1, D]; low and high [B, HKV, N, D], the blocks' minima and maxima; R = B * HKV. A block's score is the
    largest upper bound on ``q . k`` among the heads of the group; the newest block is always kept.
    """
    b, hkv, n, d = low.shape
    rows, group = b * hkv, q.shape[1] // hkv
    ids, counts = arrivals.new_empty(rows, kept), arrivals.new_empty(rows)
    chunk, chunks = chunk_of(n, 4)
    words = arrivals.new_empty(rows, chunk * chunks // 2)
    # Some eight programs a processor; few rows take one tile a program
    tiles = max(1, rows * -(-n // TILE) // (n_processors(q.device) * 8)) if NATIVE else 2
    score_boxes[(-(-n // (TILE * tiles)), rows)](
        q, low, high, words, words.view(torch.int16), arrivals, ids, counts, n, kept, chunk * chunks,
        D=d, DP=padded(d, 16), GROUP=group, ROWS=padded(group, 16), BLOCK_SIZE=block_size, PER=TILE, TILES=tiles,
        BN=chunk, CHUNKS=chunks, KP=padded(kept),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", NATIVE=NATIVE, num_warps=4, num_stages=3,
        launch_pdl=NATIVE,
    )  # fmt: skip
    return ids, counts
