"""Double Sparsity's token filter: the best tokens of the whole cache by their labels, exactly, in two launches.

The k best tokens lie in the k blocks with the best best token: a token in another block has k better ones, one in each
of those. So blocks of 16 tokens are ranked first, while the labels stream by, and only the tokens of k blocks after
that: no list of all tokens is written, read and sorted. Ties go to the lower position at both levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_tls.kernels.follow import follow
from flex_tls.kernels.keep_best import make_key
from flex_tls.kernels.labels import dot_codes, load_asked, load_codes, parts_before
from flex_tls.kernels.rows import locate
from flex_tls.kernels.tiles import NATIVE, n_processors, padded

from .choose import choose, chunk_of

# Tokens of a block here, and of a tile
BLOCK_SIZE = 16
TILE = 2048 if NATIVE else 256


@triton.jit
def rank_labels(
    codes, seq_lens, asked, base, unit, blocks, words, keys, arrivals, ids, counts, n_heads, S, n, K, key_stride,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr,
    PER: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (i, row) ranks TILES times PER of the row's n blocks; the row's last program keeps K.

    LISTED: the blocks are those of ``blocks`` [n], and their tokens are kept; else all blocks, and blocks are kept.
    """
    follow(NATIVE)
    row, _, _ = locate(seq_lens, n_heads, 1)
    codes += row * W * S
    keys += row * key_stride
    if LISTED:
        blocks += row * n
    weights, shifts, sizes = load_asked(
        asked + row * GROUP * parts_before(BITS, W), base + row * GROUP * 2, unit + row * GROUP, 1, W, W, BITS, GROUP
    )  # fmt: skip
    inside = tl.arange(0, SIZE)[None]
    for i in range(TILES):
        entry = (tl.program_id(0) * TILES + i) * PER + tl.arange(0, PER)
        block = entry
        if LISTED:
            block = tl.load(blocks + entry, entry < n, other=0)
        some = (entry < n)[:, None]
        label = load_codes(codes, block[:, None] * SIZE + inside, some, S, W)
        best = tl.full((PER, SIZE), float("-inf"), tl.float32)
        for g in tl.static_range(GROUP):
            dot = dot_codes(label, weights, g, tl.zeros_like(label[0]), W, BITS, NATIVE)
            best = tl.maximum(best, shifts[g] + sizes[g] * dot.to(tl.float32))
        if LISTED:
            key = make_key(best, some, False, False)
            tl.store(keys + entry[:, None] * SIZE + inside, key.to(tl.int16), some)
        else:
            key = make_key(tl.max(best, 1), entry < n, False, False)
            tl.store(keys + entry, key.to(tl.int16), entry < n)
    choose(words + row * (key_stride // 2), arrivals + row, blocks, ids + row * K, counts + row,
           n * SIZE if LISTED else n, K, S if LISTED else n, BN, CHUNKS, KP, SIZE, LISTED, NATIVE)  # fmt: skip


def launch_rank_labels(
    codes: Tensor, seq_lens: Tensor, asked: Tensor, base: Tensor, unit: Tensor, arrivals: Tensor, *,
    bits: tuple[int, ...], kept: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best ``kept`` tokens of every KV head: slots int32 [R, kept], ascending, and counts int32 [R].

    codes int32 [B, HKV, W, S], S whole blocks of 16; asked, base and unit as ``launch_ask`` gives them. A token's score
    is the largest among the heads of the group, to float16's digits.
    """
    blocks, _ = _launch(
        codes, seq_lens, asked, base, unit, arrivals, None, bits, min(kept, codes.shape[3] // BLOCK_SIZE)
    )
    return _launch(codes, seq_lens, asked, base, unit, arrivals, blocks, bits, kept)


def _launch(
    codes: Tensor, seq_lens: Tensor, asked: Tensor, base: Tensor, unit: Tensor, arrivals: Tensor,
    blocks: Tensor | None, bits: tuple[int, ...], kept: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best ``kept`` blocks of all, or the best tokens of ``blocks`` int32 [R, n]."""
    _, hkv, w, s = codes.shape
    rows, group = asked.shape[:2]
    listed = blocks is not None
    n = blocks.shape[1] if blocks is not None else s // BLOCK_SIZE
    chunk, chunks = chunk_of(n * BLOCK_SIZE if listed else n, 8)
    words = asked.new_empty(rows, chunk * chunks // 2)
    ids, counts = asked.new_empty(rows, kept), asked.new_empty(rows)
    per = TILE // BLOCK_SIZE
    # A list is short: one tile a program. Of all blocks some eight programs a processor
    tiles = max(1, rows * -(-n // per) // (n_processors(codes.device) * 8)) if NATIVE and not listed else 1
    rank_labels[(-(-n // (per * tiles)), rows)](
        codes, seq_lens, asked, base, unit, ids if blocks is None else blocks, words, words.view(torch.int16), arrivals,
        ids, counts, hkv, s, n, kept, chunk * chunks,
        W=w, BITS=bits, GROUP=group, LISTED=listed, SIZE=BLOCK_SIZE, PER=per, TILES=tiles, BN=chunk, CHUNKS=chunks,
        KP=padded(kept), NATIVE=NATIVE, num_warps=8, launch_pdl=NATIVE,
    )  # fmt: skip
    return ids, counts
