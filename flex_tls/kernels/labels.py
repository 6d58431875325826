"""Packed label codes, and their integer dot products with a query's 8-bit channels.

A label is W words of 32 bits; BITS, a tuple, are those of a channel in each word, 2, 4 or 8, lowest bits first. To
multiply four channels at once a word is shifted right, by 0 to 7 bits in steps of a channel's: its *parts*. Byte i of
part j of a word is its channel ``i * 8 / bits + j``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tuples import extended


@triton.constexpr_function
def places_of(bits: tuple[int, ...]) -> int:
    """Places that each word gets where channels of all words lie in one row: as many as the fullest word has."""
    return 32 // min(bits)


@triton.constexpr_function
def is_uniform(bits: tuple[int, ...]) -> bool:
    """Whether every word holds equally many channels."""
    return min(bits) == max(bits)


@triton.constexpr_function
def channels_before(bits: tuple[int, ...], word: int) -> int:
    """Channels in the words ahead of this one."""
    return sum(32 // b for b in bits[:word])


@triton.constexpr_function
def parts_before(bits: tuple[int, ...], word: int) -> int:
    """Parts of the words ahead of this one."""
    return sum(8 // b for b in bits[:word])


@triton.constexpr_function
def largest_dot(bits: tuple[int, ...], n: int) -> int:
    """Twice what the products of the codes in ``n`` words sum to at most."""
    return sum(32 // b * (2**b - 1) * 254 for b in bits[:n])


@triton.jit
def locate_channels(place, BITS: tl.constexpr, W: tl.constexpr):
    """Where the channels of a label are, in rows of :func:`places_of` places, the same number for each word.

    place int32 [P] -> (channel, its bits, where they begin in its word), int32 [P], and whether it is in a word.
    """
    PLACES: tl.constexpr = places_of(BITS)
    word, within = place // PLACES, place % PLACES
    if is_uniform(BITS):
        # Neighbouring places are neighbouring channels, for all that the compiler knows too
        return place, tl.zeros_like(place) + BITS[0], within * BITS[0], word < W
    before, bits = tl.zeros_like(place), tl.full(place.shape, 8, tl.int32)
    for w in tl.static_range(W):
        before = tl.where(word == w, channels_before(BITS, w), before)
        bits = tl.where(word == w, BITS[w], bits)
    in_word = (word < W) & (within * bits < 32)
    # A shift by more than a word holds is undefined: its result may be anything, even of a code that is 0
    return before + within, bits, tl.where(in_word, within * bits, 0), in_word


@triton.jit
def locate_bytes(place, bits, BITS: tl.constexpr, W: tl.constexpr):
    """Of a query's bytes, [parts, 4], those of the channels in rows as in :func:`locate_channels`; int32 [P]."""
    PLACES: tl.constexpr = places_of(BITS)
    word, within = place // PLACES, place % PLACES
    part = tl.zeros_like(place)
    for w in tl.static_range(W):
        part = tl.where(word == w, parts_before(BITS, w), part)
    n_parts = 8 // bits
    return (part + within % n_parts) * 4 + within // n_parts


@triton.jit
def pack_codes(code, shift, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Codes float32 [ROWS, P] of channels, in rows as in :func:`locate_channels`, as words int32 [ROWS, P / places]."""
    PLACES: tl.constexpr = places_of(BITS)
    code = code.to(tl.int32) << shift[None]
    # Channels share no bit: their sum is their union
    return tl.sum(tl.reshape(code, (ROWS, code.shape[1] // PLACES, PLACES)), 2)


@triton.jit
def quantise_codes(x, bits):
    """Label channels float32 [ROWS, P], one half added, as whole numbers that ``bits`` int32 [P] hold."""
    most = ((1 << bits) - 1).to(tl.float32)
    return tl.minimum(tl.maximum(tl.floor(x), 0.0), most[None])


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
        words = extended(words, tl.load(codes + w * stride + slot, mask, other=0))
    return words


@triton.jit
def load_asked(asked, base, unit, which, READ: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """What queries ask, as scalars, outside of any loop: (parts of READ words, base ``which``, unit)."""
    parts, bases, units = (), (), ()
    for g in tl.static_range(GROUP):
        for part in tl.static_range(parts_before(BITS, READ)):
            parts = extended(parts, tl.load(asked + g * parts_before(BITS, W) + part))
        bases = extended(bases, tl.load(base + 2 * g + which))
        units = extended(units, tl.load(unit + g))
    return parts, bases, units


@triton.jit
def dot_codes(words, asked, g: tl.constexpr, total, READ: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """``total`` int32 [X, Y] + head ``g`` of ``asked``, from :func:`load_asked`, times the codes in ``words``."""
    for w in tl.static_range(READ):
        for j in tl.static_range(8 // BITS[w]):
            part = asked[g * parts_before(BITS, READ) + parts_before(BITS, w) + j]
            # As a signed 32-bit number
            codes = words[w] if BITS[w] == 8 else (words[w] >> (BITS[w] * j)) & ((2 ** BITS[w] - 1) * 0x01010101)
            total = dot4(codes, tl.zeros_like(words[0]) + part, total, NATIVE)
    return total


@triton.jit
def dot_keys(codes, slot, mask, stride, q, q_stride_h, D: tl.constexpr, GROUP: tl.constexpr):
    """Labels that are the keys themselves, float32, times the heads at ``q``: a tuple of float32 [X, Y]."""
    dots = ()
    for _ in tl.static_range(GROUP):
        dots = extended(dots, tl.zeros(slot.shape, tl.float32))
    for d in range(D):
        key = tl.load(codes + d * stride + slot, mask, other=0.0)
        more = ()
        for g in tl.static_range(GROUP):
            more = extended(more, dots[g] + tl.load(q + g * q_stride_h + d).to(tl.float32) * key)
        dots = more
    return dots
