"""Queries in label space, in 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .follow import precede
from .tiles import NATIVE, padded


@triton.jit
def ask(
    q, to_query, low, step, asked, base, unit, q_stride_b, q_stride_h, q_stride_t, n_heads, T, filter_dims,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program ``row``: the query heads of one selection; see :func:`launch_ask`."""
    precede(NATIVE)
    SUB: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64)
    head = row // T
    q += head // n_heads * q_stride_b + head % n_heads * GROUP * q_stride_h + row % T * q_stride_t
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    c = tl.arange(0, CHANNELS)
    query = tl.load(q + g[:, None] * q_stride_h + d[None], (g < GROUP)[:, None] & (d < D)[None], other=0.0)
    projection = tl.load(
        to_query + head * D * C + d[:, None] * C + c[None], (d < D)[:, None] & (c < C)[None], other=0.0
    )
    lows = tl.load(low + head * C + c, c < C, other=0.0)
    steps = tl.load(step + head * C + c, c < C, other=0.0)
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


def launch_ask(
    q: Tensor, to_query: Tensor, low: Tensor, step: Tensor, *, bits: int, n_words: int, filter_dims: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Channels in 8 bits, asked int32 [R, G, 8 / bits, W], with base float32 [R, G, 2] and unit float32 [R, G].

    A token's label score is ``base + unit * (asked . codes)``; base 0 is for the first ``filter_dims`` channels, base 1
    for all of them.
    """
    b, hq, t, d = q.shape
    _, hkv, _, c = to_query.shape
    rows, group = b * hkv * t, hq // hkv
    asked = torch.empty(rows, group, 8 // bits, n_words, dtype=torch.int32, device=q.device)
    base = torch.empty(rows, group, 2, device=q.device)
    unit = torch.empty(rows, group, device=q.device)
    ask[(rows,)](
        q, to_query, low, step, asked, base, unit, q.stride(0), q.stride(1), q.stride(2), hkv, t, filter_dims,
        D=d, DP=padded(d, 16), C=c, W=n_words, BITS=bits, GROUP=group, ROWS=padded(group, 16),
        CHANNELS=max(16, padded(n_words) * 32 // bits), NATIVE=NATIVE, num_warps=4,
    )  # fmt: skip
    return asked, base, unit
