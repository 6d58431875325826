"""Which selection a program works on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(seq_lens, n_heads, T):
    """The program's (row, head ``b * HKV + h``, position of the query token), row and head int64."""
    row = tl.program_id(1).to(tl.int64)
    head = row // T
    position = tl.load(seq_lens + head // n_heads).to(tl.int32) - T + (row % T).to(tl.int32)
    return row, head, position
