"""What the last program of a row does: choose from the keys that all of them wrote."""

from __future__ import annotations

import triton
import triton.language as tl

from flex_tls.kernels.keep_best import find_edge, load_words, write_list
from flex_tls.kernels.tiles import NATIVE, padded

# Candidates held in registers at once
CHUNK = 8192


@triton.jit
def choose(words, arrival, blocks, out, count, n, K, filler, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """If this is the row's last program: the K best of n keys (float16, of any sign) into ``out``."""
    tl.debug_barrier()
    if tl.atomic_add(arrival, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrival, 0)
        chunk_words = load_words(words, 0, n, BN)
        edge, ties = find_edge(chunk_words, words, n, K, False, BN, CHUNKS, NATIVE)
        kept = write_list(chunk_words, words, n, edge, ties, blocks, out, 0, K, filler, BN, CHUNKS, KP, BLOCK_SIZE,
                          TOKENS, NATIVE)  # fmt: skip
        tl.store(count, kept)


def chunk_of(n: int, warps: int) -> tuple[int, int]:
    """(candidates of one chunk, chunks): at least 8 a thread, which are counted four words at once."""
    chunk = min(padded(n, 256 * warps if NATIVE else 32), CHUNK)
    return chunk, -(-n // chunk)
