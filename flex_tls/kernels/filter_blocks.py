"""Level 1: label scores of every token, the best of each block, and the blocks kept, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .follow import follow
from .keep_best import keep_best
from .labels import dot_codes, load_codes
from .rows import locate
from .tiles import NATIVE, Tiles, padded


@triton.jit
def filter_blocks(
    codes, seq_lens, asked, base, unit, scores, keys, arrivals, ids, counts,
    n_heads, T, N, K, scale, sinks, recent,
    W: tl.constexpr, READ: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
    KP: tl.constexpr, WHOLE: tl.constexpr, BLOCK_REDUCE: tl.constexpr, REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) scores TILES times PER blocks; the row's last program chooses."""
    follow(NATIVE)
    row, head, position = locate(seq_lens, n_heads, T)
    asked += row * GROUP * (8 // BITS) * W
    base += row * GROUP * 2
    unit += row * GROUP
    scores += row * GROUP * N
    codes += head * W * N * BLOCK_SIZE
    for i in range(TILES):
        block = (tl.program_id(0) * TILES + i) * PER + tl.arange(0, PER)
        slot = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None]
        seen = slot <= position
        # Whole blocks, so that the loads stay wide: what lies past the position is read, and dropped
        some = (block * BLOCK_SIZE <= position)[:, None]
        words = load_codes(codes, slot, some, N * BLOCK_SIZE, READ)
        for g in tl.static_range(GROUP):
            dot = dot_codes(words, asked, g, READ, W, BITS, NATIVE)
            shift = tl.load(base + 2 * g)
            size = tl.load(unit + g)
            if BLOCK_REDUCE == "max":
                best = tl.max(tl.where(seen, dot, -2147483648), 1)
                score = (shift + size * best.to(tl.float32)) * scale
            else:
                each = tl.where(seen, (shift + size * dot.to(tl.float32)) * scale, float("-inf"))
                best = tl.max(each, 1)
                most = tl.where(best == float("-inf"), 0.0, best)
                score = most + tl.log(tl.maximum(tl.sum(tl.exp(each - most[:, None]), 1), 1e-37))
            score = tl.where(block * BLOCK_SIZE <= position, score, float("-inf"))
            tl.store(scores + g * N + block, score, block < N)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + row, 0)
        keep_best(scores, N, K, ids, keys + row * N, ids + row * K, counts + row, N, position, sinks, recent, N, K,
                  GROUP, GP, BN, CHUNKS, KP, BLOCK_SIZE, BLOCK_SIZE, WHOLE, REDUCE, NATIVE)  # fmt: skip


def launch_filter_blocks(
    codes: Tensor, seq_lens: Tensor, asked: Tensor, base: Tensor, unit: Tensor, arrivals: Tensor,
    *, n_query_tokens: int, bits: int, block_size: int, kept: int, sinks: int, recent: int, scale: float,
    filter_dims: int, block_reduce: str, group_reduce: str, tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids int32 [R, K], ascending, N past the count; and counts int32 [R]."""
    _, hkv, w, s = codes.shape
    rows, group = asked.shape[:2]
    n = s // block_size
    k = min(kept, n)
    scores = base.new_empty(rows, group, n)
    ids, counts = asked.new_empty(rows, k), asked.new_empty(rows)
    chunk, chunks = tiles.chunk(n)
    keys = asked.new_empty(rows, n) if chunks > 1 else ids
    per = max(1, tiles.filter_tile // block_size)
    filter_blocks[(-(-n // (per * tiles.filter_tiles)), rows)](
        codes, seq_lens, asked, base, unit, scores, keys, arrivals, ids, counts,
        hkv, n_query_tokens, n, k, scale, sinks, recent,
        W=w, READ=-(-filter_dims * bits // 32), BITS=bits, GROUP=group, GP=padded(group), BLOCK_SIZE=block_size,
        PER=per, TILES=tiles.filter_tiles, BN=chunk, CHUNKS=chunks, KP=padded(k),
        WHOLE=chunk * chunks == n and padded(group) == group, BLOCK_REDUCE=block_reduce, REDUCE=group_reduce,
        NATIVE=NATIVE, num_warps=tiles.filter_warps, launch_pdl=NATIVE,
    )  # fmt: skip
    return ids, counts
