"""Labels of a prompt's keys, in one pass over them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .labels import locate_channels, pack_codes, places_of, quantise_codes
from .tiles import NATIVE, padded

# Tokens of one matrix product, and products of one program: the projection is loaded, and cut in parts, once for them
TILE = 64 if NATIVE else 16
PRODUCTS = 8 if NATIVE else 2
# Of one program: the projection, in parts, lies in shared memory beside the keys
MOST_PLACES = 64


@triton.jit
def label_keys(
    k, start, counts, codes, to_code, offset, k_stride_b, k_stride_h, k_stride_t, n_heads, T, S,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, PLACES: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    COUNTED: tl.constexpr, TILE: tl.constexpr, PRODUCTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, head, j) labels the i-th TILE * PRODUCTS keys of one KV head in the j-th PLACES for channels."""
    WORDS: tl.constexpr = PLACES // places_of(BITS)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // n_heads, head % n_heads
    end = tl.minimum(tl.load(counts + b), T).to(tl.int32) if COUNTED else T
    slot = tl.load(start + b).to(tl.int64)
    d = tl.arange(0, DP)
    c, bits, shift, in_word = locate_channels(tl.program_id(2) * PLACES + tl.arange(0, PLACES), BITS, W)
    w = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    there = in_word & (c < C)
    inside = (d < D)[:, None] & there[None]
    projection = tl.load(to_code + head * D * C + d[:, None] * C + c[None], inside, other=0.0)
    # Far below zero where there is no channel: its code is 0
    middle = tl.where(there, tl.load(offset + head * C + c, there, other=0.0) + 0.5, -1.0)
    # bfloat16 keys are exact as they are: three bfloat16 parts of the projection hold its 24 digits
    HALF: tl.constexpr = k.dtype.element_ty == tl.bfloat16
    if HALF:
        high = projection.to(tl.bfloat16)
        rest = projection - high.to(tl.float32)
        mid = rest.to(tl.bfloat16)
        low = (rest - mid.to(tl.float32)).to(tl.bfloat16)
    k += b * k_stride_b + h * k_stride_h
    codes += head * W * S
    first = tl.program_id(0) * (TILE * PRODUCTS)
    for i in tl.range(0, PRODUCTS, num_stages=STAGES):
        t = first + i * TILE + tl.arange(0, TILE)
        at = t.to(tl.int64)
        key = tl.load(k + at[:, None] * k_stride_t + d[None], (t < end)[:, None] & (d < D)[None], other=0.0)
        if HALF:
            code = tl.dot(key, low)
            code = tl.dot(key, mid, code)
            code = tl.dot(key, high, code)
        else:
            code = tl.dot(key.to(tl.float32), projection, input_precision="tf32x3")
        words = pack_codes(quantise_codes(code + middle[None], bits), shift, TILE, BITS)
        tl.store(codes + (w * S)[None] + (slot + at)[:, None], words, (t < end)[:, None] & (w < W)[None])


def launch_label_keys(
    k: Tensor, start: Tensor, counts: Tensor | None, codes: Tensor, to_code: Tensor, offset: Tensor, *,
    bits: tuple[int, ...],
) -> None:  # fmt: skip
    """Label keys k [B, HKV, T, D] in slots ``start[b] + t`` of codes int32 [B, HKV, W, S], the first ``counts[b]``.

    ``bits``: of a channel in each of the W words.
    """
    b, hkv, t, d = k.shape
    w, s, c = codes.shape[2], codes.shape[3], to_code.shape[-1]
    # Three tiles of keys, of 16 KiB each, are under way in shared memory: three programs to a processor
    tile = min(TILE, max(16, 2**14 // (padded(d) * k.element_size())))
    per_word = places_of(bits)
    places = min(MOST_PLACES, max(16, padded(w) * per_word))
    label_keys[(-(-t // (tile * PRODUCTS)), b * hkv, -(-w * per_word // places))](
        k, start, start if counts is None else counts, codes, to_code, offset, *k.stride()[:3], hkv, t, s,
        D=d, DP=padded(d, 16), C=c, PLACES=places, W=w, BITS=bits,
        COUNTED=counts is not None, TILE=tile, PRODUCTS=PRODUCTS,
        STAGES=3, num_warps=4,
    )  # fmt: skip
