"""The k best of a row's candidates, exactly, ties to the lower place: what the last program of a row runs.

No sort: the k-th largest key is found by bisection between the smallest and the largest, until exactly k keys reach it,
some fifteen counts for keys that differ. They stay in registers if the candidates fit in one chunk, in memory if not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(rank, POSITIVE: tl.constexpr):
    """Bits, int32, that order as float32 ``rank`` does when taken as uint32, neither 0 nor all ones."""
    if POSITIVE:
        return rank.to(tl.int32, bitcast=True) + 1
    bits = (rank + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -1 - bits, bits ^ -2147483648)


@triton.jit
def _keys(score, top, total, place, position, sinks, recent,
          GROUP: tl.constexpr, UNIT: tl.constexpr, REDUCE: tl.constexpr):  # fmt: skip
    """Keys uint32 [BN] of candidates with scores [GP, BN], -inf where a candidate must not be chosen."""
    if REDUCE == "softmax_mean":
        shift = tl.where(top == float("-inf"), 0.0, top)
        share = 1 / (tl.maximum(total, 1e-37) * GROUP)
        rank = tl.sum(tl.exp(score - shift[:, None]) * share[:, None], 0)
    elif REDUCE == "max":
        rank = tl.max(score, 0)
    else:
        rank = tl.sum(tl.where(score == float("-inf"), 0.0, score), 0) / GROUP
    # Without mods all heads of a group see the same candidates
    alive = tl.max(score, 0) > float("-inf")
    first = place * UNIT
    forced = (first < sinks) | (first + UNIT - 1 > position - recent)
    return tl.where(alive, tl.where(forced, -1, _ordered(rank, REDUCE == "softmax_mean")), 0).to(
        tl.uint32, bitcast=True
    )


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    """Scores that other programs wrote; WHOLE if none is masked, which the loads of thousands are faster for."""
    if WHOLE:
        return tl.load(pointers, cache_modifier=".cg")
    return tl.load(pointers, mask, other=float("-inf"), cache_modifier=".cg")


@triton.jit
def _middle(edge, beyond):
    return edge + ((beyond - edge) >> 1)


@triton.jit
def _narrow(edge, reached, beyond, middle, now, k):
    """One bisection: ``now`` keys reach ``middle``. ``reached`` keys, k or more, reach ``edge``; fewer ``beyond``."""
    enough = now >= k
    return tl.where(enough, middle, edge), tl.where(enough, now, reached), tl.where(enough, beyond, middle)


@triton.jit
def _place(key, edge, k_equal, more_before, equal_before, place, blocks, out,
           BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Write one chunk's choice behind the keys above and at the edge that came before; returns both counts after."""
    more = (key > edge).to(tl.int32)
    equal = ((key == edge) & (key != 0)).to(tl.int32)
    # Both running counts in one scan: a chunk has fewer than 2**15 candidates
    upto = tl.cumsum(more + (equal << 16), 0)
    n_more = more_before + (upto & 0xFFFF) - more
    n_equal = equal_before + (upto >> 16) - equal
    chosen = (more != 0) | ((equal != 0) & (n_equal < k_equal))
    where = n_more + tl.minimum(n_equal, k_equal)
    if UNIT == 1:
        block = tl.load(blocks + place // BLOCK_SIZE, chosen, other=0)
        tl.store(out + where, block * BLOCK_SIZE + place % BLOCK_SIZE, chosen)
    else:
        tl.store(out + where, place, chosen)
    return more_before + tl.sum(more, 0), equal_before + tl.sum(equal, 0)


@triton.jit
def keep_best(scores, n, k, blocks, keys, out, count, filler, position, sinks, recent, score_stride, K,
              GROUP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
              BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, REDUCE: tl.constexpr):  # fmt: skip
    """Choose the best ``k`` of ``n`` candidates with scores [GROUP, n]; write them ascending to ``out`` [K].

    ``scores`` has rows ``score_stride`` apart; WHOLE: n is BN * CHUNKS and GROUP is GP, so that no load is masked.
    Entries past the count get ``filler``; ``count`` gets the count.
    A candidate is UNIT tokens: a block, or (UNIT 1) a token of the kept ``blocks``, which are ascending and hold all
    sinks and the whole window: counted in such tokens, ``position`` and ``recent`` say what to keep just as well.
    """
    head = tl.arange(0, GP)[:, None]
    lane = tl.arange(0, BN)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    if CHUNKS == 1:
        score = _load(scores + head * score_stride + lane[None], (head < GROUP) & (lane < n)[None], WHOLE)
        if REDUCE == "softmax_mean":
            top = tl.max(score, 1)
            total = tl.sum(tl.exp(score - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)
        key = _keys(score, top, total, lane, position, sinks, recent, GROUP, UNIT, REDUCE)
        alive = tl.sum((key != 0).to(tl.int32), 0)
        reached = alive
        edge = tl.min(tl.where(key == 0, 0xFFFFFFFE, key), 0)
        beyond = tl.max(tl.where(key == 0xFFFFFFFF, 0, key), 0) + 1
        while (reached > k) & (beyond > edge + 1):
            middle = _middle(edge, beyond)
            now = tl.sum((key >= middle).to(tl.int32), 0)
            edge, reached, beyond = _narrow(edge, reached, beyond, middle, now, k)
        more = tl.sum((key > edge).to(tl.int32), 0)
        _place(key, edge, tl.maximum(k - more, 0), 0, 0, lane, blocks, out, BLOCK_SIZE, UNIT)
    else:
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            score = _load(scores + head * score_stride + place[None], (head < GROUP) & (place < n)[None], WHOLE)
            higher = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(score - shift[:, None]), 1)
            top = higher
        alive = 0
        edge = tl.full((), 0xFFFFFFFE, tl.uint32)
        beyond = tl.full((), 1, tl.uint32)
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            score = _load(scores + head * score_stride + place[None], (head < GROUP) & (place < n)[None], WHOLE)
            key = _keys(score, top, total, place, position, sinks, recent, GROUP, UNIT, REDUCE)
            tl.store(keys + place, key.to(tl.int32, bitcast=True), place < n)
            alive += tl.sum((key != 0).to(tl.int32), 0)
            edge = tl.minimum(edge, tl.min(tl.where(key == 0, 0xFFFFFFFE, key), 0))
            beyond = tl.maximum(beyond, tl.max(tl.where(key == 0xFFFFFFFF, 0, key), 0) + 1)
        tl.debug_barrier()
        reached = alive
        while (reached > k) & (beyond > edge + 1):
            middle = _middle(edge, beyond)
            now = 0
            for chunk in range(CHUNKS):
                place = chunk * BN + lane
                key = tl.load(keys + place, place < n, other=0).to(tl.uint32, bitcast=True)
                now += tl.sum((key >= middle).to(tl.int32), 0)
            edge, reached, beyond = _narrow(edge, reached, beyond, middle, now, k)
        more = 0
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            key = tl.load(keys + place, place < n, other=0).to(tl.uint32, bitcast=True)
            more += tl.sum((key > edge).to(tl.int32), 0)
        n_more = 0
        n_equal = 0
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            key = tl.load(keys + place, place < n, other=0).to(tl.uint32, bitcast=True)
            n_more, n_equal = _place(key, edge, tl.maximum(k - more, 0), n_more, n_equal, place, blocks, out,
                                     BLOCK_SIZE, UNIT)  # fmt: skip
    kept = tl.minimum(alive, k)
    tl.store(count, kept)
    entry = tl.arange(0, KP)
    tl.store(out + entry, tl.zeros((KP,), tl.int32) + filler, (entry >= kept) & (entry < K))
