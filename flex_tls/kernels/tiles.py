"""Tile settings: what they are, and the rule by which they are chosen where nothing was measured."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

# Whether kernels are compiled, not interpreted (TRITON_INTERPRET=1): decided when they are defined
NATIVE: bool = not triton.knobs.runtime.interpret
# That share a row, by the rule
MOST_PROGRAMS = 16
# A tile of labels takes as long as its tokens and these
TILE_TOKENS = 256


class Tiles(NamedTuple):
    """How a kernel's work is cut, and how many loads of a pipelined loop are under way (stages).

    Attributes:
        programs: that share a row.
        warps: of a program.
        score_words, score_stages: words of labels that level 1 takes at once.
        rank_words: words of labels that level 2 takes at once.
        attend_tile, attend_stages: tokens gathered at once.
        choose: candidates that a program holds while it chooses; more are taken in chunks.
    """

    programs: int
    warps: int
    score_words: int
    score_stages: int
    rank_words: int
    attend_tile: int
    attend_stages: int
    choose: int

    def chunk(self, n: int) -> tuple[int, int]:
        """(candidates of one chunk, chunks) for ``n``: at least 8 a thread, which are counted four words at once.

        Several chunks are halved, once, where the last one would be less than half full.
        """
        least = 256 * self.warps if NATIVE else 32
        size = min(padded(n, least), self.choose)
        if size < n and 2 * (-n % size) > size > least:
            size //= 2
        return size, -(-n // size)

    def blocks_of(self, words: int, of_label: int, block_size: int, n: int) -> int:
        """Blocks that a program takes at once of its share of ``n``; a power of two, at least two tokens a thread.

        At most those whose labels, ``of_label`` words each, are some ``words`` in all; fewer where the last of such
        tiles would be idle for longer than more tiles take.
        """
        most, share = max(1, words // (padded(of_label) * block_size)), -(-n // self.programs)
        sizes = [most >> i for i in range(most.bit_length()) if i == 0 or (most >> i) * block_size >= 64 * self.warps]
        return min(sizes, key=lambda size: -(-share // size) * (size * block_size + TILE_TOKENS))

    def summaries_of(self, width: int, n: int) -> int:
        """Blocks whose summaries, ``width`` channels of two numbers, a program takes at once of its share of ``n``."""
        return min(padded(-(-n // self.programs)), max(1, self.score_words // (2 * width)))


# On small shapes: several tiles, programs and chunks all the same
INTERPRETED = Tiles(2, 4, 128, 1, 64, 16, 1, 128)


def padded(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, int(triton.next_power_of_2(n)))


@cache
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def rule(processors: int, *, head_bytes: int, rows: int) -> Tiles:
    """Settings for ``rows`` selections where nothing was measured, by hand: of :mod:`.two_level`.

    ``head_bytes``: of one key. The programs of a row wait for one another, so all of them must run at once: at most one
    a processor.
    """
    programs = max(1, min(MOST_PROGRAMS, processors // rows))
    return Tiles(
        programs=programs,
        warps=8,
        score_words=8192,
        score_stages=3,
        rank_words=2048 if programs > 1 else 8192,
        # Two stages of keys and values of 32 KiB each are 128 KiB of shared memory
        attend_tile=min(64 if programs > 1 else 128, max(16, 2**15 // padded(head_bytes))),
        attend_stages=2,
        choose=16384,
    )


def tiles_for_all(device: torch.device, *, head_bytes: int, rows: int) -> Tiles:
    """Settings of :mod:`.attend` for ``rows`` queries that read their whole context: long streams, deeply pipelined."""
    if device.type != "cuda":
        return INTERPRETED
    processors = n_processors(device)
    # Three stages of 32 keys and values of 1 KiB take 150 KB of shared memory, and 64 of them 283
    tile = 64 if head_bytes <= 512 else 32
    tiles = rule(processors, head_bytes=head_bytes, rows=rows)
    return tiles._replace(programs=max(1, processors // rows), attend_tile=tile, warps=4, attend_stages=3)
