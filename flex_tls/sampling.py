"""From logits to the next token, on the device, without looking at it from the host: part of a captured step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the names and the order of application are transformers'.

    Attributes:
        temperature: 0 takes the most likely token and ignores the four below.
        top_k: keep this many tokens.
        top_p: keep the most likely tokens that together hold this probability.
        min_p: keep tokens at least this share as likely as the most likely one.
        repetition_penalty: divide positive and multiply negative logits of tokens that occurred; also where greedy.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1 token, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a probability above 0 and at most 1, got {value}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected a number above 0, got {self.repetition_penalty}")

    def filtered(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits float [B, V] -> float32 [B, V], -inf where a token must not be drawn. ``seen`` bool [B, V]."""
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            # Summed from the least likely on, as transformers does: the same token is on the edge
            worst, order = logits.sort()
            beyond = worst.softmax(-1).cumsum(-1) <= 1 - self.top_p
            beyond[:, -1:].zero_()
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        if self.min_p is not None:
            share = logits.softmax(-1)
            logits = logits.masked_fill(share < self.min_p * share.amax(-1, keepdim=True), -torch.inf)
        return logits

    def draw(self, logits: Tensor, seen: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Next tokens int64 [B] of logits [B, V]."""
        logits = self.filtered(logits, seen)
        if self.temperature == 0:
            return logits.argmax(-1)
        # The smallest of exponential variates at rates p is token i with probability p_i
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(-1) / noise).argmax(-1)
