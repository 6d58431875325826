"""Integer dot products of a query's 8-bit channels with packed label codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot4(a, b, total, NATIVE: tl.constexpr):
    """``total`` + the four unsigned bytes of int32 ``a`` times the four signed bytes of int32 ``b``."""
    if NATIVE:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((a >> (8 * i)) & 0xFF) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def load_codes(codes, slot, mask, stride, READ: tl.constexpr):
    """The first READ words of the codes of ``slot`` [X, Y]: a tuple, so that a thread holds all words of its tokens."""
    words = ()
    for w in tl.static_range(READ):
        words = words + (tl.load(codes + w * stride + slot, mask, other=0),)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    return words


@triton.jit
def load_asked(asked, base, unit, which, READ: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """What queries ask, as scalars, outside of any loop: (words (g, j, w), base ``which`` (g), unit (g))."""
    SUB: tl.constexpr = 8 // BITS
    words, bases, units = (), (), ()
    for g in tl.static_range(GROUP):
        for j in tl.static_range(SUB):
            for w in tl.static_range(READ):
                words = words + (tl.load(asked + (g * SUB + j) * W + w),)  # type: ignore[assignment]  # noqa: RUF005
        bases = bases + (tl.load(base + 2 * g + which),)  # type: ignore[assignment]  # noqa: RUF005
        units = units + (tl.load(unit + g),)  # type: ignore[assignment]  # noqa: RUF005
    return words, bases, units


@triton.jit
def dot_codes(words, asked, g: tl.constexpr, total, READ: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """``total`` int32 [X, Y] + head ``g`` of ``asked``, from :func:`load_asked`, times the codes in ``words``."""
    SUB: tl.constexpr = 8 // BITS
    # As a signed 32-bit number
    MASK: tl.constexpr = (2**BITS - 1) * 0x01010101 if BITS < 8 else -1
    for w in tl.static_range(READ):
        for j in tl.static_range(SUB):
            weight = tl.zeros_like(words[0]) + asked[(g * SUB + j) * READ + w]
            total = dot4((words[w] >> (BITS * j)) & MASK, weight, total, NATIVE)
    return total
