"""Quest's block filter: scores from per-channel minima and maxima, and the blocks kept, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_tls.kernels.follow import precede
from flex_tls.kernels.keep_best import keep_best
from flex_tls.kernels.tiles import NATIVE, n_processors, padded

# Blocks scored at once, and the most that the choice holds in registers
TILE = 32
CHUNK = 4096


@triton.jit
def score_boxes(
    q, low, high, scores, keys, arrivals, ids, counts, N, K, newest,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) scores TILES times PER blocks; the row's last program chooses."""
    precede(NATIVE)
    row = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    low += row * N * D
    high += row * N * D
    scores += row * N
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
        tl.store(scores + block, tl.max(tl.where((g < GROUP)[:, None], score, float("-inf")), 0), block < N)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + row, 0)
        keep_best(scores, N, K, ids, keys + row * N, ids + row * K, counts + row, N, newest, 0, 1, N, K,
                  1, 1, BN, CHUNKS, KP, BLOCK_SIZE, BLOCK_SIZE, WHOLE, "max", NATIVE)  # fmt: skip


def launch_score_boxes(
    q: Tensor, low: Tensor, high: Tensor, arrivals: Tensor, *, kept: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The best ``kept`` blocks of every KV head: ids int32 [R, kept], ascending, and counts int32 [R].

    q [B, HQ, 1, D]; low and high [B, HKV, N, D], the blocks' minima and maxima; R = B * HKV. A block's score is the
    largest upper bound on ``q . k`` among the heads of the group; the newest block is always kept.
    """
    b, hkv, n, d = low.shape
    rows, group = b * hkv, q.shape[1] // hkv
    scores = torch.empty(rows, n, device=q.device)
    ids, counts = arrivals.new_empty(rows, kept), arrivals.new_empty(rows)
    chunk = min(padded(n), CHUNK)
    chunks = -(-n // chunk)
    keys = arrivals.new_empty(rows, n) if chunks > 1 else ids
    # Some eight programs a processor; few rows take one tile a program
    tiles = max(1, rows * -(-n // TILE) // (n_processors(q.device) * 8)) if NATIVE else 2
    # The choice would take all registers it can get: more warps stream without them, and nothing spills
    score_boxes[(-(-n // (TILE * tiles)), rows)](
        q, low, high, scores, keys, arrivals, ids, counts, n, kept, n * block_size - 1,
        D=d, DP=padded(d, 16), GROUP=group, ROWS=padded(group, 16), BLOCK_SIZE=block_size, PER=TILE, TILES=tiles,
        BN=chunk, CHUNKS=chunks, KP=padded(kept), WHOLE=chunk * chunks == n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", NATIVE=NATIVE, num_warps=4, num_stages=3,
        maxnreg=128,
    )  # fmt: skip
    return ids, counts
