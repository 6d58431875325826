"""Queries in label space, in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import load_query


@triton.jit
def load_projection(q, to_query, low, step, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T,
                    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                    CHANNELS: tl.constexpr):  # fmt: skip
    """What :func:`ask` takes: query [ROWS, DP], projection [DP, CHANNELS], low and step of each channel."""
    d = tl.arange(0, DP)
    c = tl.arange(0, CHANNELS)
    projection = tl.load(
        to_query + head * D * C + d[:, None] * C + c[None], (d < D)[:, None] & (c < C)[None], other=0.0
    )
    query = load_query(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, D, DP, GROUP, ROWS)
    lows = tl.load(low + head * C + c, c < C, other=0.0)
    steps = tl.load(step + head * C + c, c < C, other=0.0)
    return query, projection, lows, steps


@triton.jit
def ask(
    query, projection, lows, steps, asked, base, unit, row, filter_dims,
    W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The query heads of one selection: asked int32 [R, G, 8 / BITS, W], base float32 [R, G, 2], unit float32 [R, G].

    A token's label score is ``base + unit * (asked . codes)``; base 0 is for the first ``filter_dims`` channels, base 1
    for all of them.
    """
    SUB: tl.constexpr = 8 // BITS
    g = tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    channel = tl.dot(query.to(tl.float32), projection, input_precision="tf32x3")
    shift = channel * lows[None]
    channel = channel * steps[None]
    scale = tl.maximum(tl.max(tl.abs(channel), 1) / 127, 1e-30)
    tl.store(unit + row * GROUP + g, scale, g < GROUP)
    rounded = tl.floor(channel / scale[:, None] + 0.5)
    shift += (channel - rounded * scale[:, None]) * ((2**BITS - 1) / 2)
    entry = (row * GROUP + g) * 2
    tl.store(base + entry, tl.sum(tl.where((c < filter_dims)[None], shift, 0.0), 1), g < GROUP)
    tl.store(base + entry + 1, tl.sum(shift, 1), g < GROUP)
    code = rounded.to(tl.int32)
    # Byte i of part j of word w is channel (4 w + i) SUB + j, as in the codes shifted right by j * BITS
    code = tl.reshape(code, (ROWS, CHANNELS // (4 * SUB), 4, SUB)) & 0xFF
    words = tl.sum(code << (8 * tl.arange(0, 4)[None, None, :, None]), 2)
    w = tl.arange(0, CHANNELS // (4 * SUB))
    j = tl.arange(0, SUB)
    place = ((row * GROUP + g)[:, None, None] * SUB + j[None, None]) * W + w[None, :, None]
    tl.store(asked + place, words, (g < GROUP)[:, None, None] & (w < W)[None, :, None])
