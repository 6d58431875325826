"""Shapes of the operator bench and their random inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import flex_tls as tls

# Selected bytes of all input sets together: five times the L2 cache of an H100
ROTATED_BYTES = 250e6
MAX_SETS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: one decoded token over S cached ones. Budgets in tokens per KV head."""

    name: str
    B: int
    HQ: int
    HKV: int
    D: int
    S: int
    block_size: int = 64
    block_budget: int = 8192
    token_budget: int = 1024
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.S % self.block_size or self.block_budget > self.S:
            raise ValueError(f"S: expected whole blocks and at least block_budget={self.block_budget}, got {self.S}")

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.HQ // self.HKV

    @property
    def n_blocks(self) -> int:
        """N."""
        return self.S // self.block_size

    @property
    def kept_blocks(self) -> int:
        """K."""
        return self.block_budget // self.block_size

    def kv_bytes(self, n_tokens: int) -> float:
        """Bytes of the keys and values of ``n_tokens`` tokens of every row and KV head."""
        return 2.0 * self.B * self.HKV * n_tokens * self.D * self.dtype.itemsize

    def n_sets(self, device: torch.device) -> int:
        """Input sets to rotate, each with its own keys and values, so that no call is served from cache."""
        if device.type != "cuda":
            return 2
        return max(2, min(MAX_SETS, math.ceil(ROTATED_BYTES / self.kv_bytes(self.block_budget))))


class InputSet(NamedTuple):
    """Inputs of one call: q [B, HQ, 1, D], k and v [B, HKV, S, D], and a random selection to be given."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: tls.BlockSelection
    tokens: tls.TokenSelection


def qwen3_8b(batch_size: int, n_tokens: int) -> Case:
    """Qwen3-8B's attention: 32 query heads, 8 KV heads, head dimension 128."""
    name = f"qwen3-8b-b{batch_size}-{n_tokens // 1024}k"
    return Case(name=name, B=batch_size, HQ=32, HKV=8, D=128, S=n_tokens)


def _tiny(batch_size: int) -> Case:
    # As odd as the kernels allow: a group of 3, few blocks
    return Case(name=f"tiny-b{batch_size}", B=batch_size, HQ=6, HKV=2, D=64, S=1024, block_budget=512, token_budget=200)


DEFAULT = ("qwen3-8b-b1-96k", "qwen3-8b-b16-96k")
SWEEP = tuple(f"qwen3-8b-b1-{k}k" for k in (8, 16, 32, 48, 64, 96, 128))
QUICK = ("tiny-b1", "tiny-b2")
CASES = {
    case.name: case
    for case in (
        *(qwen3_8b(b, k * 1024) for b in (1, 16) for k in (8, 16, 32, 48, 64, 96, 128)),
        _tiny(1),
        _tiny(2),
    )
}


def selection(case: Case, numbers: Tensor) -> tls.BlockSelection:
    """Block numbers [B, HKV, K], ascending, as a selection for one query token."""
    indices = numbers[:, :, None].to(torch.int32).contiguous()
    counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32, device=indices.device)
    return tls.BlockSelection(indices, counts, case.n_blocks, case.block_size, case.group, case.S)


def make_inputs(case: Case, device: torch.device) -> list[InputSet]:
    """Random input sets: normal q, k, v; K random blocks, and inside them ``token_budget`` random tokens."""
    torch.manual_seed(0)
    return [_input_set(case, device) for _ in range(case.n_sets(device))]


def _input_set(case: Case, device: torch.device) -> InputSet:
    rows = (case.B, case.HKV)
    q = torch.randn(case.B, case.HQ, 1, case.D, dtype=case.dtype, device=device)
    k, v = (torch.randn(*rows, case.S, case.D, dtype=case.dtype, device=device) for _ in range(2))
    numbers = torch.rand(*rows, case.n_blocks, device=device).topk(case.kept_blocks).indices.sort().values
    slots = (numbers[..., None] * case.block_size + torch.arange(case.block_size, device=device)).flatten(2)
    chosen = torch.rand(slots.shape, device=device).topk(case.token_budget).indices
    mask = torch.zeros(*rows, case.S, dtype=torch.bool, device=device)
    mask = mask.scatter(2, slots.gather(2, chosen), True)[:, :, None].contiguous()
    last = torch.full((case.B, 1), case.S - 1, device=device)
    return InputSet(q, k, v, selection(case, numbers), tls.TokenSelection.from_mask(mask, last, case.group))
