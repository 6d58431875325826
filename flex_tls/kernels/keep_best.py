"""The k best of a row's candidates, exactly, ties to the lower place: what the last program of a row runs.

No sort: the k-th largest key is searched between the smallest and the largest, three counts at a time, until exactly k
keys reach it: some seven rounds for keys that differ. What is chosen becomes bits, 32 to a word: a candidate's place in
the list is a count of bits. Keys stay in registers if the candidates fit in one chunk, in memory if not.
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
def _weights(score, top):
    """Exponentials of scores [GP, BN] over each head's largest."""
    return tl.exp(score - tl.where(top == float("-inf"), 0.0, top)[:, None])


@triton.jit
def _keys(score, weight, total, place, position, sinks, recent,
          GROUP: tl.constexpr, UNIT: tl.constexpr, REDUCE: tl.constexpr):  # fmt: skip
    """Keys uint32 [BN] of candidates with scores [GP, BN], -inf where a candidate must not be chosen.

    ``weight`` [GP, BN] and their sums ``total`` [GP] are read by softmax_mean alone.
    """
    if REDUCE == "softmax_mean":
        rank = tl.sum(weight * (1 / (tl.maximum(total, 1e-37) * GROUP))[:, None], 0)
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
def _read(keys, place, n):
    """Keys of one chunk; 0 past the last."""
    return tl.load(keys + place, place < n, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _middle(edge, beyond):
    return edge + ((beyond - edge) >> 1)


@triton.jit
def _both(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _count(key, low, middle, high):
    """How many keys reach each threshold, of fewer than 2**15: (``low`` + ``middle`` << 16, ``high``), in one pass."""
    some = (key >= low).to(tl.int32) + ((key >= middle).to(tl.int32) << 16)
    return tl.reduce((some, (key >= high).to(tl.int32)), 0, _both)


@triton.jit
def _narrow(edge, reached, beyond, low, middle, high, n_low, n_middle, n_high, k):
    """One round: ``n_low`` keys reach ``low``, and so on; ``reached`` keys, k or more, ``edge``; fewer ``beyond``."""
    beyond = tl.where(n_high >= k, beyond, tl.where(n_middle >= k, high, tl.where(n_low >= k, middle, low)))
    edge = tl.where(n_high >= k, high, tl.where(n_middle >= k, middle, tl.where(n_low >= k, low, edge)))
    reached = tl.where(n_high >= k, n_high, tl.where(n_middle >= k, n_middle, tl.where(n_low >= k, n_low, reached)))
    return edge, reached, beyond


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
def _place(key, edge, cut, before, place, blocks, out,
           BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Write one chunk's choice behind the ``before`` of other chunks; returns the count after.

    Chosen are keys above ``edge``, and those at it before place ``cut``.
    """
    LANES: tl.constexpr = 32 if BN >= 32 else BN
    chosen = (key != 0) & ((key > edge) | ((key == edge) & (place < cut)))
    # Words of bits: where a candidate goes is the count of those before its word, and of those before it in the word
    bit = tl.arange(0, LANES)[None]
    word = tl.sum(tl.reshape(chosen.to(tl.int32), (BN // LANES, LANES)) << bit, 1)
    count = _ones(word, NATIVE)
    upto = tl.cumsum(count, 0)
    where = (before + upto - count)[:, None] + _ones(word[:, None] & ((1 << bit) - 1), NATIVE)
    where = tl.reshape(where, (BN,))
    if UNIT == 1:
        block = tl.load(blocks + place // BLOCK_SIZE, chosen, other=0)
        tl.store(out + where, block * BLOCK_SIZE + place % BLOCK_SIZE, chosen)
    else:
        tl.store(out + where, place, chosen)
    return before + tl.sum(count, 0)


@triton.jit
def keep_best(scores, n, k, blocks, keys, out, count, filler, position, sinks, recent, score_stride, K,
              GROUP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, KP: tl.constexpr,
              BLOCK_SIZE: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, REDUCE: tl.constexpr,
              NATIVE: tl.constexpr):  # fmt: skip
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
        weight = score
        if REDUCE == "softmax_mean":
            weight = _weights(score, tl.max(score, 1))
            total = tl.sum(weight, 1)
        key = _keys(score, weight, total, lane, position, sinks, recent, GROUP, UNIT, REDUCE)
        alive = tl.sum((key != 0).to(tl.int32), 0)
        edge = tl.min(tl.where(key == 0, 0xFFFFFFFE, key), 0)
        beyond = tl.max(tl.where(key == 0xFFFFFFFF, 0, key), 0) + 1
    else:
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            score = _load(scores + head * score_stride + place[None], (head < GROUP) & (place < n)[None], WHOLE)
            higher = tl.maximum(top, tl.max(score, 1))
            total = total * tl.exp(top - tl.where(higher == float("-inf"), 0.0, higher))
            total += tl.sum(_weights(score, higher), 1)
            top = higher
        alive = 0
        edge = tl.full((), 0xFFFFFFFE, tl.uint32)
        beyond = tl.full((), 1, tl.uint32)
        for chunk in range(CHUNKS):
            place = chunk * BN + lane
            score = _load(scores + head * score_stride + place[None], (head < GROUP) & (place < n)[None], WHOLE)
            key = _keys(score, _weights(score, top), total, place, position, sinks, recent, GROUP, UNIT, REDUCE)
            tl.store(keys + place, key.to(tl.int32, bitcast=True), place < n)
            alive += tl.sum((key != 0).to(tl.int32), 0)
            edge = tl.minimum(edge, tl.min(tl.where(key == 0, 0xFFFFFFFE, key), 0))
            beyond = tl.maximum(beyond, tl.max(tl.where(key == 0xFFFFFFFF, 0, key), 0) + 1)
        tl.debug_barrier()
        key = _read(keys, lane, n)
    reached = alive
    while (reached > k) & (beyond > edge + 1):
        middle = _middle(edge, beyond)
        low, high = _middle(edge, middle), _middle(middle, beyond)
        some, n_high = _count(key, low, middle, high)
        n_low, n_middle = some & 0xFFFF, some >> 16
        for chunk in range(1, CHUNKS):
            some, more = _count(_read(keys, chunk * BN + lane, n), low, middle, high)
            n_low, n_middle, n_high = n_low + (some & 0xFFFF), n_middle + (some >> 16), n_high + more
        edge, reached, beyond = _narrow(edge, reached, beyond, low, middle, high, n_low, n_middle, n_high, k)
    cut = n
    if reached > k:
        # More keys at the edge than there is room for: the first of them, up to a place searched in the same way
        first = 0
        while cut > first + 1:
            middle_place = (first + cut) >> 1
            now = tl.sum(((key > edge) | ((key == edge) & (lane < middle_place))).to(tl.int32), 0)
            for chunk in range(1, CHUNKS):
                place = chunk * BN + lane
                other = _read(keys, place, n)
                now += tl.sum(((other > edge) | ((other == edge) & (place < middle_place))).to(tl.int32), 0)
            first = tl.where(now <= k, middle_place, first)
            cut = tl.where(now <= k, cut, middle_place)
        cut = first
    kept = _place(key, edge, cut, 0, lane, blocks, out, BN, BLOCK_SIZE, UNIT, NATIVE)
    for chunk in range(1, CHUNKS):
        place = chunk * BN + lane
        kept = _place(_read(keys, place, n), edge, cut, kept, place, blocks, out, BN, BLOCK_SIZE, UNIT, NATIVE)
    tl.store(count, kept)
    entry = tl.arange(0, KP)
    tl.store(out + entry, tl.zeros((KP,), tl.int32) + filler, (entry >= kept) & (entry < K))
