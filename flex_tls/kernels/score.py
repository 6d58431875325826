"""Label scores: of every block at level 1, of the kept blocks' tokens at level 2."""

from __future__ import annotations

import triton
import triton.language as tl

from .follow import prefetch
from .keep_best import make_key
from .labels import dot_codes, dot_keys, largest_dot, load_asked, load_codes
from .norms import LEAST, LOG2E, exp, is_softmax, no_norms, store_norms, with_score
from .scatter import scatter_rows
from .tuples import extended
from .visible import is_visible

# Level 2 reads more channels than level 1 normalised by: an exponent that float32 still holds
MOST: tl.constexpr = tl.constexpr(80.0)


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
    q, codes, asked, base, unit, visible, scores, norms, position, first, end, N, q_stride_h, visible_stride,
    score_stride, scale,
    W: tl.constexpr, READ: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, STAGES: tl.constexpr, BLOCK_REDUCE: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
    SOFTMAX: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scores of blocks ``first`` to ``end``, PER at a time, into [G, score_stride].

    With SOFTMAX ``norms`` [G, 2] gets each head's largest of them, and the sum of exponentials over it. With EXACT
    codes are keys, float32 [W, N * block_size], scored by the heads at ``q``; nothing is asked. With MASKED a head sees
    what ``visible`` [G, visible_stride] says, and a block of which it sees nothing scores -inf.
    """
    # Whether sums of products, and one far below all of them, are small integers
    SMALL: tl.constexpr = largest_dot(BITS, READ) <= 2**21
    UNSEEN: tl.constexpr = -(2**21) if SMALL else -(2**30)
    inside = tl.arange(0, BLOCK_SIZE)[None]
    if not EXACT:
        weights, shifts, sizes = load_asked(asked, base, unit, 0, READ, W, BITS, GROUP)
    tops, totals = no_norms(PER, GROUP if SOFTMAX else 0)
    for start in tl.range(first, end, PER, num_stages=STAGES):
        block = start + tl.arange(0, PER)
        mine = block < end
        slot = block[:, None] * BLOCK_SIZE + inside
        seen = slot <= position
        # Whole blocks, so that the loads stay wide: what lies past the position is read, and dropped
        if EXACT:
            dots = dot_keys(codes, slot, mine[:, None], N * BLOCK_SIZE, q, q_stride_h, W, GROUP)
        else:
            words = load_codes(codes, slot, mine[:, None], N * BLOCK_SIZE, READ)
        # Where sums start: far below any other for what the query does not see
        zero = tl.where(seen, 0, UNSEEN)
        new_tops, new_totals = (), ()
        for g in tl.static_range(GROUP):
            if MASKED:
                seen = is_visible(visible + g * visible_stride, slot, mine[:, None])
                zero = tl.where(seen, 0, UNSEEN)
            if EXACT:
                each = tl.where(seen, dots[g] * scale, LEAST)
                score = tl.max(each, 1)
                alive = score > LEAST
                if BLOCK_REDUCE == "logsumexp":
                    score += tl.log(tl.sum(exp(each - score[:, None], NATIVE), 1))
            else:
                dot = dot_codes(words, weights, g, zero, READ, BITS, NATIVE)
                best = tl.max(dot, 1)
                alive = best > UNSEEN // 2
                score = (shifts[g] + sizes[g] * best.to(tl.float32)) * scale
                if BLOCK_REDUCE == "logsumexp":
                    less = dot - best[:, None]
                    less = _small_float(less) if SMALL else less.to(tl.float32)
                    each = tl.exp2(less * (sizes[g] * scale * LOG2E))
                    if MASKED:
                        # Far below, but not of a query that is next to nothing
                        each = tl.where(seen | ~alive[:, None], each, 0.0)
                    score += tl.log(tl.sum(each, 1))
            if MASKED:
                score = tl.where(alive, score, float("-inf"))
            scatter_rows(scores + g * score_stride, block, score, mine, inside, NATIVE)
            if SOFTMAX:
                top, total = with_score(tops[g], totals[g], score, mine, NATIVE)
                new_tops = extended(new_tops, top)
                new_totals = extended(new_totals, total)
        tops, totals = new_tops, new_totals
    if SOFTMAX:
        store_norms(tops, totals, norms, GROUP, PER, NATIVE)


@triton.jit
def _with_head(rank, weight, GROUP: tl.constexpr, REDUCE: tl.constexpr):
    """``rank`` of the heads so far with one more head's softmax, of which ``weight`` is the GROUP-th part."""
    return rank + weight if REDUCE == "softmax_mean" else tl.maximum(rank, weight * GROUP)


@triton.jit
def _with_score(rank, score, GROUP: tl.constexpr, MASKED: tl.constexpr, REDUCE: tl.constexpr):
    """The same of raw scores. MASKED: -inf for a head that sees nothing, which has no say in a mean."""
    if REDUCE == "max":
        return tl.maximum(rank, score)
    if MASKED:
        return rank + tl.where(score > float("-inf"), score, 0.0)
    return rank + score / GROUP


@triton.jit
def _of_those_who_see(rank, n_see, REDUCE: tl.constexpr):
    """The rank of a candidate that ``n_see`` heads see."""
    return rank / tl.maximum(n_see, 1.0) if REDUCE == "mean" else rank


@triton.jit
def rank_blocks(scores, tops, shares, keys, first, end, position, sinks, recent, score_stride,
                GROUP: tl.constexpr, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
                REDUCE: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Keys int16 of blocks ``first`` to ``end``, BN at a time."""
    POSITIVE: tl.constexpr = is_softmax(REDUCE)
    for start in range(first, end, BN):
        place = start + tl.arange(0, BN)
        mine = place < end
        rank = tl.full((BN,), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        n_see = tl.zeros((BN,), tl.float32)
        for g in tl.static_range(GROUP):
            score = tl.load(scores + g * score_stride + place, mine, other=float("-inf"))
            if POSITIVE:
                rank = _with_head(rank, exp(score - tops[g], NATIVE) * shares[g], GROUP, REDUCE)
            else:
                rank = _with_score(rank, score, GROUP, MASKED, REDUCE)
            if MASKED:
                n_see += (score > float("-inf")).to(tl.float32)
        first_token = place * BLOCK_SIZE
        forced = (first_token < sinks) | (first_token + BLOCK_SIZE - 1 > position - recent)
        alive = mine
        if MASKED:
            rank, alive = _of_those_who_see(rank, n_see, REDUCE), mine & (forced | (n_see > 0))
        key = make_key(rank, alive, forced, POSITIVE)
        tl.store(keys + place, key.to(tl.int16), mine)


@triton.jit
def rank_tokens(
    q, codes, asked, base, unit, visible, norms, blocks, keys, position, sinks, recent, first, end, N, q_stride_h,
    visible_stride, scale,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr, REDUCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Keys int16 of the tokens of entries ``first`` to ``end`` of ``blocks``, PER blocks at a time."""
    POSITIVE: tl.constexpr = is_softmax(REDUCE)
    if not EXACT:
        weights, shifts, sizes = load_asked(asked, base, unit, 1, W, W, BITS, GROUP)
    for start in tl.range(first, end, PER, num_stages=1):
        entry = start + tl.arange(0, PER)
        # Padding entries of the block list lie past the last slot, and so past the position
        block = tl.load(blocks + entry, entry < end, other=N)
        inside = tl.arange(0, BLOCK_SIZE)[None]
        slot = block[:, None] * BLOCK_SIZE + inside
        if EXACT:
            dots = dot_keys(codes, slot, (block < N)[:, None], N * BLOCK_SIZE, q, q_stride_h, W, GROUP)
        else:
            words = load_codes(codes, slot, (block < N)[:, None], N * BLOCK_SIZE, W)
        rank = tl.full((PER, BLOCK_SIZE), float("-inf") if REDUCE == "max" else 0.0, tl.float32)
        n_see = tl.zeros((PER, BLOCK_SIZE), tl.float32)
        for g in tl.static_range(GROUP):
            if EXACT:
                score = dots[g] * scale
            else:
                dot = dot_codes(words, weights, g, tl.zeros_like(words[0]), W, BITS, NATIVE)
                score = (shifts[g] + sizes[g] * dot.to(tl.float32)) * scale
            if MASKED:
                sees = is_visible(visible + g * visible_stride, slot, (block < N)[:, None])
                score = tl.where(sees, score, float("-inf"))
                n_see += sees.to(tl.float32)
            if POSITIVE:
                weight = exp(tl.minimum(score - tl.load(norms + 2 * g), MOST), NATIVE) * tl.load(norms + 2 * g + 1)
                rank = _with_head(rank, weight, GROUP, REDUCE)
            else:
                rank = _with_score(rank, score, GROUP, MASKED, REDUCE)
        forced = (slot < sinks) | (slot > position - recent)
        alive = slot <= position
        if MASKED:
            rank, alive = _of_those_who_see(rank, n_see, REDUCE), alive & (forced | (n_see > 0))
        key = make_key(rank, alive, forced, POSITIVE)
        tl.store(keys + entry[:, None] * BLOCK_SIZE + inside, key.to(tl.int16), (entry < end)[:, None])
