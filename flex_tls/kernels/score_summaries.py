"""Block scores from block summaries, where level 1 does not read the labels of a block's tokens.

The formulas: ``q . middle + radius * |q| . half`` of a box, ``q . mean`` of a mean key (flex_tls/summaries.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .norms import no_norms, store_norms, with_score
from .scatter import scatter_rows
from .tuples import extended
from .visible import is_visible


@triton.jit
def score_summaries(
    q, summary, beside, visible, scores, norms, position, first, end, q_stride_h, visible_stride, score_stride, radius,
    scale,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER: tl.constexpr,
    STAGES: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, SOFTMAX: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """As :func:`.score.score_blocks`, for the heads at ``q``: -inf for the query's own block.

    ``summary`` and ``beside``: a box's lowest and highest channels [N, D], or a block's total [N, D] and count [N].
    """
    d = tl.arange(0, DP)[None]
    queries = ()
    for g in tl.static_range(GROUP):
        queries = extended(queries, tl.load(q + g * q_stride_h + d, d < D, other=0.0).to(tl.float32))
    # The query's own block may hold tokens after it: it is kept anyway
    own = position // BLOCK_SIZE
    tops, totals = no_norms(PER, GROUP if SOFTMAX else 0)
    for start in tl.range(first, end, PER, num_stages=STAGES):
        block = start + tl.arange(0, PER)
        mine = block < end
        before = mine & (block < own)
        at, there = block[:, None] * D + d, before[:, None] & (d < D)
        middle = tl.load(summary + at, there, other=0.0).to(tl.float32)
        if KIND == "box":
            high = tl.load(beside + at, there, other=0.0).to(tl.float32)
            half = (high - middle) * (radius / 2)
            middle = (high + middle) / 2
        else:
            middle /= tl.load(beside + block, before, other=1.0)[:, None]
        new_tops, new_totals = (), ()
        for g in tl.static_range(GROUP):
            product = queries[g] * middle
            if KIND == "box":
                product += tl.abs(queries[g]) * half
            seen = before
            if MASKED:
                slot = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None]
                sees = is_visible(visible + g * visible_stride, slot, before[:, None])
                seen = tl.max(sees.to(tl.int32), 1) > 0
            score = tl.where(seen, tl.sum(product, 1) * scale, float("-inf"))
            scatter_rows(scores + g * score_stride, block, score, mine, d, NATIVE)
            if SOFTMAX:
                top, total = with_score(tops[g], totals[g], score, mine, NATIVE)
                new_tops = extended(new_tops, top)
                new_totals = extended(new_totals, total)
        tops, totals = new_tops, new_totals
    if SOFTMAX:
        store_norms(tops, totals, norms, GROUP, PER, NATIVE)
