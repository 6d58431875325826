"""``linear`` for few rows, as one custom op: a decode step's products, which wait for the weights alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import DTYPES, why_not_here

# Rows of inputs that the kernel takes: with more, PyTorch's own product is as fast (docs/design.md, section 9)
MOST_ROWS = 4


def why_not_skinny(weight: Tensor) -> str | None:
    """What keeps a product with ``weight`` from the kernel; None if nothing does."""
    if weight.dtype not in DTYPES:
        return f"the kernel takes bfloat16, float16 and float32, got {weight.dtype}"
    if weight.stride(1) != 1:
        return f"the kernel reads weights along contiguous columns, got strides {weight.stride()}"
    return why_not_here(weight.device)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x [..., K], weight [N, K], bias [N])``, by the kernel where x has up to ``MOST_ROWS`` rows.

    Summed in float32, in another order than by ``F.linear``, which takes all other inputs: more rows, what asks for
    gradients or for autocasting, and what does not fit, for its errors.
    """
    k = x.shape[-1]
    rows = x.numel() // max(1, k)
    fits = (x.dtype, x.device, k) == (weight.dtype, weight.device, weight.shape[1])
    fits = fits and (bias is None or (bias.dtype, bias.device, bias.is_contiguous()) == (x.dtype, x.device, True))
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not fits or learns or not 0 < rows <= MOST_ROWS or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    x_rows = x.reshape(rows, k)
    out: Tensor = skinny_product(x_rows if x_rows.stride(1) == 1 else x_rows.contiguous(), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("flex_tls::skinny_product", mutates_args=())
def skinny_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product x [M, K] @ weight [N, K]^T + bias [N] -> [M, N], columns contiguous."""
    from .kernels.skinny import launch_skinny_product

    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call,unused-ignore]
        return launch_skinny_product(x, weight, bias)


@skinny_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
