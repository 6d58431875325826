"""``linear`` for few rows, as one custom op: a decode step's products, which wait for the weights alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import why_not_here

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of inputs that the kernel takes: with more, PyTorch's own product is as fast (docs/design.md, section 9)
MOST_ROWS = 4


def why_not_skinny(weight: Tensor) -> str | None:
    """What keeps a product with ``weight`` from the kernel; None if nothing does."""
    if weight.dtype not in DTYPES:
        return f"it takes bfloat16, float16 and float32, got {weight.dtype}"
    return why_not_here(weight.device)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x [..., K], weight [N, K], bias [N])``, by the kernel where x has up to ``MOST_ROWS`` rows.

    Summed in float32, in another order than by ``F.linear``, which takes all other inputs, and those with gradients.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if not 0 < rows <= MOST_ROWS or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return F.linear(x, weight, bias)
    out: Tensor = skinny_product(x.reshape(rows, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("flex_tls::skinny_product", mutates_args=())
def skinny_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Product x [M, K] @ weight [N, K]^T + bias [N] -> [M, N]."""
    from .kernels.skinny import launch_skinny_product

    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call,unused-ignore]
        return launch_skinny_product(x, weight, bias)


@skinny_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
