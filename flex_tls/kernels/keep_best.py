"""The k best of a row's candidates, exactly, ties to the lower place.

A candidate's key is 16 bits that order as float16 numbers do, -inf for what is never chosen, +inf for what always is.
No sort: the k-th largest key is searched by counting, two thresholds a round, two keys an instruction, some seven
rounds. What is chosen becomes bits, a row of up to 32 candidates to a word; a place in the list is a count of bits.

Candidates are taken BN at a time, two keys to a word, the lower one in the lower half. Those of the first chunk stay in
registers; more chunks are read from memory again in every round.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Bits of float16: an infinity, and its negative, as int32 twice in a word
ALWAYS: tl.constexpr = tl.constexpr(0x7C00)
NEVER: tl.constexpr = tl.constexpr(0xFC00)
NEVER_TWICE: tl.constexpr = tl.constexpr(0xFC00FC00 - 2**32)
# The float16 two below infinity: find_edge needs the one between
LARGEST: tl.constexpr = tl.constexpr(65472.0)
MANY: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def make_key(rank, alive, forced, POSITIVE: tl.constexpr):
    """Key, int32, of float32 ``rank``: rounded down to bfloat16 if never negative, to the nearest float16 if it may be.

    A share of attention can be tiny, and needs an exponent; a raw score needs digits.
    """
    if POSITIVE:
        key = tl.minimum(rank.to(tl.int32, bitcast=True) >> 16, ALWAYS - 2)
    else:
        rank = tl.minimum(tl.maximum(rank, -LARGEST), LARGEST)
        key = rank.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(alive, tl.where(forced, ALWAYS, key), NEVER)


@triton.jit
def load_words(words, chunk, n, BN: tl.constexpr):
    """Words [BN / 2] of one chunk of ``n`` keys; there is room for whole chunks."""
    place = chunk * (BN // 2) + tl.arange(0, BN // 2)
    word = tl.load(words + place)
    word = tl.where(place * 2 + 1 < n, word, (word & 0xFFFF) | (NEVER_TWICE & -65536))
    return tl.where(place * 2 < n, word, NEVER_TWICE)


@triton.jit
def _number(half):
    """16 bits of a float16 -> an integer that orders as they do."""
    return tl.where(half >= 0x8000, 0x8000 - half, half)


@triton.jit
def _twice(number):
    """Bits of the float16 that orders as ``number``, in both halves of a word."""
    half = tl.where(number < 0, 0x8000 - number, number)
    return half | (half << 16)


@triton.jit
def _each(words, threshold):
    """How many of a word's two keys are at least ``threshold``."""
    low, high = _number(words & 0xFFFF), _number((words >> 16) & 0xFFFF)
    return (low >= threshold).to(tl.int32) + (high >= threshold).to(tl.int32)


@triton.jit
def _count(words, low, high, NATIVE: tl.constexpr):
    """How many keys of a chunk, fewer than 2**15, reach each of two thresholds: ``low``'s + ``high``'s << 16.

    In one integer: a sum of those crosses a warp in one instruction (redux), a pair of sums takes ten shuffles.
    """
    if NATIVE:
        # Four words at once. Half-precision counters that begin at 1024: their lowest bits are the count
        some = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, t;
            mov.b32 a, 0x64006400; mov.b32 b, a;
            set.ge.f16x2.f16x2 t, $4, $8; add.f16x2 a, a, t;
            set.ge.f16x2.f16x2 t, $4, $12; add.f16x2 b, b, t;
            set.ge.f16x2.f16x2 t, $5, $8; add.f16x2 a, a, t;
            set.ge.f16x2.f16x2 t, $5, $12; add.f16x2 b, b, t;
            set.ge.f16x2.f16x2 t, $6, $8; add.f16x2 a, a, t;
            set.ge.f16x2.f16x2 t, $6, $12; add.f16x2 b, b, t;
            set.ge.f16x2.f16x2 t, $7, $8; add.f16x2 a, a, t;
            set.ge.f16x2.f16x2 t, $7, $12; add.f16x2 b, b, t;
            and.b32 a, a, 0x00FF00FF; shr.u32 t, a, 16; add.u32 a, a, t; and.b32 a, a, 0xFF;
            and.b32 b, b, 0x00FF00FF; shl.b32 t, b, 16; add.u32 b, b, t; and.b32 b, b, 0x00FF0000;
            or.b32 $0, a, b;
            mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, _twice(low), _twice(high)], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        some = _each(words, low) + (_each(words, high) << 16)
    return tl.sum(some, 0)


@triton.jit
def find_edge(words, more_words, n, k,
              POSITIVE: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """(edge, ties): the k best of n keys are those above ``edge``, and the first ``ties`` of those at it.

    ``words``: the first chunk; the others are read from ``more_words``. Fewer than k keys that may be chosen all are.
    """
    edge = tl.full((), 0 if POSITIVE else 1 - ALWAYS, tl.int32)
    # No key is one below ALWAYS: so none ties there, where nothing was counted yet
    beyond = tl.full((), ALWAYS, tl.int32)
    reached = tl.full((), MANY, tl.int32)
    above = tl.full((), 0, tl.int32)
    # Where edges lie: shares of attention between 2^-20 and 2^-10, scores between 1 and 16
    low = tl.full((), 0x3580 if POSITIVE else 0x3C00, tl.int32)
    high = tl.full((), 0x3A80 if POSITIVE else 0x4C00, tl.int32)
    while (reached != k) & (beyond > edge + 1):
        some = _count(words, low, high, NATIVE)
        n_low, n_high = some & 0xFFFF, some >> 16
        for chunk in range(1, CHUNKS):
            some = _count(load_words(more_words, chunk, n, BN), low, high, NATIVE)
            n_low, n_high = n_low + (some & 0xFFFF), n_high + (some >> 16)
        above = tl.where(n_high >= k, above, tl.where(n_low >= k, n_high, n_low))
        beyond = tl.where(n_high >= k, beyond, tl.where(n_low >= k, high, low))
        reached = tl.where(n_high >= k, n_high, tl.where(n_low >= k, n_low, reached))
        edge = tl.where(n_high >= k, high, tl.where(n_low >= k, low, edge))
        third = tl.maximum((beyond - edge) // 3, 1)
        low, high = edge + third, beyond - third
    # Where fewer than k are above the lowest edge, all of them are wanted, and all at it that there are
    return edge, tl.where(reached == k, MANY, k - above)


@triton.jit
def _ones(word, NATIVE: tl.constexpr):
    """How many bits of int32 ``word`` are set."""
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _marks(words, edge, NATIVE: tl.constexpr):
    """(above the edge, at it): bits 0 and 1 for the lower and the upper key of each word."""
    if NATIVE:
        # 1.0 is 0x3C00: bits 10 and 26 say whether it is
        above, tied = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u;
            set.gt.f16x2.f16x2 t, $2, $3; shr.u32 u, t, 25; shr.u32 t, t, 10; lop3.b32 t, t, 1, 0, 0xC0;
            lop3.b32 $0, u, 2, t, 0xEA;
            set.eq.f16x2.f16x2 t, $2, $3; shr.u32 u, t, 25; shr.u32 t, t, 10; lop3.b32 t, t, 1, 0, 0xC0;
            lop3.b32 $1, u, 2, t, 0xEA;
            }""",
            "=&r,=&r,r,r", [words, _twice(edge)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return above, tied
    low, high = _number(words & 0xFFFF), _number((words >> 16) & 0xFFFF)
    above = (low > edge).to(tl.int32) | ((high > edge).to(tl.int32) << 1)
    return above, (low == edge).to(tl.int32) | ((high == edge).to(tl.int32) << 1)


@triton.jit
def _first_bits(word, n, NATIVE: tl.constexpr):
    """The lowest ``n`` set bits of each word; few words have more than n, which is at least 0, and some."""
    word = tl.where(n == 0, 0, word)
    if NATIVE:
        # A thread goes round as often as its own words have bits to lose
        return tl.inline_asm_elementwise(
            """{
            .reg .pred done; .reg .b32 word, ones, top;
            mov.b32 word, $1; popc.b32 ones, word;
            LOOP:
            setp.le.s32 done, ones, $2; @done bra DONE;
            bfind.u32 top, word; shl.b32 top, 1, top; xor.b32 word, word, top; sub.s32 ones, ones, 1; bra LOOP;
            DONE:
            mov.b32 $0, word;
            }""",
            "=&r,r,r", [word, n], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    extra = tl.maximum(_ones(word, NATIVE) - n, 0)
    for _ in range(tl.max(extra, 0)):
        below = word.to(tl.uint32, bitcast=True)
        below |= below >> 1
        below |= below >> 2
        below |= below >> 4
        below |= below >> 8
        below |= below >> 16
        word = tl.where(extra > 0, word & (below >> 1).to(tl.int32, bitcast=True), word)
        extra -= 1
    return word


@triton.jit
def _write_bits(chosen, where, value, out, first, end, NATIVE: tl.constexpr):
    """``value`` + each set bit's number to ``out`` at ``where`` and on, as far as that is from ``first`` to ``end``.

    chosen, where and value int32 [rows]. Most rows have nothing there, and their threads nothing to do.
    """
    if NATIVE:
        tl.inline_asm_elementwise(
            """{
            .reg .pred done, mine; .reg .b32 bits, place, bit; .reg .b64 at;
            mov.b32 bits, $2; mov.b32 place, $3; popc.b32 bit, bits; add.s32 bit, bit, place;
            setp.le.s32 done, bit, $5; @done bra DONE;
            LOOP:
            setp.eq.b32 done, bits, 0; @done bra DONE;
            setp.ge.s32 done, place, $6; @done bra DONE;
            brev.b32 bit, bits; bfind.shiftamt.u32 bit, bit; add.s32 bit, bit, $4;
            setp.ge.s32 mine, place, $5; mad.wide.s32 at, place, 4, $1; @mine st.global.b32 [at], bit;
            sub.s32 bit, bits, 1; and.b32 bits, bits, bit; add.s32 place, place, 1; bra LOOP;
            DONE:
            mov.b32 $0, 0;
            }""",
            "=&r,l,r,r,r,r,r", [out, chosen, where, value, first, end], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        for bit in tl.static_range(32):
            place = where + _ones(chosen & ((1 << bit) - 1), NATIVE)
            tl.store(out + place, value + bit, (((chosen >> bit) & 1) != 0) & (place >= first) & (place < end))


@triton.jit
def _write_chunk(words, chunk, edge, ties, n_above, n_tied, blocks, out, n, first, end,
                 BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """One chunk's entries of the list, behind ``n_above`` and ``n_tied`` keys of other chunks; both counts after it."""
    # A row lies in one block, whose number is asked for first: it is a long way
    ROW: tl.constexpr = min(32, BLOCK_SIZE) if TOKENS else 32
    start = chunk * BN + tl.arange(0, BN // ROW) * ROW
    value = start
    if TOKENS:
        block = tl.load(blocks + start // BLOCK_SIZE, start < n, other=0, cache_modifier=".cg")
        value = block * BLOCK_SIZE + start % BLOCK_SIZE
    above, tied = _marks(tl.reshape(words, (BN // ROW, ROW // 2)), edge, NATIVE)
    i = tl.arange(0, ROW // 2)[None] * 2
    above, tied = tl.sum(above << i, 1), tl.sum(tied << i, 1)
    count = _ones(above, NATIVE) | (_ones(tied, NATIVE) << 16)
    before = tl.cumsum(count, 0) - count
    tied_before = n_tied + (before >> 16)
    chosen = above | _first_bits(tied, tl.maximum(ties - tied_before, 0), NATIVE)
    where = n_above + (before & 0xFFFF) + tl.minimum(tied_before, ties)
    _write_bits(chosen, where, value, out, first, end, NATIVE)
    total = tl.sum(count, 0)
    return n_above + (total & 0xFFFF), n_tied + (total >> 16)


@triton.jit
def write_list(words, more_words, n, edge, ties, blocks, out, first, end, filler,
               BN: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
               TOKENS: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Write entries ``first`` to ``end`` of the ascending list of what is chosen; returns how many are.

    An entry is a candidate's place or, with TOKENS, its slot: candidates are then the tokens of ``blocks``. Entries
    past the count get ``filler``. WIDTH: at least ``end - first``, a power of two.
    """
    above, tied = _write_chunk(words, 0, edge, ties, 0, 0, blocks, out, n, first, end, BN, BLOCK_SIZE, TOKENS, NATIVE)
    for chunk in range(1, CHUNKS):
        above, tied = _write_chunk(load_words(more_words, chunk, n, BN), chunk, edge, ties, above, tied, blocks, out, n,
                                   first, end, BN, BLOCK_SIZE, TOKENS, NATIVE)  # fmt: skip
    kept = above + tl.minimum(tied, ties)
    entry = first + tl.arange(0, WIDTH)
    tl.store(out + entry, tl.zeros((WIDTH,), tl.int32) + filler, (entry >= kept) & (entry < end))
    return kept
