"""Blocks from host memory to the pool and new tokens back, by one kernel that reads and writes pinned memory itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def fetch_blocks(
    rows, scales, slots, slot_scales, slot_of_block, begins, lens, fetch_block, fetch_slot, fetch_count, waits, R, N, P,
    n_written,
    BLOCK_SIZE: tl.constexpr, TOKEN: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, TOKEN_TILE: tl.constexpr,
    INT8: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """Program i takes every ``num_programs``-th of all listed blocks, then of all new tokens.

    A token is TOKEN words, copied TILE words at once, and with INT8 one word of scales beside them.
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
        if INT8:
            # On their way before the codes are waited for; as many lanes as those have, so that each is read once
            token = tl.arange(0, TILE)
            scale = tl.load(scales + (row * N + block) * BLOCK_SIZE + token, token < BLOCK_SIZE)
        _copy(rows + (row * N + block) * BLOCK, slots + (row * P + slot) * BLOCK, BLOCK, TILE)
        if INT8:
            tl.store(slot_scales + (row * P + slot) * BLOCK_SIZE + token, scale, token < BLOCK_SIZE)
    for item in range(tl.program_id(0), R * n_written, tl.num_programs(0)):
        row = (item // n_written).to(tl.int64)
        position = tl.load(begins + row) + item % n_written
        if position < tl.load(lens + row):
            block = (position // BLOCK_SIZE).to(tl.int64)
            slot = tl.load(slot_of_block + row * N + block).to(tl.int64)
            within = position % BLOCK_SIZE
            here, there = (row * P + slot) * BLOCK_SIZE + within, (row * N + block) * BLOCK_SIZE + within
            _copy(slots + here * TOKEN, rows + there * TOKEN, TOKEN, TOKEN_TILE)
            if INT8:
                tl.store(scales + there, tl.load(slot_scales + here))


def launch_fetch_blocks(
    rows: Tensor, scales: Tensor | None, slots: Tensor, slot_scales: Tensor | None, slot_of_block: Tensor,
    begins: Tensor, lens: Tensor, fetch_block: Tensor, fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, *,
    n_written: int, n_programs: int, waiting: bool,
) -> None:  # fmt: skip
    """Bring what the last plan listed for the rows and heads whose ``waits`` is ``waiting``.

    From ``rows`` [B, HKV, N, BLOCK, 2, D], pinned, to ``slots`` [B, HKV, P, BLOCK, 2, D], and from ``scales`` float32
    [B, HKV, N, BLOCK, 2], if there are any, to ``slot_scales`` [B, HKV, P, BLOCK, 2]. Then the tokens from ``begins``
    up to ``lens``, at most ``n_written`` a row, the other way.
    """
    b, hkv, n, size, two, d = rows.shape
    token_bytes = two * d * rows.element_size()
    word = next(word for word in (torch.int64, torch.int32, torch.int16) if token_bytes % word.itemsize == 0)
    source, target = (x.view(-1).view(word) for x in (rows, slots))
    token = token_bytes // word.itemsize
    tile = min(TILE_BYTES // word.itemsize, padded(size * token))
    # The scales of a token's key and value are one word of 8 bytes
    source_scales, target_scales = (
        begins if x is None else x.view(-1).view(torch.int64) for x in (scales, slot_scales)
    )
    fetch_blocks[(n_programs,)](
        source, source_scales, target, target_scales, slot_of_block, begins, lens, fetch_block, fetch_slot, fetch_count,
        waits, b * hkv, n, slots.shape[2], n_written,
        BLOCK_SIZE=size, TOKEN=token, RP=padded(b * hkv), TILE=tile, TOKEN_TILE=min(tile, padded(token)),
        INT8=scales is not None, WAITING=int(waiting), num_warps=16 if NATIVE else 4,
    )  # fmt: skip
