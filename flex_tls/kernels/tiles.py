"""Tile settings, by shape, without a search at run time."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

# Whether kernels are compiled, not interpreted (TRITON_INTERPRET=1): decided when they are defined
NATIVE: bool = not triton.knobs.runtime.interpret


class Tiles(NamedTuple):
    """Sizes in tokens, warps a program, and how many tiles or splits.

    Attributes:
        filter_tile, filter_tiles: tokens that level 1 scores at once, and how many times a program does.
        select_tile: candidates that a program of level 2 scores.
        attend_tile, attend_splits: tokens gathered at once, and programs a row.
        choose: scores that a program holds while it chooses; more candidates are taken in chunks.
    """

    filter_tile: int
    filter_tiles: int
    filter_warps: int
    select_tile: int
    select_warps: int
    attend_tile: int
    attend_splits: int
    attend_warps: int
    attend_stages: int
    choose: int

    def chunk(self, n: int) -> tuple[int, int]:
        """(candidates of one chunk, chunks) for ``n``."""
        size = min(padded(n), self.choose)
        return size, -(-n // size)


def padded(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, int(triton.next_power_of_2(n)))


@cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def tiles_for(
    device: torch.device, *, head_dim: int, group: int, rows: int, n_slots: int, block_size: int, selected: int
) -> Tiles:
    """Settings for ``rows`` selections over ``n_slots`` slots, of ``selected`` tokens in the end."""
    if device.type != "cuda":
        # Interpreted, on small shapes: several tiles, splits and chunks all the same
        return Tiles(
            filter_tile=max(block_size, 128),
            filter_tiles=2,
            filter_warps=4,
            select_tile=64,
            select_warps=4,
            attend_tile=16,
            attend_splits=3,
            attend_warps=4,
            attend_stages=1,
            choose=128,
        )
    processors = n_processors(device)
    filter_tile = max(block_size, 1024)
    # Few rows: latency counts, and every program takes one tile. Many: some eight programs a processor
    filter_tiles = max(1, rows * -(-n_slots // filter_tile) // (processors * 8))
    many = rows >= processors // 2
    attend_tile = 128 if head_dim <= 128 else 64
    splits = max(1, min(-(-selected // attend_tile), -(-processors * 2 // rows)))
    return Tiles(
        filter_tile=filter_tile,
        filter_tiles=filter_tiles,
        filter_warps=4,
        select_tile=max(block_size, 2048 if many else 1024),
        select_warps=16 if many else 8,
        attend_tile=attend_tile,
        attend_splits=splits,
        attend_warps=4,
        attend_stages=2 if many else 1,
        choose=max(256, min(8192, 32768 // padded(group))),
    )


def tiles_for_all(device: torch.device, *, head_dim: int, rows: int) -> Tiles:
    """Settings of :mod:`.attend` for ``rows`` queries that read their whole context: long streams, deeply pipelined."""
    tiles = tiles_for(device, head_dim=head_dim, group=1, rows=rows, n_slots=1, block_size=1, selected=1)
    if device.type != "cuda":
        return tiles
    splits = max(1, n_processors(device) // rows)
    # In float32 three stages of 64 keys and values of 256 channels take 283 KB of shared memory, and 32 of them 150
    tile = 64 if head_dim <= 128 else 32
    return tiles._replace(attend_tile=tile, attend_splits=splits, attend_warps=4, attend_stages=3)
