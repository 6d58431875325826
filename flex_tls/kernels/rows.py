"""Rows: which selection a program works on, and how the programs of a row wait for one another."""

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


@triton.jit
def query_of(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, GROUP: tl.constexpr):
    """Where the row's query token lies in q [B, HQ, T, D]: its first head, the others are ``q_stride_h`` apart."""
    return q + head // n_heads * q_stride_b + head % n_heads * GROUP * q_stride_h + row % T * q_stride_t


@triton.jit
def share(n, PROGRAMS: tl.constexpr):
    """Which of ``n`` things of its row are the program's: from, up to."""
    per = tl.cdiv(n, PROGRAMS)
    first = tl.program_id(0) * per
    return first, tl.minimum(n, first + per)


@triton.jit
def meet(counter, PROGRAMS: tl.constexpr, TIMES: tl.constexpr = 1):
    """Wait until every program of the row is here; what each of them wrote is then there for all of them.

    All programs of the row must be running at once. One program has nobody to wait for but its own threads. TIMES: 2
    where they meet at the same counter a second time.
    """
    tl.debug_barrier()
    if PROGRAMS > 1:
        tl.atomic_add(counter, 1, sem="release")
        # Every thread looks for itself, and so sees what the others released
        while tl.inline_asm_elementwise("ld.acquire.gpu.global.u32 $0, [$1];", "=r,l", [counter],
                                        dtype=tl.int32, is_pure=False, pack=1) < TIMES * PROGRAMS:  # fmt: skip
            pass


@triton.jit
def leave(counters, stride, PROGRAMS: tl.constexpr):
    """The last of a row's programs to come here sets the row's three counters to zero again."""
    if PROGRAMS > 1:
        tl.debug_barrier()
        if tl.atomic_add(counters + 2 * stride, 1, sem="acq_rel") == PROGRAMS - 1:
            tl.store(counters, 0)
            tl.store(counters + stride, 0)
            tl.store(counters + 2 * stride, 0)
