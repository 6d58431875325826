"""Label scores: of every block at level 1, of the kept blocks' tokens at level 2."""

from __future__ import annotations

import triton
import triton.language as tl

from .follow import prefetch
from .keep_best import make_key
from .labels import dot_codes, largest_dot, load_asked, load_codes
from .scatter import scatter
from .tuples import extended

# Level 2 reads more channels than level 1 normalised by: an exponent that float32 still holds
MOST: tl.constexpr = tl.constexpr(80.0)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Below every score
LEAST: tl.constexpr = tl.constexpr(-3e38)


@triton.jit
def _exp(x, NATIVE: tl.constexpr):
    """Exponential of float32 ``x``; 0 below 2^-126, which spares looking for such numbers: half of what it takes."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


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
            prefetch(codes + w * N * BLOCK_SIZE + slot)


@triton.jit
def score_blocks(
    codes, asked, base, unit, scores, norms, position, first, end, N, score_stride, scale,
    W: tl.constexpr, READ: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, STAGES: tl.constexpr, BLOCK_REDUCE: tl.constexpr, SOFTMAX: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scores of blocks ``first`` to ``end``, PER at a time, into [G, score_stride].

    With SOFTMAX ``norms`` [G, 2] gets each head's largest of them, and the sum of exponentials over it.
    """
    # Whether sums of products, and one far below all of them, are small integers
    SMALL: tl.constexpr = largest_dot(BITS, READ) <= 2**21
    UNSEEN: tl.constexpr = -(2**21) if SMALL else -(2**30)
    inside = tl.arange(0, BLOCK_SIZE)[None]
    weights, shifts, sizes = load_asked(asked, base, unit, 0, READ, W, BITS, GROUP)
    tops, totals = (), ()
    for _ in tl.static_range(GROUP if SOFTMAX else 0):
        tops = extended(tops, tl.full((PER,), LEAST, tl.float32))
        totals = extended(totals, tl.zeros((PER,), tl.float32))
    for start in tl.range(first, end, PER, num_stages=STAGES):
        block = start + tl.arange(0, PER)
        mine = block < end
        slot = block[:, None] * BLOCK_SIZE + inside
        seen = slot <= position
        # Whole blocks, so that the loads stay wide: what lies past the position is read, and dropped
        words = load_codes(codes, slot, mine[:, None], N * BLOCK_SIZE, READ)
        # Where sums start: far below any other for what the query does not see
        zero = tl.where(seen, 0, UNSEEN)
        new_tops, new_totals = (), ()
        for g in tl.static_range(GROUP):
            dot = dot_codes(words, weights, g, zero, READ, BITS, NATIVE)
            best = tl.max(dot, 1)
            score = (shifts[g] + sizes[g] * best.to(tl.float32)) * scale
            if BLOCK_REDUCE == "logsumexp":
                less = dot - best[:, None]
                less = _small_float(less) if SMALL else less.to(tl.float32)
                score += tl.log(tl.sum(tl.exp2(less * (sizes[g] * scale * LOG2E)), 1))
            # By the thread of a block's first token, which has it
            scatter(scores + g * score_stride + block[:, None] + tl.zeros_like(inside),
                    tl.broadcast_to(score[:, None], slot.shape), mine[:, None] & (inside == 0), NATIVE)  # fmt: skip
            if SOFTMAX:
                score = tl.where(mine, score, LEAST)
                top = tl.maximum(tops[g], score)
                more = tl.where(mine, _exp(score - top, NATIVE), 0.0)
                total = totals[g] * _exp(tops[g] - top, NATIVE) + more
                new_tops = extended(new_tops, top)
                new_totals = extended(new_totals, total)
        tops, totals = new_tops, new_totals
    if SOFTMAX:
        # All heads cross the threads at once
        top, total = _join(_stacked(tops, GROUP, PER), _stacked(totals, GROUP, PER), NATIVE)
        SHAPE: tl.constexpr = (PER, top.shape[0])
        g = tl.arange(0, SHAPE[1])[None]
        lane = tl.arange(0, PER)[:, None]
        one, at = (g < GROUP) & (lane == 0), norms + 2 * g + tl.zeros_like(lane)
        scatter(at, tl.broadcast_to(top[None], SHAPE), one, NATIVE)
        scatter(at + 1, tl.broadcast_to(total[None], SHAPE), one, NATIVE)


@triton.constexpr_function
def _halvings(n: int) -> int:
    """How often the next power of two can be halved."""
    return (n - 1).bit_length()


@triton.jit
def _stacked(columns, N: tl.constexpr, P: tl.constexpr):
    """N tensors [P] as one, [P, N]; the last of them again up to a power of two."""
    LEVELS: tl.constexpr = _halvings(N)
    for _ in tl.static_range(2**LEVELS - N):
        columns = extended(columns, columns[N - 1])
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            joined = extended(joined, tl.join(columns[i], columns[i + 2 ** (LEVELS - 1 - level)]))
        columns = joined
    return tl.reshape(columns[0], (P, 2**LEVELS))


@triton.jit
def _join(tops, totals, NATIVE: tl.constexpr):
    """Largest scores [P, ...] and sums of exponentials over them -> those of all P."""
    top = tl.max(tops, 0, keep_dims=True)
    total = tl.sum(totals * _exp(tops - top, NATIVE), 0)
    return tl.max(top, 0), total


@triton.jit
def join_norms(parts, norms, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, PP: tl.constexpr, NATIVE: tl.constexpr):
    """(tops, shares): a head's largest score, and 1 / (sum of exponentials over it * G); ``norms`` [G, 2] gets both.

    ``parts`` [PROGRAMS, G, 2] are those of a row's programs. A warp has those of all programs, and asks no other.
    """
    p = tl.arange(0, PP)
    their_tops, their_totals = (), ()
    for g in tl.static_range(GROUP):
        at = parts + (p * GROUP + g) * 2
        their_tops = extended(their_tops, tl.load(at, p < PROGRAMS, other=LEAST, cache_modifier=".cg"))
        their_totals = extended(their_totals, tl.load(at + 1, p < PROGRAMS, other=0.0, cache_modifier=".cg"))
    tops, shares = (), ()
    for g in tl.static_range(GROUP):
        top, total = _join(their_tops[g], their_totals[g], NATIVE)
        tops = extended(tops, top)
        # The largest score's own exponential is 1: less is of a query that sees nothing
        shares = extended(shares, 1 / (tl.maximum(total, 1.0) * GROUP))
        tl.store(norms + 2 * g, tops[g])
        tl.store(norms + 2 * g + 1, shares[g])
    return tops, shares


@triton.constexpr_function
def is_softmax(reduce: str) -> bool:
    """Whether ranks are shares of attention, which are never negative, and not raw scores."""
    return reduce in ("softmax_mean", "softmax_max")


@triton.jit
def _with_head(rank, weight, GROUP: tl.constexpr, REDUCE: tl.constexpr):
    """``rank`` of the heads so far with one more head's softmax, of which ``weight`` is the GROUP-th part."""
    return rank + weight if REDUCE == "softmax_mean" else tl.maximum(rank, weight * GROUP)


@triton.jit
def rank_blocks(scores, tops, shares, keys, first, end, position, sinks, recent, score_stride,
                GROUP: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, REDUCE: tl.constexpr,
                NATIVE: tl.constexpr):  # fmt: skip
    """Keys int16 of blocks ``first`` to ``end``, BN at a time."""
    POSITIVE: tl.constexpr = is_softmax(REDUCE)
    for start in range(first, end, BN):
        place = start + tl.arange(0, BN)
        mine = place < end
        rank = tl.full((BN,), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        for g in tl.static_range(GROUP):
            score = tl.load(scores + g * score_stride + place, mine, other=float("-inf"))
            if POSITIVE:
                rank = _with_head(rank, _exp(score - tops[g], NATIVE) * shares[g], GROUP, REDUCE)
            elif REDUCE == "max":
                rank = tl.maximum(rank, score)
            else:
                rank += score / GROUP
        first_token = place * BLOCK_SIZE
        forced = (first_token < sinks) | (first_token + BLOCK_SIZE - 1 > position - recent)
        key = make_key(rank, mine, forced, POSITIVE)
        tl.store(keys + place, key.to(tl.int16), mine)


@triton.jit
def rank_tokens(
    codes, asked, base, unit, norms, blocks, keys, position, sinks, recent, first, end, N, scale,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER: tl.constexpr,
    REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys int16 of the tokens of entries ``first`` to ``end`` of ``blocks``, PER blocks at a time."""
    POSITIVE: tl.constexpr = is_softmax(REDUCE)
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
            if POSITIVE:
                weight = _exp(tl.minimum(score - tl.load(norms + 2 * g), MOST), NATIVE) * tl.load(norms + 2 * g + 1)
                rank = _with_head(rank, weight, GROUP, REDUCE)
            elif REDUCE == "max":
                rank = tl.maximum(rank, score)
            else:
                rank += score / GROUP
        forced = (slot < sinks) | (slot > position - recent)
        key = make_key(rank, slot <= position, forced, POSITIVE)
        tl.store(keys + entry[:, None] * BLOCK_SIZE + inside, key.to(tl.int16), (entry < end)[:, None])
