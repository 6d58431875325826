"""Labels whose channels have several widths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from flex_tls.labels import TokenLabels


class Width(NamedTuple):
    """Neighbouring channels of equally many bits."""

    channels: int
    bits: int


def widths(text: str) -> tuple[Width, ...]:
    """``"8x8+16x4"``: 8 channels of 8 bits, then 16 of 4."""
    return tuple(Width(*map(int, part.split("x"))) for part in text.split("+"))


def bytes_of(parts: Iterable[Width]) -> int:
    """Bytes of one token's label, in whole 32-bit words."""
    return -(-sum(part.channels * part.bits for part in parts) // 32) * 4


class MixedLabels(TokenLabels):
    """Labels in ``widths``; ``codes`` float32 [B, HKV, C, S] holds a whole number a channel, unpacked."""

    widths: ClassVar[tuple[Width, ...]]

    @classmethod
    def of(cls, parts: tuple[Width, ...]) -> type[MixedLabels]:
        """The class of labels in these widths."""
        return cast(type[MixedLabels], type("MixedLabels", (cls,), {"widths": parts}))

    @classmethod
    def empty(
        cls, b: int, h: int, s: int, d: int, *, dims: int, words: tuple[int, ...] | None, device: torch.device
    ) -> TokenLabels:
        """As in :class:`TokenLabels`, but for ``dims`` and ``words``."""
        n = sum(part.channels for part in cls.widths)
        labels = super().empty(b, h, s, d, dims=n, words=(8,), device=device)
        labels.codes = torch.zeros(b, h, n, s, device=device)
        return labels

    @property
    def levels(self) -> Tensor:
        """Float32 [C]: a channel's largest code."""
        return torch.cat([torch.full((part.channels,), 2.0**part.bits - 1) for part in self.widths])

    def encode(self, k: Tensor) -> Tensor:
        codes = (k.float() @ self.to_code + self.offset[:, :, None]).round()
        return codes.clamp_min(0.0).minimum(self.levels).transpose(-1, -2)

    def scores(self, q: Tensor, dims: int | None = None) -> Tensor:
        """As in :class:`TokenLabels`; what queries ask of each width is rounded to 8 bits by itself."""
        asked = q.float() @ self.to_query
        base = asked * self.low[:, :, None]
        exact = asked * self.step[:, :, None]
        parts = torch.split(exact, [part.channels for part in self.widths], dim=-1)  # type: ignore[no-untyped-call,unused-ignore]
        unit = torch.cat([x.abs().amax(-1, keepdim=True).expand_as(x) for x in parts], -1).clamp_min(1e-30) / 127
        rounded = (exact / unit + 0.5).floor() * unit
        base = base + (exact - rounded) * self.levels / 2
        return base.sum(-1, keepdim=True) + rounded @ self.codes
