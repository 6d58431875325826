"""Keys and values in 8 bits; for finite numbers bit for bit :mod:`flex_tls.offload.int8`, which says why."""

from __future__ import annotations

import triton
import triton.language as tl

TINY: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def quantised(x):
    """A vector x [D] as codes int8 [D] and their scale float32."""
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0) * (1 / 127), TINY)
    scale = ((scale.to(tl.int32, bitcast=True) + 128) & -256).to(tl.float32, bitcast=True)
    # The plain quotient is approximate
    return tl.floor(tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + 0.5).to(tl.int8), scale


@triton.jit
def dequantised(codes, scale, dtype: tl.constexpr):
    """Codes times scales of a shape that broadcasts."""
    return (codes.to(tl.float32) * scale).to(dtype)
