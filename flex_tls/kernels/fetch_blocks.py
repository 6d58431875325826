"""Blocks from host memory to the pool and new tokens back, by one kernel that reads and writes pinned memory itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .int8 import dequantised, quantised
from .tiles import NATIVE, padded

# What a program has under way: 32 KiB
TILE_BYTES = 2**15


@triton.jit
def _copy(source, target, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Neighbouring words to neighbouring words, in vectors of 16 bytes."""
    word = tl.arange(0, TILE)
    for first in tl.static_range(0, WORDS, TILE):
        if WORDS % TILE == 0:
            tl.store(target + first + word, tl.load(source + first + word))
        else:
            tl.store(target + first + word, tl.load(source + first + word, first + word < WORDS), first + word < WORDS)


@triton.jit
def _unpack(codes, scales, target, VECTORS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr):
    """Codes and scales of neighbouring vectors to neighbouring vectors, TILE of them at once."""
    vector, d = tl.arange(0, TILE), tl.arange(0, DP)[None]
    for first in tl.static_range(0, VECTORS, TILE):
        at = (first + vector[:, None]) * D + d
        code, scale = tl.load(codes + at, d < D, other=0), tl.load(scales + first + vector)
        tl.store(target + at, dequantised(code, scale, target.dtype.element_ty), d < D)


@triton.jit
def _pack(source, codes, scales, D: tl.constexpr, DP: tl.constexpr):
    """A token's key and value to their codes and scales."""
    vector, d = tl.arange(0, 2), tl.arange(0, DP)[None]
    at = vector[:, None] * D + d
    code, scale = quantised(tl.load(source + at, d < D, other=0.0))
    tl.store(codes + at, code, d < D)
    tl.store(scales + vector, scale)


@triton.jit
def fetch_blocks(
    rows, scales, slots, slot_of_block, begins, lens, fetch_block, fetch_slot, fetch_count, waits, R, N, P, n_written,
    BLOCK_SIZE: tl.constexpr, TOKEN: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, TOKEN_TILE: tl.constexpr,
    INT8: tl.constexpr, DP: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """Program i takes every ``num_programs``-th of all listed blocks, then of all new tokens.

    A token is TOKEN words, copied TILE words at once; or, with INT8, two vectors of TOKEN / 2, TILE vectors at once.
    """
    BLOCK: tl.constexpr = BLOCK_SIZE * TOKEN
    r = tl.arange(0, RP)
    count = tl.load(fetch_count + r, r < R, other=0)
    count = tl.where(tl.load(waits + r, r < R, other=0) == WAITING, count, 0)
    upto = tl.cumsum(count, 0)
    for item in range(tl.program_id(0), tl.sum(count, 0), tl.num_programs(0)):
        # The row whose list the item is in, and its place there
        row = tl.sum((upto <= item).to(tl.int32), 0)
        i = item - tl.sum(tl.where(r < row, count, 0), 0)
        row = row.to(tl.int64)
        block = tl.load(fetch_block + row * P + i).to(tl.int64)
        slot = tl.load(fetch_slot + row * P + i).to(tl.int64)
        source, target = rows + (row * N + block) * BLOCK, slots + (row * P + slot) * BLOCK
        if INT8:
            scale = scales + (row * N + block) * BLOCK_SIZE * 2
            _unpack(source, scale, target, BLOCK_SIZE * 2, TOKEN // 2, DP, TILE)
        else:
            _copy(source, target, BLOCK, TILE)
    for item in range(tl.program_id(0), R * n_written, tl.num_programs(0)):
        row = (item // n_written).to(tl.int64)
        position = tl.load(begins + row) + item % n_written
        if position < tl.load(lens + row):
            block = (position // BLOCK_SIZE).to(tl.int64)
            slot = tl.load(slot_of_block + row * N + block).to(tl.int64)
            within = position % BLOCK_SIZE
            place = (row * N + block) * BLOCK_SIZE + within
            source, target = slots + (row * P + slot) * BLOCK + within * TOKEN, rows + place * TOKEN
            if INT8:
                _pack(source, target, scales + place * 2, TOKEN // 2, DP)
            else:
                _copy(source, target, TOKEN, TOKEN_TILE)


def launch_fetch_blocks(
    rows: Tensor, scales: Tensor | None, slots: Tensor, slot_of_block: Tensor, begins: Tensor, lens: Tensor,
    fetch_block: Tensor, fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, *, n_written: int, n_programs: int,
    waiting: bool,
) -> None:  # fmt: skip
    """Bring what the last plan listed for the rows and heads whose ``waits`` is ``waiting``.

    From ``rows`` [B, HKV, N, BLOCK, 2, D], pinned, to ``slots`` [B, HKV, P, BLOCK, 2, D]: copied, or, with ``scales``
    float32 [B, HKV, N, BLOCK, 2], from codes int8. Then the tokens from ``begins`` up to ``lens``, at most
    ``n_written`` a row, the other way.
    """
    b, hkv, n, size, two, d = rows.shape
    if scales is None:
        word = torch.int64 if two * d * rows.element_size() % 8 == 0 else torch.int32
        source, target = rows.view(-1).view(word), slots.view(-1).view(word)
        token = two * d * rows.element_size() // word.itemsize
        tile = min(TILE_BYTES // word.itemsize, padded(size * token))
    else:
        source, target, token = rows, slots, two * d
        tile = min(two * size, max(1, TILE_BYTES // (padded(d) * slots.element_size())))
    fetch_blocks[(n_programs,)](
        source, rows if scales is None else scales, target, slot_of_block, begins, lens, fetch_block, fetch_slot,
        fetch_count, waits, b * hkv, n, slots.shape[2], n_written,
        BLOCK_SIZE=size, TOKEN=token, RP=padded(b * hkv), TILE=tile, TOKEN_TILE=min(tile, padded(token)),
        INT8=scales is not None, DP=padded(d), WAITING=int(waiting), num_warps=16 if NATIVE else 4,
    )  # fmt: skip
