"""One step's new tokens: keys and values into the cache, their labels into the index, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .follow import follow
from .int8 import dequantised, quantised
from .labels import locate_channels, pack_codes, places_of, quantise_codes
from .tiles import NATIVE, padded


@triton.jit
def append(
    k_new, v_new, start, keys, values, scales, codes, to_code, offset, pages,
    k_new_stride_b, k_new_stride_h, k_new_stride_t, v_new_stride_b, v_new_stride_h, v_new_stride_t,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s, page_stride_k, page_stride_v,
    scale_stride_h, n_heads, T, S, N,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, PLACES: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    LABELS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program ``row`` writes one token of one KV head."""
    follow(NATIVE)
    row = tl.program_id(0).to(tl.int64)
    head, t = row // T, row % T
    b, h = head // n_heads, head % n_heads
    slot = tl.load(start + b).to(tl.int64) + t
    d = tl.arange(0, DP)
    key = tl.load(k_new + b * k_new_stride_b + h * k_new_stride_h + t * k_new_stride_t + d, d < D, other=0.0)
    value = tl.load(v_new + b * v_new_stride_b + h * v_new_stride_h + t * v_new_stride_t + d, d < D, other=0.0)
    keys += b * k_stride_b + h * k_stride_h
    values += b * v_stride_b + h * v_stride_h
    if PAGED:
        page = tl.load(pages + head * N + slot // BLOCK_SIZE).to(tl.int64)
        inside = slot % BLOCK_SIZE
        key_at, value_at = page * page_stride_k + inside * k_stride_s, page * page_stride_v + inside * v_stride_s
    else:
        key_at, value_at = slot * k_stride_s, slot * v_stride_s
    if INT8:
        key_code, key_scale = quantised(key)
        value_code, value_scale = quantised(value)
        tl.store(keys + key_at + d, key_code, d < D)
        tl.store(values + value_at + d, value_code, d < D)
        scale_at = head * scale_stride_h + (page * BLOCK_SIZE + inside) * 2
        tl.store(scales + scale_at, key_scale)
        tl.store(scales + scale_at + 1, value_scale)
        # Its label is of what the store would give back, as a prompt's are
        key = dequantised(key_code, key_scale, key.dtype)
    else:
        tl.store(keys + key_at + d, key, d < D)
        tl.store(values + value_at + d, value, d < D)
    if LABELS:
        c, bits, shift, in_word = locate_channels(tl.arange(0, PLACES), BITS, W)
        there = in_word & (c < C)
        projection = tl.load(
            to_code + head * D * C + d[:, None] * C + c[None], (d < D)[:, None] & there[None], other=0.0
        )
        # Far below zero where there is no channel: its code is 0
        middle = tl.where(there, tl.load(offset + head * C + c, there, other=0.0) + 0.5, -1.0)
        code = tl.sum(key.to(tl.float32)[:, None] * projection, 0) + middle
        words = pack_codes(quantise_codes(code[None], bits), shift, 1, BITS)
        w = tl.arange(0, PLACES // places_of(BITS))[None]
        tl.store(codes + (head * W + w) * S + slot, words, w < W)


def launch_append(
    k_new: Tensor, v_new: Tensor, start: Tensor, keys: Tensor, values: Tensor, codes: Tensor | None,
    to_code: Tensor | None, offset: Tensor | None, *, bits: tuple[int, ...],
    pages: Tensor | None = None, scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Write k_new and v_new [B, HKV, T, D] at slots ``start[b] + t`` of keys and values [B, HKV, S, D].

    With ``pages`` int32 [B, HKV, N] these are [B, HKV, P, block_size, D], and block n is at page ``pages[n]``.
    With ``codes`` int32 [B, HKV, W, S'] also the tokens' labels; see :class:`flex_tls.labels.TokenLabels`.
    With ``scales`` float32 [B, HKV, P, block_size, 2], contiguous, keys and values are int8: codes are written, and
    their scales; see :mod:`flex_tls.offload.int8`.
    """
    b, hkv, t, d = k_new.shape
    labels = codes is not None and to_code is not None and offset is not None
    # Unread pointers and widths where there are no labels
    bits = bits or (8,)
    some = keys if codes is None else codes
    c, w, s = (to_code.shape[-1], some.shape[2], some.shape[3]) if to_code is not None else (1, 1, 1)
    n, size = (1, 1) if pages is None else (pages.shape[2], keys.shape[3])
    append[(b * hkv * t,)](
        k_new, v_new, start, keys, values, start if scales is None else scales, some,
        start if to_code is None else to_code, start if offset is None else offset, start if pages is None else pages,
        *k_new.stride()[:3], *v_new.stride()[:3], *keys.stride()[:2], keys.stride(-2), *values.stride()[:2],
        values.stride(-2), keys.stride(2), values.stride(2), 0 if scales is None else scales.stride(1), hkv, t, s, n,
        D=d, DP=padded(d), C=c, PLACES=padded(w) * places_of(bits), W=w, BITS=bits, LABELS=labels, BLOCK_SIZE=size,
        PAGED=pages is not None, INT8=scales is not None, NATIVE=NATIVE, num_warps=4, launch_pdl=NATIVE,
    )  # fmt: skip
