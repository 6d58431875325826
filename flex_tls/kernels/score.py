"""Label scores: of every block at level 1, of the kept blocks' tokens at level 2."""

from __future__ import annotations

import triton
import triton.language as tl

from .keep_best import make_key, pair
from .labels import dot_codes, largest_dot, load_asked, load_codes

# Level 2 reads more channels than level 1 normalised by: an exponent that float32 still holds
MOST: tl.constexpr = tl.constexpr(80.0)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _small_float(x):
    """float32 of int32 ``x`` within 2^22: added to the digits of 1.5 * 2^23. A conversion takes four times as long."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def prefetch_labels(codes, first, end, N, READ: tl.constexpr, BLOCK_SIZE: tl.constexpr, LINES: tl.constexpr):
    """Let the labels of blocks ``first`` to ``end`` come to the L2 cache while other things are done."""
    for start in range(first * BLOCK_SIZE, end * BLOCK_SIZE, LINES * 32):
        # 32 words are a line of 128 bytes
        slot = tl.minimum(start + tl.arange(0, LINES) * 32, end * BLOCK_SIZE - 1)
        for w in tl.static_range(READ):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [codes + w * N * BLOCK_SIZE + slot],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def score_blocks(
    codes, asked, base, unit, scores, position, first, end, N, score_stride, scale,
    W: tl.constexpr, READ: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, STAGES: tl.constexpr, BLOCK_REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scores of blocks ``first`` to ``end``, PER at a time, into [G, score_stride]."""
    # Whether sums of products, and one far below all of them, are small integers
    SMALL: tl.constexpr = largest_dot(BITS, READ) <= 2**21
    UNSEEN: tl.constexpr = -(2**21) if SMALL else -(2**30)
    weights, shifts, sizes = load_asked(asked, base, unit, 0, READ, W, BITS, GROUP)
    for start in tl.range(first, end, PER, num_stages=STAGES):
        block = start + tl.arange(0, PER)
        slot = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None]
        seen = slot <= position
        # Whole blocks, so that the loads stay wide: what lies past the position is read, and dropped
        words = load_codes(codes, slot, (block < end)[:, None], N * BLOCK_SIZE, READ)
        # Where sums start: far below any other for what the query does not see
        zero = tl.where(seen, 0, UNSEEN)
        for g in tl.static_range(GROUP):
            dot = dot_codes(words, weights, g, zero, READ, BITS, NATIVE)
            best = tl.max(dot, 1)
            score = (shifts[g] + sizes[g] * best.to(tl.float32)) * scale
            if BLOCK_REDUCE == "logsumexp":
                less = dot - best[:, None]
                less = _small_float(less) if SMALL else less.to(tl.float32)
                score += tl.log(tl.sum(tl.exp2(less * (sizes[g] * scale * LOG2E)), 1))
            tl.store(scores + g * score_stride + block, score, block < end)


@triton.jit
def _max4(a, b, c, d, e, f, g, h):
    return tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)


@triton.jit
def _sum4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _four(scores, chunk, n, score_stride, HEADS: tl.constexpr, BN: tl.constexpr):
    """Scores [BN] of four heads, of which HEADS or fewer are there; -inf past the last."""
    place = chunk * BN + tl.arange(0, BN)
    none = tl.full((BN,), float("-inf"), tl.float32)
    a, b, c, d = none, none, none, none
    # Read whole and then masked, garbage and all: a mask by place would make wide loads narrow
    a = tl.where(place < n, tl.load(scores + place), none)
    if HEADS > 1:
        b = tl.where(place < n, tl.load(scores + score_stride + place), none)
    if HEADS > 2:
        c = tl.where(place < n, tl.load(scores + 2 * score_stride + place), none)
    if HEADS > 3:
        d = tl.where(place < n, tl.load(scores + 3 * score_stride + place), none)
    return a, b, c, d


@triton.jit
def _four_tops(a, b, c, d):
    """Each head's largest score; where it sees nothing any number but -inf."""
    a, b, c, d = tl.reduce((a, b, c, d), 0, _max4)
    return tl.maximum(a, -3e38), tl.maximum(b, -3e38), tl.maximum(c, -3e38), tl.maximum(d, -3e38)


@triton.jit
def _four_totals(a, b, c, d, tops):
    """Each head's sum of exponentials."""
    weights = (tl.exp(a - tops[0]), tl.exp(b - tops[1]), tl.exp(c - tops[2]), tl.exp(d - tops[3]))
    return tl.reduce(weights, 0, _sum4)


@triton.jit
def _four_softmax(scores, n, score_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
                  CHUNKS: tl.constexpr):  # fmt: skip
    """Of four heads: the largest score, and 1 / (sum of exponentials over it * GROUP)."""
    first = _four(scores, 0, n, score_stride, HEADS, BN)
    a, b, c, d = _four_tops(first[0], first[1], first[2], first[3])
    for chunk in range(1, CHUNKS):
        more = _four(scores, chunk, n, score_stride, HEADS, BN)
        more = _four_tops(more[0], more[1], more[2], more[3])
        a, b, c, d = _max4(a, b, c, d, more[0], more[1], more[2], more[3])
    e, f, g, h = _four_totals(first[0], first[1], first[2], first[3], (a, b, c, d))
    for chunk in range(1, CHUNKS):
        other = _four(scores, chunk, n, score_stride, HEADS, BN)
        other = _four_totals(other[0], other[1], other[2], other[3], (a, b, c, d))
        e, f, g, h = _sum4(e, f, g, h, other[0], other[1], other[2], other[3])
    return (a, b, c, d), (_share(e, GROUP), _share(f, GROUP), _share(g, GROUP), _share(h, GROUP))


@triton.jit
def _share(total, GROUP: tl.constexpr):
    return 1 / (tl.maximum(total, 1e-37) * GROUP)


@triton.jit
def _block_keys(scores, chunk, tops, shares, n, position, sinks, recent, score_stride,
                GROUP: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, REDUCE: tl.constexpr):  # fmt: skip
    """Keys int32 [BN] of one chunk's blocks."""
    place = chunk * BN + tl.arange(0, BN)
    rank = tl.full((BN,), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
    for g in tl.static_range(GROUP):
        score = tl.where(place < n, tl.load(scores + g * score_stride + place), float("-inf"))
        if REDUCE == "softmax_mean":
            rank += tl.exp(score - tops[g]) * shares[g]
        elif REDUCE == "max":
            rank = tl.maximum(rank, score)
        else:
            rank += score / GROUP
    first = place * BLOCK_SIZE
    forced = (first < sinks) | (first + BLOCK_SIZE - 1 > position - recent)
    return make_key(rank, place < n, forced, REDUCE == "softmax_mean")


@triton.jit
def rank_blocks(scores, norms, words, n, position, sinks, recent, score_stride,
                GROUP: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                REDUCE: tl.constexpr):  # fmt: skip
    """Keys of the row's ``n`` blocks, in words: the first chunk's are returned, the others are in ``words``.

    ``norms`` float32 [G, 2] gets what a head's softmax takes: its largest score, and 1 / (sum of exponentials * G).
    """
    tops = ()
    shares = ()
    if REDUCE == "softmax_mean":
        # Four heads cross the threads at once
        for first in tl.static_range(0, GROUP, 4):
            top, share = _four_softmax(
                scores + first * score_stride, n, score_stride, GROUP - first, GROUP, BN, CHUNKS
            )  # fmt: skip
            tops = tops + top
            shares = shares + share
        for g in tl.static_range(GROUP):
            tl.store(norms + 2 * g, tops[g])
            tl.store(norms + 2 * g + 1, shares[g])
    for chunk in range(1, CHUNKS):
        key = _block_keys(scores, chunk, tops, shares, n, position, sinks, recent, score_stride,
                          GROUP, BN, BLOCK_SIZE, REDUCE)  # fmt: skip
        tl.store(words + chunk * (BN // 2) + tl.arange(0, BN // 2), pair(key, BN))
    key = _block_keys(scores, 0, tops, shares, n, position, sinks, recent, score_stride, GROUP, BN, BLOCK_SIZE, REDUCE)
    if CHUNKS > 1:
        tl.debug_barrier()
    return pair(key, BN)


@triton.jit
def rank_tokens(
    codes, asked, base, unit, norms, blocks, keys, position, sinks, recent, first, end, N, scale,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER: tl.constexpr,
    REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys int16 of the tokens of entries ``first`` to ``end`` of ``blocks``, PER blocks at a time."""
    weights, shifts, sizes = load_asked(asked, base, unit, 1, W, W, BITS, GROUP)
    for start in tl.range(first, end, PER, num_stages=1):
        entry = start + tl.arange(0, PER)
        # Padding entries of the block list lie past the last slot, and so past the position
        block = tl.load(blocks + entry, entry < end, other=N)
        inside = tl.arange(0, BLOCK_SIZE)[None]
        slot = block[:, None] * BLOCK_SIZE + inside
        words = load_codes(codes, slot, (block < N)[:, None], N * BLOCK_SIZE, W)
        rank = tl.full((PER, BLOCK_SIZE), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        for g in tl.static_range(GROUP):
            dot = dot_codes(words, weights, g, tl.zeros_like(words[0]), W, BITS, NATIVE)
            score = (shifts[g] + sizes[g] * dot.to(tl.float32)) * scale
            if REDUCE == "softmax_mean":
                rank += tl.exp(tl.minimum(score - tl.load(norms + 2 * g), MOST)) * tl.load(norms + 2 * g + 1)
            elif REDUCE == "max":
                rank = tl.maximum(rank, score)
            else:
                rank += score / GROUP
        forced = (slot < sinks) | (slot > position - recent)
        key = make_key(rank, slot <= position, forced, REDUCE == "softmax_mean")
        tl.store(keys + entry[:, None] * BLOCK_SIZE + inside, key.to(tl.int16), (entry < end)[:, None])
