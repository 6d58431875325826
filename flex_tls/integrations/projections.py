"""``fuse_projections``: projections of one input as one product, and steps' products by a kernel for few rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..skinny import skinny_linear, why_not_skinny

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Names of siblings that a Hugging Face decoder applies to the same input
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FUSED = "_flex_tls_product"


class _Product:
    """The product of siblings, or of one alone. Weights [sum of rows, columns]; holds an input until all have read."""

    def __init__(self, parts: list[nn.Linear], linear: Linear) -> None:
        self.linear, self.parts = linear, parts
        self.sizes = [part.out_features for part in parts]
        self.weight = _joined([part.weight.data for part in parts])
        self.bias = _joined([part.bias.data for part in parts]) if parts[0].bias is not None else None
        # The parameters stay, as views: a state dict is as before, and no weight is held twice
        for part, rows in zip(parts, _split(self.weight, self.sizes, 0), strict=True):
            part.weight.data = rows
        if self.bias is not None:
            for part, rows in zip(parts, _split(self.bias, self.sizes, 0), strict=True):
                part.bias.data = rows
        self._starts = [part.weight.data_ptr() for part in parts]
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def take(self, x: Tensor, i: int) -> Tensor:
        """Part ``i`` of the product with x [..., columns]; computed for the first part that asks."""
        # A traced call cannot ask
        if not torch.compiler.is_compiling() and self.parts[i].weight.data_ptr() != self._starts[i]:
            raise RuntimeError(
                "fused projections: expected weights where fuse_projections laid them, got others: the model was moved,"
                " cast, copied or loaded with assign=True; call unfuse_projections(model), and fuse again"
            )
        if self._input is not x or self._outputs[i] is None:
            self._input = x
            self._outputs = list(_split(self.linear(x, self.weight, self.bias), self.sizes, -1))
        out = self._outputs[i]
        assert out is not None
        self._outputs[i] = None
        if all(part is None for part in self._outputs):
            self._input, self._outputs = None, []
        return out


def fuse_projections(model: nn.Module, *, skinny: bool = False) -> int:
    """Compute q, k, v, and gate and up projections of every layer as one matrix product each; returns how many.

    In place; the same sums, though a longer product may add in another order. Weights are laid behind each other, one
    layer at a time, and held once: parameters become views and keep their names. :func:`unfuse_projections` undoes it.
    For inference; write weights in place alone, as ``load_state_dict`` does: a model that is moved, cast or copied
    while it is fused raises RuntimeError. Fused again, weights stay where they are.

    Args:
        model: a transformers decoder.
        skinny: compute every ``nn.Linear`` of the model, the LM head's too, by a kernel that reads weights as fast as
            memory gives them, where up to 4 rows (B * T) meet it: decode steps. More rows meet PyTorch's product.
            Needs triton, CUDA with compute capability 9.0 or newer, bfloat16, float16 or float32. Counts single
            products too.

    Raises:
        ValueError: nothing to fuse: no plain ``nn.Linear`` siblings (quantised weights, another model, fused already,
            a forward of their own); ``skinny`` where its kernel cannot run (says why). The model is as it was.
    """
    families = [parts for module in model.modules() for names in SIBLINGS if (parts := _siblings(module, names))]
    if not families:
        raise ValueError(
            f"model: expected layers with {' or '.join(map('/'.join, SIBLINGS))} as torch.nn.Linear, found none in "
            f"{type(model).__name__}; quantised weights and layers with a forward of their own (accelerate's hooks) "
            "cannot be fused, and a model is fused once: unfuse_projections(model) before it is fused otherwise"
        )
    if skinny:
        taken = {id(part) for parts in families for part in parts}
        for name, part in model.named_modules():
            if isinstance(part, nn.Linear) and _is_plain(part):
                if obstacle := why_not_skinny(part.weight):
                    raise ValueError(f"skinny: {name}: {obstacle}; leave it out")
                if id(part) not in taken:
                    families.append([part])
    for parts in families:
        product = _Product(parts, skinny_linear if skinny else F.linear)
        for i, part in enumerate(parts):
            # An attribute of this one module: no class is patched
            object.__setattr__(part, FUSED, product)
            object.__setattr__(part, "forward", partial(product.take, i=i))
    return len(families)


def unfuse_projections(model: nn.Module) -> int:
    """Undo :func:`fuse_projections`; returns how many products were taken apart, 0 if there were none."""
    products = set()
    for module in model.modules():
        if FUSED in vars(module):
            products.add(vars(module)[FUSED])
            object.__delattr__(module, "forward")
            object.__delattr__(module, FUSED)
    return len(products)


def _siblings(module: nn.Module, names: tuple[str, ...]) -> list[nn.Linear]:
    """The parts of one product; empty where they are not all there, or not alike."""
    parts: list[Any] = [getattr(module, name, None) for name in names]
    return parts if all(map(_is_plain, parts)) and _alike(parts) else []


def _is_plain(module: Any) -> bool:
    """A linear layer of plain weights that nobody has given another forward, as accelerate does to move weights."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return type(module.weight.data) is Tensor and module.weight.device.type != "meta"


def _split(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    return x.split(sizes, dim=dim)  # type: ignore[no-untyped-call,no-any-return,unused-ignore]


def _joined(parts: list[Tensor]) -> Tensor:
    """Parts behind each other; copied, unless they lie so already, as they do after :func:`unfuse_projections`."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous() or not _share(part, first):
            return torch.cat(parts)
        end += part.nbytes
    n = sum(part.shape[0] for part in parts)
    return first.as_strided((n, *first.shape[1:]), first.stride())


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _alike(parts: list[nn.Linear]) -> bool:
    kinds = {
        (part.in_features, part.weight.dtype, part.weight.device, None if part.bias is None else part.bias.dtype)
        for part in parts
    }
    return len(kinds) == 1
