"""Queries in label space, in 8 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .follow import prefetch
from .labels import locate_bytes, locate_channels, parts_before
from .rows import query_of
from .scatter import scatter


@triton.jit
def prefetch_ask(
    q, to_query, low, step, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """What :func:`ask` will read, ahead of whatever is asked for next."""
    LINES: tl.constexpr = triton.next_power_of_2((D * C + 31) // 32)
    # 32 numbers are a line of 128 bytes
    prefetch(to_query + head * D * C + tl.minimum(tl.arange(0, LINES) * 32, D * C - 1))
    channel = head * C + tl.minimum(tl.arange(0, triton.next_power_of_2((C + 31) // 32)) * 32, C - 1)
    prefetch(low + channel)
    prefetch(step + channel)
    g = tl.minimum(tl.arange(0, GP), GROUP - 1)[:, None]
    q = query_of(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, GROUP)
    prefetch(q + g * q_stride_h + tl.minimum(tl.arange(0, max(1, DP // 32)) * 32, D - 1)[None])


@triton.jit
def ask(
    q, to_query, low, step, asked, base, unit, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T, filter_dims,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GP: tl.constexpr, PLACES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The query heads of one selection: asked int8 [R, G, parts, 4], base float32 [R, G, 2], unit float32 [R, G].

    A token's label score is ``base + unit * (asked . codes)``; base 0 is for the first ``filter_dims`` channels, base 1
    for all of them.
    """
    # Heads at once: more would not fit the registers
    HEADS: tl.constexpr = min(GP, max(1, 128 // PLACES))
    PARTS: tl.constexpr = parts_before(BITS, W)
    d = tl.arange(0, DP)
    place = tl.arange(0, PLACES)
    # A word's last channels may be empty: whatever reads it finds zeros
    c, bits, _, in_word = locate_channels(place, BITS, W)
    byte = locate_bytes(place, bits, BITS, W)
    there_c = in_word & (c < C)
    projection = tl.load(
        to_query + head * D * C + d[:, None] * C + c[None], (d < D)[:, None] & there_c[None], other=0.0
    )
    lows = tl.load(low + head * C + c, there_c, other=0.0)
    steps = tl.load(step + head * C + c, there_c, other=0.0)
    # Half of the largest code
    middle = ((1 << bits) - 1).to(tl.float32) / 2
    q = query_of(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, GROUP)
    for first in tl.static_range(0, GROUP, HEADS):
        g = first + tl.arange(0, HEADS)
        there = g < GROUP
        query = tl.load(q + g[:, None] * q_stride_h + d[None], there[:, None] & (d < D)[None], other=0.0)
        # Few rows: multiplying and adding is over before a tensor core has its operands
        channel = tl.sum(query.to(tl.float32)[:, :, None] * projection[None], 1)
        shift = channel * lows[None]
        channel = channel * steps[None]
        scale = tl.maximum(tl.max(tl.abs(channel), 1) / 127, 1e-30)
        # A number of each head is stored by its first place, and so where it is
        one = there[:, None] & (place == 0)[None]
        head_of = (row * GROUP + g)[:, None] + tl.zeros_like(place)[None]
        scatter(unit + head_of, tl.broadcast_to(scale[:, None], channel.shape), one, NATIVE)
        rounded = tl.floor(channel / scale[:, None] + 0.5)
        shift += (channel - rounded * scale[:, None]) * middle[None]
        some, whole = tl.reduce((tl.where((c < filter_dims)[None], shift, 0.0), shift), 1, _add)
        scatter(base + head_of * 2, tl.broadcast_to(some[:, None], channel.shape), one, NATIVE)
        scatter(base + head_of * 2 + 1, tl.broadcast_to(whole[:, None], channel.shape), one, NATIVE)
        scatter(
            asked + head_of * PARTS * 4 + byte[None],
            rounded.to(tl.int32).to(tl.int8),
            there[:, None] & in_word[None],
            NATIVE,
        )


@triton.jit
def _add(a, b, more_a, more_b):
    return a + more_a, b + more_b
