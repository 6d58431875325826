"""Shapes of the operator bench, and the suites that they make up."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

import flex_tls as tls
from flex_tls._check import dtype_name

# What the leanest provider reads of all input sets together: five times the L2 cache of an H100
ROTATED_BYTES = 250e6
MAX_SETS = 32
LENGTHS_K = (8, 16, 32, 48, 64, 96, 128, 256)
BATCH_SIZES = (1, 16, 4, 8, 2, 32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: one decoded token over S cached ones. Budgets in tokens per KV head."""

    name: str
    B: int
    HQ: int
    HKV: int
    D: int
    S: int
    block_size: int = tls.TLSConfig.block_size
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
    def rows(self) -> int:
        """R = B * HKV, selections that a call makes."""
        return self.B * self.HKV

    @property
    def n_blocks(self) -> int:
        """N."""
        return self.S // self.block_size

    @property
    def kept_blocks(self) -> int:
        """K."""
        return self.block_budget // self.block_size

    @property
    def fields(self) -> dict[str, Any]:
        """What a row says of the case."""
        shape = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {**shape, "case": self.name, "dtype": dtype_name(self.dtype)}

    def config(self, **options: Any) -> tls.TLSConfig:
        """The case's budgets as a configuration of ours."""
        budgets = {"block_size": self.block_size, "block_budget": self.block_budget, "token_budget": self.token_budget}
        return tls.TLSConfig(**{**budgets, **options})

    def kv_bytes(self, n_tokens: int) -> float:
        """Bytes of the keys and values of ``n_tokens`` tokens of every row and KV head."""
        return 2.0 * self.rows * n_tokens * self.D * self.dtype.itemsize

    def n_sets(self, device: torch.device) -> int:
        """Input sets to rotate, each with its own keys, values and indices, so that no call is served from cache.

        One is enough where a single call of the leanest provider (labels of D / 16 bytes a token, and the selected
        tokens) reads five times the cache.
        """
        if device.type != "cuda":
            return 2
        leanest = self.kv_bytes(self.token_budget) + self.rows * self.S * self.D / 16
        return min(MAX_SETS, math.ceil(ROTATED_BYTES / leanest))

    def needed_bytes(self, n_sets: int) -> float:
        """Memory that a run takes: keys, values, indices of all providers, masks, and what making them takes."""
        # A token of a KV head: our labels 16 bytes, Double Sparsity's D / 16, Quest's boxes of 2 D values a block, and
        # a byte of mask for each of some twelve providers
        beside = 16 + self.D / 16 + 2 * self.D * self.dtype.itemsize / self.block_size + 12
        return n_sets * (self.kv_bytes(self.S) + self.rows * self.S * beside) + 8e9


def _qwen3(size: str, heads: int, batch_size: int, length_k: int, budgets: tuple[int, int] | None = None) -> Case:
    """Qwen3's attention: 8 KV heads, head dimension 128, 32 (8B) or 40 (14B) query heads; default budgets."""
    name = f"qwen3-{size}-b{batch_size}-{length_k}k"
    shape: dict[str, int] = {"B": batch_size, "HQ": heads, "HKV": 8, "D": 128, "S": length_k * 1024}
    if budgets is None:
        return Case(name=name, **shape)
    block, token = budgets
    return Case(name=f"{name}-{block}-{token}", block_budget=block, token_budget=token, **shape)


def _blocks_of(batch_size: int, block_size: int) -> Case:
    base = _qwen3("8b", 32, batch_size, 96)
    return replace(base, name=f"{base.name}-block{block_size}", block_size=block_size)


def _tiny(batch_size: int) -> Case:
    # As odd as the kernels allow: a group of 3, few blocks
    return Case(name=f"tiny-b{batch_size}", B=batch_size, HQ=6, HKV=2, D=64, S=1024, block_budget=512, token_budget=200)


# The lengths of one batch size and model first, so that a run cut short has whole curves
_SWEEP = [
    _qwen3(size, heads, b, k)
    for batches in (BATCH_SIZES[:2], BATCH_SIZES[2:])
    for size, heads in (("8b", 32), ("14b", 40))
    for b in batches
    for k in LENGTHS_K
]
# Around the default (8192, 1024): one budget varied, then both in proportion
_BUDGETS = [
    _qwen3("8b", 32, b, 96, budgets)
    for b in (1, 16)
    for budgets in (
        *((block, 1024) for block in (2048, 4096, 16384)),
        *((8192, token) for token in (256, 512, 2048, 4096)),
        (2048, 256),
        (16384, 4096),
    )
]
_BLOCKS = [_blocks_of(b, size) for b in (1, 16) for size in (32, 64)]
_QUICK = [_tiny(1), _tiny(2)]
# One row, one block more than the budget: tuning calls every setting often, and interpreted calls take a second
_TINIEST = Case(name="tiniest", B=1, HQ=2, HKV=1, D=16, S=256, block_budget=192, token_budget=160)
CASES = {case.name: case for case in (*_SWEEP, *_BUDGETS, *_BLOCKS, *_QUICK, _TINIEST)}
TUNED = ("qwen3-8b-b1-96k", "qwen3-8b-b4-96k", "qwen3-8b-b16-96k", "qwen3-14b-b1-96k")
QUICK_TUNED = (_TINIEST.name,)


def dry(case: Case) -> Case:
    """The case as an interpreted kernel takes it: Triton's interpreter multiplies bfloat16 as integers."""
    return replace(case, dtype=torch.float32)


# Without FlexAttention, which compiles for seconds a case, and without dense forms that another one equals or beats
LEAN = (
    "sdpa_cudnn_gqa",
    "sdpa_flash",
    "sliding_window_triton",
    "quest_block_budget",
    "quest_token_budget",
    "double_sparsity",
    "triton_total",
    "triton_filter16",
    "triton_mixed*",
    "triton_wide",
    "triton_blocks_only",
    "triton_given_*",
)
# What else the fused kernel takes, beside FlexAttention
KINDS = (
    *(f"{backend}_{what}" for what in ("total", "box", "mean", "masked") for backend in ("triton", "flex")),
    "triton_softmax_max",
)


@dataclass(frozen=True)
class Suite:
    """Cases that answer one question. ``providers``: patterns."""

    cases: tuple[str, ...]
    providers: tuple[str, ...] = ("*",)


_BASES = ("qwen3-8b-b1-96k", "qwen3-8b-b16-96k")
SUITES = {
    "default": Suite(_BASES),
    "sweep": Suite(tuple(case.name for case in _SWEEP), LEAN),
    "budgets": Suite((*_BASES, *(case.name for case in _BUDGETS)), LEAN),
    "blocks": Suite((*_BASES, *(case.name for case in _BLOCKS)), LEAN),
    "kinds": Suite(_BASES, KINDS),
    "quick": Suite(tuple(case.name for case in _QUICK)),
}
