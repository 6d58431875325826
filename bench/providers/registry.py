"""The registry: what a provider is, and where it can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flex_tls.device import why_not_here

from ..cases import Case
from ..inputs import InputSet

Call = Callable[[], Tensor]
# "torch": anywhere; "cuda": a CUDA device; "triton": a CUDA device, or interpreted (TRITON_INTERPRET=1) for tests
Needs = Literal["torch", "cuda", "triton"]


class Job(NamedTuple):
    """Calls to time, one for each input set; each returns out [B, HKV, G, D] or [B, HQ, 1, D], as it comes."""

    calls: list[Call]
    # Bool [B, HKV, S] per input set: the tokens that the call attends to; None: all of them
    masks: list[Tensor | None]
    # Fewest bytes that one call of the task has to read
    must_read_bytes: float


Make = Callable[[Case, list[InputSet], "int | None"], Job]


@dataclass(frozen=True)
class Provider:
    """A row of the registry."""

    name: str
    stage: str
    make: Make
    needs: Needs
    # Whether the number of splits over the selection can be chosen from outside
    splits: bool

    def runs_here(self, case: Case, device: torch.device) -> bool:
        """Whether it can run the case on ``device``."""
        if self.needs == "torch" or device.type == "cuda":
            return True
        # Triton's interpreter (3.7) multiplies bfloat16 as integers
        return self.needs == "triton" and why_not_here(device) is None and case.dtype != torch.bfloat16


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, stage: str, *, needs: Needs = "torch", splits: bool = False) -> Callable[[Make], Make]:
    """Register a provider under ``name``."""

    def register(make: Make) -> Make:
        PROVIDERS[name] = Provider(name, stage, make, needs, splits)
        return make

    return register


def tokens_of(case: Case, numbers: Tensor) -> Tensor:
    """Bool [B, HKV, S]: every token of the blocks ``numbers`` int [B, HKV, K]."""
    kept = torch.zeros(case.B, case.HKV, case.n_blocks, dtype=torch.bool, device=numbers.device)
    return kept.scatter(2, numbers.long(), True).repeat_interleave(case.block_size, -1)
