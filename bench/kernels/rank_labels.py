"""Double Sparsity's token filter: the best tokens of the whole cache by their labels, exactly, in two launches.

The k best tokens lie in the k blocks with the best best token: a token in another block has k better ones, one in each
of those. So blocks of 16 tokens are ranked first, while the labels stream by, and only the tokens of k blocks after
that: no list of all tokens is written, read and sorted. Ties go to the lower position at both levels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flex_tls.kernels.follow import follow
from flex_tls.kernels.keep_best import keep_best
from flex_tls.kernels.labels import dot_codes, load_codes
from flex_tls.kernels.tiles import NATIVE, n_processors, padded

# Tokens of a block here, and of a tile
BLOCK_SIZE = 16
TILE = 2048 if NATIVE else 256
# Most candidates that the choice holds in registers: of blocks, and of tokens
BLOCK_CHUNK = 8192
TOKEN_CHUNK = 16384


@triton.jit
def rank_labels(
    codes, asked, base, unit, blocks, scores, keys, arrivals, ids, counts, S, n, K,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr,
    PER: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) scores TILES times PER of the row's n blocks; the row's last program keeps K.

    LISTED: the blocks are those of ``blocks`` [n], and their tokens are kept; else all blocks, and blocks are kept.
    """
    follow(NATIVE)
    row = tl.program_id(1).to(tl.int64)
    codes += row * W * S
    asked += row * GROUP * (8 // BITS) * W
    base += row * GROUP * 2
    unit += row * GROUP
    n_scores = n
    if LISTED:
        blocks += row * n
        n_scores = n * SIZE
    scores += row * n_scores
    inside = tl.arange(0, SIZE)[None]
    for i in range(TILES):
        entry = (tl.program_id(0) * TILES + i) * PER + tl.arange(0, PER)
        block = entry
        if LISTED:
            block = tl.load(blocks + entry, entry < n, other=0)
        some = (entry < n)[:, None]
        words = load_codes(codes, block[:, None] * SIZE + inside, some, S, W)
        best = tl.full((PER, SIZE), float("-inf"), tl.float32)
        for g in tl.static_range(GROUP):
            dot = dot_codes(words, asked, g, W, W, BITS, NATIVE)
            best = tl.maximum(best, tl.load(base + 2 * g + 1) + tl.load(unit + g) * dot.to(tl.float32))
        if LISTED:
            tl.store(scores + entry[:, None] * SIZE + inside, best, some)
        else:
            tl.store(scores + entry, tl.max(best, 1), entry < n)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + row, 0)
        # Nothing is forced: the position is past every candidate
        UNIT: tl.constexpr = 1 if LISTED else SIZE
        keep_best(scores, n_scores, K, blocks, keys + row * n_scores, ids + row * K, counts + row, S, S, 0, 0,
                  n_scores, K, 1, 1, BN, CHUNKS, KP, SIZE, UNIT, WHOLE, "max", NATIVE)  # fmt: skip


def launch_rank_labels(
    codes: Tensor, asked: Tensor, base: Tensor, unit: Tensor, arrivals: Tensor, *, bits: int, kept: int
) -> tuple[Tensor, Tensor]:
    """The best ``kept`` tokens of every KV head: slots int32 [R, kept], ascending, and counts int32 [R].

    codes int32 [B, HKV, W, S], S whole blocks of 16; asked, base and unit as ``launch_ask`` gives them. A token's score
    is the largest among the heads of the group.
    """
    blocks, _ = _launch(codes, asked, base, unit, arrivals, None, bits, min(kept, codes.shape[3] // BLOCK_SIZE))
    return _launch(codes, asked, base, unit, arrivals, blocks, bits, kept)


def _launch(
    codes: Tensor, asked: Tensor, base: Tensor, unit: Tensor, arrivals: Tensor, blocks: Tensor | None, bits: int,
    kept: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best ``kept`` blocks of all, or the best tokens of ``blocks`` int32 [R, n]."""
    w, s = codes.shape[2:]
    rows, group = asked.shape[:2]
    listed = blocks is not None
    n = blocks.shape[1] if blocks is not None else s // BLOCK_SIZE
    candidates = n * BLOCK_SIZE if listed else n
    scores = base.new_empty(rows, candidates)
    ids, counts = asked.new_empty(rows, kept), asked.new_empty(rows)
    chunk = min(padded(candidates), TOKEN_CHUNK if listed else BLOCK_CHUNK)
    chunks = -(-candidates // chunk)
    keys = asked.new_empty(rows, candidates) if chunks > 1 else ids
    per = TILE // BLOCK_SIZE
    # A list is short: one tile a program. Of all blocks some eight programs a processor
    tiles = max(1, rows * -(-n // per) // (n_processors(codes.device) * 8)) if NATIVE and not listed else 1
    # The choice would take all registers it can get: twice as many warps stream with half of them
    rank_labels[(-(-n // (per * tiles)), rows)](
        codes, asked, base, unit, ids if blocks is None else blocks, scores, keys, arrivals, ids, counts, s, n, kept,
        W=w, BITS=bits, GROUP=group, LISTED=listed, SIZE=BLOCK_SIZE, PER=per, TILES=tiles, BN=chunk, CHUNKS=chunks,
        KP=padded(kept), WHOLE=chunk * chunks == candidates, NATIVE=NATIVE,
        num_warps=16 if listed else 8, maxnreg=128, launch_pdl=NATIVE,
    )  # fmt: skip
    return ids, counts
