"""Ragged batches: rows are left aligned, token s of a row sits at slot s.

Hugging Face pads on the left; :func:`align_left` rolls such a batch into our layout on entry and
:func:`align_right` rolls results back. A row then gives the same numbers alone and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def align_left(x: Tensor, left_pad: Tensor, dim: int = 2) -> Tensor:
    """Move each row's padding from the front to the back along ``dim``. x [B, ...], left_pad int [B]; a copy."""
    return _roll(x, left_pad, dim)


def align_right(x: Tensor, left_pad: Tensor, dim: int = 2) -> Tensor:
    """Undo :func:`align_left`: move each row's padding from the back to the front along ``dim``."""
    return _roll(x, -left_pad, dim)


def _roll(x: Tensor, shift: Tensor, dim: int) -> Tensor:
    if shift.shape != (x.shape[0],):
        raise ValueError(f"left_pad: expected shape ({x.shape[0]},), one count a row, got {tuple(shift.shape)}")
    length = x.shape[dim]
    source = (torch.arange(length, device=x.device) + shift.to(x.device)[:, None]) % length
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], length
    return x.gather(dim, source.view(shape).expand(x.shape))
