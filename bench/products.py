"""A decode step's matrix products one by one: few rows of inputs and a model's weights, by torch and by our kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flex_tls._check import dtype_name
from flex_tls.device import why_not_here
from flex_tls.skinny import MOST_ROWS, skinny_product

from .models import SIZES
from .rows import Machine, ProductRow
from .timing import interleave, n_passes, record

# Weights of all input sets together are larger than any L2 cache by far
ROTATED_BYTES = 4 * 10**8


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each weight of a step, siblings as one."""
    hidden, inner, _, heads, kv_heads, head_dim, vocab = SIZES[model]
    return {
        "gate_up": (2 * inner, hidden), "down": (hidden, inner), "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "o": (hidden, heads * head_dim), "k": (kv_heads * head_dim, hidden), "head": (vocab, hidden),
    }  # fmt: skip


def measure(
    model: str, m: int, device: torch.device, machine: Machine, runs: int, bytes_per_us: float
) -> Iterator[ProductRow]:
    """Rows of one model with ``m`` rows of inputs: ``torch``, on CUDA cuBLAS; ``skinny``, ours, up to four rows.

    ``rel_error`` against float64, of the first set of weights.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    providers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": F.linear}
    if m <= MOST_ROWS and why_not_here(device) is None:
        providers["skinny"] = partial(skinny_product, bias=None)
    for name, (n, k) in shapes(model).items():
        x = torch.randn(m, k, dtype=dtype, device=device)
        n_sets = max(2, min(32, ROTATED_BYTES // (n * k * dtype.itemsize) + 1)) if device.type == "cuda" else 2
        weights = [torch.randn(n, k, dtype=dtype, device=device) / k**0.5 for _ in range(n_sets)]
        truth = x.double() @ weights[0].double().T
        recordings = {
            provider: record([partial(call, x, w) for w in weights], device, n_passes(n_sets, False))
            for provider, call in providers.items()
        }
        for provider, figures in interleave(recordings, device, runs).items():
            error = (providers[provider](x, weights[0]).double() - truth).norm() / truth.norm()
            yield ProductRow(
                bench="products", case=model, B=m, provider=provider, product=name, N=n, K=k,
                dtype=dtype_name(dtype), floor_us=weights[0].nbytes / bytes_per_us,
                rel_error=float(error), **figures._asdict(), **machine._asdict(),
            )  # fmt: skip
