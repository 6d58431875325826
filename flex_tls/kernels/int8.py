"""Keys and values in 8 bits; for finite numbers bit for bit :mod:`flex_tls.offload.int8`, which says why."""

from __future__ import annotations

import triton
import triton.language as tl

TINY: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def quantised(x):
    """Vectors x [R, D] as codes int8 [R, D] and scales float32 [R]."""
    x = x.to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), 1) * (1 / 127), TINY)
    scales = ((scales.to(tl.int32, bitcast=True) + 128) & -256).to(tl.float32, bitcast=True)
    # The plain quotient is approximate
    return tl.floor(tl.div_rn(x, tl.broadcast_to(scales[:, None], x.shape)) + 0.5).to(tl.int8), scales


@triton.jit
def dequantised(codes, scales, dtype: tl.constexpr):
    """Codes [R, D] times scales [R]."""
    return (codes.to(tl.float32) * scales[:, None]).to(dtype)


@triton.jit
def round_trip(x):
    """A vector x [D] as its codes and scale give it back."""
    codes, scales = quantised(x[None])
    return tl.reshape(dequantised(codes, scales, x.dtype), x.shape)
