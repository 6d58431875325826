"""Keys and values in 8 bits: codes from -127 to 127, and one scale a token for its key and one for its value."""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of a float32 below the 16 that a scale keeps
_BELOW = 8


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] as codes int8 [..., D] and scales float32 [...], the largest magnitude over 127.

    A code is ``floor(x / scale + 1/2)``. A scale has 16 significant bits: fewer would not give the largest magnitude of
    a 16-bit dtype back, and with more, products with codes would not be exact. So what has been through here once comes
    through unchanged, in float32 and in both 16-bit dtypes. The least scale is the least normal number: zeros stay so.
    """
    scales = x.abs().amax(-1).float() * (1 / 127)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    scales = (scales.view(torch.int32) + 2 ** (_BELOW - 1) & -(2**_BELOW)).view(torch.float32)
    return (x / scales[..., None] + 0.5).floor().to(torch.int8), scales


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [..., D] times scales [...], rounded to ``dtype`` once."""
    return (codes * scales[..., None]).to(dtype)
