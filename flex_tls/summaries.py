"""Block summaries: what level 1 knows of a block when it does not read the labels of its tokens.

Each kind is a class with the same four methods; ``SUMMARIES`` is the table that :class:`~flex_tls.KVIndex` reads.
Scores are in the units of ``q . k`` (unscaled).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class BlockSummary(Protocol):
    """Summary of every block of one layer; buffers are written in place."""

    tensors: dict[str, Tensor]

    def reset(self) -> None:
        """Forget everything."""

    def forget_from(self, first_block: Tensor) -> None:
        """Forget blocks ``first_block[b]`` and later; first_block int64 [B]."""

    def add(self, k: Tensor, block: Tensor) -> None:
        """Take keys k [B, HKV, T, D] into blocks ``block`` int64 [B, T]; N marks a key to ignore."""

    def scores(self, q: Tensor) -> Tensor:
        """Block scores of q [B, HKV, R, D]: float32 [B, HKV, R, N]; blocks without tokens hold anything."""


class MinMaxSummary:
    """Per-channel minimum and maximum: score = q . mid + radius * |q| . half-width (radius 1: Quest's upper bound)."""

    def __init__(self, b: int, h: int, n: int, d: int, dtype: torch.dtype, device: torch.device, radius: float) -> None:
        # One block more than needed: where ignored keys go
        self.tensors = {name: torch.empty(b, h, n + 1, d, dtype=dtype, device=device) for name in ("low", "high")}
        self.radius = radius
        self.reset()

    def reset(self) -> None:
        self.tensors["low"].fill_(torch.inf)
        self.tensors["high"].fill_(-torch.inf)

    def forget_from(self, first_block: Tensor) -> None:
        gone = _blocks_from(first_block, self.tensors["low"])
        self.tensors["low"].masked_fill_(gone, torch.inf)
        self.tensors["high"].masked_fill_(gone, -torch.inf)

    def add(self, k: Tensor, block: Tensor) -> None:
        where = block[:, None, :, None].expand(k.shape)
        k = k.to(self.tensors["low"].dtype)
        self.tensors["low"].scatter_reduce_(2, where, k, "amin")
        self.tensors["high"].scatter_reduce_(2, where, k, "amax")

    def scores(self, q: Tensor) -> Tensor:
        low, high = (self.tensors[name][:, :, :-1].float() for name in ("low", "high"))
        filled = high >= low
        mid = torch.where(filled, (high + low) / 2, 0.0)
        half = torch.where(filled, (high - low) / 2, 0.0)
        q = q.float()
        return q @ mid.transpose(-1, -2) + self.radius * (q.abs() @ half.transpose(-1, -2))


class MeanSummary:
    """Mean key of the block: score = q . mean."""

    def __init__(self, b: int, h: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        # A running sum needs float32 whatever the keys are
        self.tensors = {
            "total": torch.zeros(b, h, n + 1, d, device=device),
            "count": torch.zeros(b, h, n + 1, 1, device=device),
        }

    def reset(self) -> None:
        for buffer in self.tensors.values():
            buffer.zero_()

    def forget_from(self, first_block: Tensor) -> None:
        for buffer in self.tensors.values():
            buffer.masked_fill_(_blocks_from(first_block, buffer), 0.0)

    def add(self, k: Tensor, block: Tensor) -> None:
        where = block[:, None, :, None].expand(k.shape)
        self.tensors["total"].scatter_add_(2, where, k.float())
        self.tensors["count"].scatter_add_(2, where[..., :1], torch.ones_like(k[..., :1], dtype=torch.float32))

    def scores(self, q: Tensor) -> Tensor:
        mean = self.tensors["total"] / self.tensors["count"].clamp_min(1.0)
        return q.float() @ mean[:, :, :-1].transpose(-1, -2)


def _blocks_from(first_block: Tensor, buffer: Tensor) -> Tensor:
    """Bool [B, 1, N + 1, 1]: block number at least ``first_block[b]``."""
    number = torch.arange(buffer.shape[2], device=buffer.device)
    return (number >= first_block[:, None])[:, None, :, None]
