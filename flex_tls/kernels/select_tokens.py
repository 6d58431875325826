"""Level 2: label scores of the kept blocks' tokens, and the tokens kept, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .follow import follow
from .keep_best import keep_best
from .labels import dot_codes, load_codes
from .rows import locate
from .tiles import NATIVE, Tiles, padded


@triton.jit
def select_tokens(
    codes, seq_lens, asked, base, unit, blocks, block_counts, scores, keys, arrivals, ids, counts,
    n_heads, T, N, K, M, scale, sinks, recent,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, MP: tl.constexpr,
    WHOLE: tl.constexpr, REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) scores PER of the row's kept ``blocks`` [K]; the last program chooses M."""
    follow(NATIVE)
    row, head, position = locate(seq_lens, n_heads, T)
    asked += row * GROUP * (8 // BITS) * W
    base += row * GROUP * 2
    unit += row * GROUP
    n = K * BLOCK_SIZE
    scores += row * GROUP * n
    blocks += row * K
    codes += head * W * N * BLOCK_SIZE
    entry = tl.program_id(0) * PER + tl.arange(0, PER)
    inside = tl.arange(0, BLOCK_SIZE)[None]
    # Padding entries of the block list lie past the last slot, and so past the position
    block = tl.load(blocks + entry, entry < K, other=N)
    slot = block[:, None] * BLOCK_SIZE + inside
    seen = slot <= position
    # Whole blocks, so that the loads stay wide: what lies past the position is read, and dropped
    some = (block * BLOCK_SIZE <= position)[:, None]
    words = load_codes(codes, slot, some, N * BLOCK_SIZE, W)
    place = entry[:, None] * BLOCK_SIZE + inside
    for g in tl.static_range(GROUP):
        dot = dot_codes(words, asked, g, W, W, BITS, NATIVE)
        score = (tl.load(base + 2 * g + 1) + tl.load(unit + g) * dot.to(tl.float32)) * scale
        tl.store(scores + g * n + place, tl.where(seen, score, float("-inf")), (entry < K)[:, None])
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + row, 0)
        n_filled = tl.load(block_counts + row) * BLOCK_SIZE
        newest = n_filled - BLOCK_SIZE + position % BLOCK_SIZE
        # Entries past the filled ones hold -inf
        keep_best(scores, n, M, blocks, keys + row * n, ids + row * M, counts + row, N * BLOCK_SIZE, newest,
                  sinks, recent, n, M, GROUP, GP, BN, CHUNKS, MP, BLOCK_SIZE, 1, WHOLE, REDUCE, NATIVE)  # fmt: skip


def launch_select_tokens(
    codes: Tensor, seq_lens: Tensor, asked: Tensor, base: Tensor, unit: Tensor, blocks: Tensor, block_counts: Tensor,
    arrivals: Tensor, *, n_query_tokens: int, bits: int, block_size: int, kept: int, sinks: int, recent: int,
    scale: float, group_reduce: str, tiles: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slots int32 [R, kept], ascending, N * block_size past the count; and counts int32 [R]."""
    _, hkv, w, s = codes.shape
    (rows, k), group, n = blocks.shape, asked.shape[1], s // block_size
    candidates = k * block_size
    scores = base.new_empty(rows, group, candidates)
    ids, counts = blocks.new_empty(rows, kept), torch.empty_like(block_counts)
    chunk, chunks = tiles.chunk(candidates)
    keys = blocks.new_empty(rows, candidates) if chunks > 1 else ids
    per = max(1, tiles.select_tile // block_size)
    select_tokens[(-(-k // per), rows)](
        codes, seq_lens, asked, base, unit, blocks, block_counts, scores, keys, arrivals, ids, counts,
        hkv, n_query_tokens, n, k, kept, scale, sinks, recent,
        W=w, BITS=bits, GROUP=group, GP=padded(group), BLOCK_SIZE=block_size, PER=per,
        BN=chunk, CHUNKS=chunks, MP=padded(kept), WHOLE=chunk * chunks == candidates and padded(group) == group,
        REDUCE=group_reduce, NATIVE=NATIVE, num_warps=tiles.select_warps,
        launch_pdl=NATIVE,
    )  # fmt: skip
    return ids, counts
