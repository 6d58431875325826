"""``fuse_projections``: projections of one input as one matrix product, for fewer and longer streams of weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Names of siblings that a Hugging Face decoder applies to the same input
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FUSED = "_flex_tls_product"


class _Product:
    """The one matrix product of siblings. Weights [sum of their rows, columns]; holds an input until all have read."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.sizes = [part.out_features for part in parts]
        self.weight = torch.cat([part.weight.data for part in parts])
        self.bias = torch.cat([part.bias.data for part in parts]) if parts[0].bias is not None else None
        # The parameters stay, as views: a state dict is as before, and no weight is held twice
        for part, rows in zip(parts, _split(self.weight, self.sizes, 0), strict=True):
            part.weight.data = rows
        if self.bias is not None:
            for part, rows in zip(parts, _split(self.bias, self.sizes, 0), strict=True):
                part.bias.data = rows
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def take(self, x: Tensor, i: int) -> Tensor:
        """Part ``i`` of the product with x [..., columns]; computed for the first part that asks."""
        if self._input is not x or self._outputs[i] is None:
            self._input = x
            self._outputs = list(_split(F.linear(x, self.weight, self.bias), self.sizes, -1))
        out = self._outputs[i]
        assert out is not None
        self._outputs[i] = None
        if all(part is None for part in self._outputs):
            self._input, self._outputs = None, []
        return out


def fuse_projections(model: nn.Module) -> int:
    """Compute q, k, v, and gate and up projections of every layer as one matrix product each; returns how many.

    In place; the same sums, though a longer product may add in another order. Weights are laid behind each other, one
    layer at a time, and held once: parameters become views and keep their names. :func:`unfuse_projections` undoes it.
    For inference: do not move or cast the model while it is fused.

    Raises:
        ValueError: nothing to fuse: no plain ``nn.Linear`` siblings (quantised weights, another model, fused already).
    """
    n = 0
    for module in model.modules():
        for names in SIBLINGS:
            parts: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear and FUSED not in vars(part) for part in parts) and _alike(parts):
                product = _Product(parts)
                for i, part in enumerate(parts):
                    # An attribute of this one module: no class is patched
                    object.__setattr__(part, FUSED, product)
                    object.__setattr__(part, "forward", partial(product.take, i=i))
                n += 1
    if not n:
        raise ValueError(
            f"model: expected layers with {' or '.join(map('/'.join, SIBLINGS))} as torch.nn.Linear, found none in "
            f"{type(model).__name__}; quantised weights cannot be fused, and a model is fused once"
        )
    return n


def unfuse_projections(model: nn.Module) -> int:
    """Undo :func:`fuse_projections`; returns how many products were taken apart, 0 if there were none."""
    products = set()
    for module in model.modules():
        if FUSED in vars(module):
            products.add(vars(module)[FUSED])
            object.__delattr__(module, "forward")
            object.__delattr__(module, FUSED)
    return len(products)


def _split(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    return x.split(sizes, dim=dim)  # type: ignore[no-untyped-call,no-any-return,unused-ignore]


def _alike(parts: list[nn.Linear]) -> bool:
    kinds = {(part.in_features, part.weight.dtype, part.weight.device, part.bias is None) for part in parts}
    return len(kinds) == 1 and parts[0].weight.device.type != "meta"
