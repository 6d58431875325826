"""Blocks of keys and values as host store and device pool hold them: in the model's dtype, or in 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .config import StoreDtype
from .int8 import dequantised, quantised


class Blocks(ABC):
    """What host store and device pool have in common: how they hold vectors, and how they give them back.

    A token's key and value lie side by side, and so do a block's tokens: a block of one KV head is one row of memory,
    and keys and values of a row and head are each one strided view over all of its tokens. In 8 bits the scales are a
    second such row: inside the first they would part the tokens, which a prompt's chunk writes in one copy a head.

    Attributes:
        dtype: of keys and values where they are attended to.
        scales: None, or, beside int8, float32 [B, HKV, X, BLOCK, 2]; X blocks or slots.
    """

    dtype: torch.dtype
    scales: Tensor | None

    @property
    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """[B, HKV, X, BLOCK, 2, D], keys at 0 and values at 1 of the last dimension but one; in 8 bits also scales."""

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """The parts as tokens: [B, HKV, X * BLOCK, 2, D] and, in 8 bits, [B, HKV, X * BLOCK, 2]."""
        return tuple(x.flatten(2, 3) for x in self.parts)

    @property
    def keys(self) -> Tensor:
        """[B, HKV, X * BLOCK, D], a view; in 8 bits what they stand for, a copy of all of them."""
        return self.unpacked(tuple(x[:, :, :, 0] for x in self.tokens))

    @property
    def values(self) -> Tensor:
        """[B, HKV, X * BLOCK, D], a view; in 8 bits what they stand for, a copy of all of them."""
        return self.unpacked(tuple(x[:, :, :, 1] for x in self.tokens))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys and values."""
        return sum(x[0, 0, 0].nbytes for x in self.parts)

    def packed(self, x: Tensor) -> tuple[Tensor, ...]:
        """Vectors x [..., D] as the parts hold them, on the device where they are."""
        return (x,) if self.scales is None else quantised(x)

    def unpacked(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Vectors [..., D] from what the parts hold."""
        if self.scales is None:
            return parts[0]
        codes, scales = parts
        return dequantised(codes, scales, self.dtype)


def empty_blocks(
    *shape: int, dtype: torch.dtype, store_dtype: StoreDtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """Zeros of ``shape`` [..., D] and None; in 8 bits codes and their scales [...], zeros too."""
    if store_dtype == "model":
        return torch.zeros(shape, dtype=dtype, device=device), None
    return torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape[:-1], device=device)
