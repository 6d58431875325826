"""Level 1's softmax over blocks: each program of a row has a part of it, the row's programs join their parts."""

from __future__ import annotations

import triton
import triton.language as tl

from .scatter import scatter
from .tuples import extended, stacked

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Below every score
LEAST: tl.constexpr = tl.constexpr(-3e38)


@triton.constexpr_function
def is_softmax(reduce: str) -> bool:
    """Whether ranks are shares of attention, which are never negative, and not raw scores."""
    return reduce in ("softmax_mean", "softmax_max")


@triton.jit
def exp(x, NATIVE: tl.constexpr):
    """Exponential of float32 ``x``; 0 below 2^-126, which spares looking for such numbers: half of what it takes."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def no_norms(PER: tl.constexpr, HEADS: tl.constexpr):
    """(tops, totals) of HEADS heads before any score: of every head [PER] largest scores, and sums over them."""
    tops, totals = (), ()
    for _ in tl.static_range(HEADS):
        tops = extended(tops, tl.full((PER,), LEAST, tl.float32))
        totals = extended(totals, tl.zeros((PER,), tl.float32))
    return tops, totals


@triton.jit
def with_score(top, total, score, mine, NATIVE: tl.constexpr):
    """A head's (top, total) [PER] with one more score each, where ``mine``."""
    score = tl.where(mine, score, LEAST)
    higher = tl.maximum(top, score)
    more = tl.where(mine, exp(score - higher, NATIVE), 0.0)
    return higher, total * exp(top - higher, NATIVE) + more


@triton.jit
def store_norms(tops, totals, norms, GROUP: tl.constexpr, PER: tl.constexpr, NATIVE: tl.constexpr):
    """Each head's largest score, and the sum of exponentials over it, into ``norms`` [G, 2]."""
    # All heads cross the threads at once
    top, total = _join(stacked(tops, GROUP), stacked(totals, GROUP), NATIVE)
    SHAPE: tl.constexpr = (PER, top.shape[0])
    g = tl.arange(0, SHAPE[1])[None]
    lane = tl.arange(0, PER)[:, None]
    one, at = (g < GROUP) & (lane == 0), norms + 2 * g + tl.zeros_like(lane)
    scatter(at, tl.broadcast_to(top[None], SHAPE), one, NATIVE)
    scatter(at + 1, tl.broadcast_to(total[None], SHAPE), one, NATIVE)


@triton.jit
def join_norms(parts, norms, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, PP: tl.constexpr, NATIVE: tl.constexpr):
    """(tops, shares): a head's largest score, and 1 / (sum of exponentials over it * G); ``norms`` [G, 2] gets both.

    ``parts`` [PROGRAMS, G, 2] are those of a row's programs. A warp has those of all programs, and asks no other.
    ``norms`` may be None.
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
        if norms is not None:
            tl.store(norms + 2 * g, tops[g])
            tl.store(norms + 2 * g + 1, shares[g])
    return tops, shares


@triton.jit
def _join(tops, totals, NATIVE: tl.constexpr):
    """Largest scores [P, ...] and sums of exponentials over them -> those of all P."""
    top = tl.max(tops, 0, keep_dims=True)
    total = tl.sum(totals * exp(tops - top, NATIVE), 0)
    return tl.max(top, 0), total
