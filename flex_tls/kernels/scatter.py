"""Masked stores that stay in their layout: ``tl.store`` would move everything to one that it takes for coalesced.

Which costs few values a barrier or two, and the program some hundred clocks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _store(width: int) -> str:
    """PTX that stores the lowest bits of a register where another one is not zero."""
    return f"{{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b{width} [$1], $2; mov.b32 $0, 0; }}"


@triton.jit
def scatter(pointers, value, mask, NATIVE: tl.constexpr):
    """``value``, of 8 or 32 bits and the pointers' dtype, where ``mask``; one of each for every pointer."""
    if NATIVE:
        WIDTH: tl.constexpr = value.dtype.primitive_bitwidth
        bits = value.to(tl.int32 if WIDTH == 32 else tl.int8, bitcast=True).to(tl.int32)
        tl.inline_asm_elementwise(
            _store(WIDTH), "=r,l,r,r", [pointers, bits, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.store(pointers, value, mask)


@triton.jit
def scatter_rows(pointer, row, value, mask, place, NATIVE: tl.constexpr):
    """``value`` [X], reduced over ``place`` [1, Y], to ``row`` [X] behind ``pointer`` where ``mask``.

    By the thread of a row's first place, which has it.
    """
    at = pointer + row[:, None] + tl.zeros_like(place)
    scatter(at, tl.broadcast_to(value[:, None], at.shape), mask[:, None] & (place == 0), NATIVE)
