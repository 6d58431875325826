"""``explain``: which attention each layer of a decode step takes, by which kernels, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from ._check import dtype_name
from .attention import BackendUnavailable, resolve_backend
from .cache import TLSCache
from .cache_layer import TLSLayer
from .config import TLSConfig
from .fused import why_not_fused
from .model_config import ModelShape, read_model_config
from .offload import OffloadConfig, transfer_path
from .offloaded_layer import OffloadedLayer
from .paged import WHY_NOT_PAGED
from .step import why_not_compiled

# Files of flex_tls.kernels
APPEND, FUSED, ATTEND_ALL, ATTEND_ARRIVED = "append", "two_level", "attend", "attend_arrived"
# Before a wait and after it
STAMP = "stamp"
# By the path that ``transfer_path`` says
TRANSFERS = {
    "kernel": "one kernel reads the pinned host memory (transfer='kernel')",
    "copy": "a copy a block, for which each step waits (transfer='copy')",
    "host": "copies by the host, as always on a CPU",
}
# Between the two levels of a layer that is offloaded: slots for blocks, and the blocks
OFFLOAD = ("plan_residency", "fetch_blocks")


@dataclass(frozen=True)
class LayerPlan:
    """One layer in one decode step.

    Attributes:
        layers: numbers of the layers that do the same.
        sparse: two-level attention; else full.
        why: what decided.
        kept_tokens: tokens that a query token attends to, per KV head.
        block_budget: tokens of the blocks that level 1 keeps, out of which ``kept_tokens`` are; None if not sparse.
        index_nbytes: bytes of each of the layers' index, 0 where it has none.
        backend: what a step of the model's own forward runs: ``"sdpa"`` or a backend of two-level attention; None:
            nothing can.
        kernels: Triton kernels that the compiled step runs, in order; empty if it cannot run.
    """

    layers: tuple[int, ...]
    sparse: bool
    why: str
    kept_tokens: int
    block_budget: int | None
    index_nbytes: int
    backend: str | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str`` of it is for people.

    Attributes:
        shape: of the model.
        cfg: budgets and index.
        batch_size, max_len: of the cache.
        dtype: of keys and values.
        device: where the step would run.
        context_tokens: tokens of the longest row, the step's own included.
        plans: one for every run of layers that do the same.
        why_not_compiled: what keeps ``tls.generate`` and, on CUDA, ``model.generate`` from the compiled step; None if
            nothing does.
        kv_nbytes, index_nbytes: of the whole cache, all layers.
        offload: of the cache; None without.
    """

    shape: ModelShape
    cfg: TLSConfig
    batch_size: int
    max_len: int
    dtype: torch.dtype
    device: torch.device
    context_tokens: int
    plans: tuple[LayerPlan, ...]
    why_not_compiled: str | None
    kv_nbytes: int
    index_nbytes: int
    offload: OffloadConfig | None

    @property
    def facts(self) -> dict[str, str]:
        """What is not of a layer, by name."""
        cfg, shape = self.cfg, self.shape
        kept = "all of them" if cfg.token_budget is None else f"{cfg.token_budget:,} of them"
        bits = " and ".join(map(str, dict.fromkeys(cfg.label_words(cfg.label_channels))))
        index = f"{cfg.label_channels} channels of {bits} bits" if cfg.index == "lowrank" else "one entry a block"
        by_layer = ""
        if cfg.block_shares is not None:
            by_layer = f", {min(cfg.block_shares):g} to {max(cfg.block_shares):g} times as many by layer"
        facts = {
            "model": f"{shape.model_type}, {shape.n_layers} layers, {shape.n_kv_heads} KV heads of {shape.head_dim}",
            "cache": f"{self.batch_size} x {self.max_len:,} tokens, {dtype_name(self.dtype)} on {self.device}",
            "bytes": f"keys and values {_gb(self.kv_nbytes)}, index {_gb(self.index_nbytes)}",
            "budgets": f"{cfg.block_budget:,} tokens in blocks of {cfg.block_size}{by_layer}, {kept} attended to",
            "index": f"{cfg.index}, {index}",
            "step": f"one token a row, {self.context_tokens:,} tokens in the longest",
            "compiled": "one graph a step, by tls.generate and model.generate"
            if self.why_not_compiled is None
            else self.why_not_compiled,
        }
        if self.offload is not None:
            path = TRANSFERS[transfer_path(self.device, self.offload)]
            facts["offload"] = f"policy {self.offload.policy!r}; blocks travel by {path}"
        return facts

    @property
    def table(self) -> list[tuple[str, ...]]:
        """One line for every plan, below a line of names."""
        names = ("layers", "attention", "block budget", "tokens", "index", "own forward", "compiled step", "why")
        return [names, *(self._line(plan) for plan in self.plans)]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = [f"{name}: {fact}" for name, fact in self.facts.items()]
        rows = (zip(cells, widths, strict=True) for cells in self.table)
        return "\n".join([*lines, *("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in rows)])

    def _line(self, plan: LayerPlan) -> tuple[str, ...]:
        first, last = plan.layers[0], plan.layers[-1]
        return (
            str(first) if first == last else f"{first}-{last}",
            "two-level" if plan.sparse else "full",
            "-" if plan.block_budget is None else f"{plan.block_budget:,}",
            f"{plan.kept_tokens:,}",
            _gb(plan.index_nbytes) if plan.index_nbytes else "-",
            plan.backend or "cannot run",
            " ".join(plan.kernels) or "-",
            plan.why,
        )


def explain(
    model: Any, cache: TLSCache, *, context_tokens: int | None = None, device: torch.device | str | None = None
) -> Explanation:
    """What a decode step of ``model`` with ``cache`` does in each layer, and why. Runs and allocates nothing.

    Args:
        model: the transformers model that the cache is for; its weights are not looked at.
        cache: empty or in use.
        context_tokens: tokens of the longest row in that step; what the cache holds and one more by default, or its
            ``max_len`` if it is empty.
        device: where the step runs; the cache's by default, or the model's if the cache has none yet.

    Raises:
        ValueError: a cache of another model, a context that does not fit.
    """
    shape = read_model_config(model.config)
    if shape._replace(dtype=cache.shape.dtype) != cache.shape:
        raise ValueError(f"cache: expected one made for this {shape.model_type}, {shape}, got {cache.shape}")
    if context_tokens is None:
        context_tokens = max(cache.seq_lens) + 1 if max(cache.seq_lens) else cache.max_len
    if not 1 <= context_tokens <= cache.max_len:
        raise ValueError(f"context_tokens: expected 1 to {cache.max_len}, the cache's max_len, got {context_tokens}")
    device = torch.device(device) if device is not None else cache.device or model.device
    why_not = why_not_compiled(cache, device)
    plans = [_plan(layer, cache, context_tokens, device, why_not is None) for layer in cache.tls_layers]
    same = groupby(plans, lambda plan: replace(plan, layers=()))
    return Explanation(
        shape=shape,
        cfg=cache.cfg,
        batch_size=cache.batch_size,
        max_len=cache.max_len,
        dtype=cache.dtype,
        device=device,
        context_tokens=context_tokens,
        plans=tuple(replace(plan, layers=tuple(x.layers[0] for x in run)) for plan, run in same),
        why_not_compiled=why_not,
        kv_nbytes=cache.kv_nbytes,
        index_nbytes=cache.index_nbytes,
        offload=cache.offload_config,
    )


def _plan(layer: TLSLayer, cache: TLSCache, context: int, device: torch.device, compiled: bool) -> LayerPlan:
    cfg, reach = layer.cfg, layer.reach(context)
    why = layer.why_dense(1, context)
    sparse = why is None
    runs: str | None = "sdpa"
    if why is None:
        why = f"{reach:,} tokens in sight, the budgets hold {cfg.held_tokens:,}"
        q = torch.empty(1, 1, 1, cache.shape.head_dim, dtype=cache.dtype, device=device)
        obstacle = why_not_fused(q, q, q, has_score_mod=False, scale=1.0)
        if isinstance(layer, OffloadedLayer):
            obstacle = WHY_NOT_PAGED
        try:
            runs = resolve_backend(cache.backend, device, obstacle)
        except BackendUnavailable as error:
            runs, why = None, str(error)
        else:
            if runs != "triton" and obstacle is not None and cache.backend == "auto":
                why += f"; not triton: {obstacle}"
    kernels: tuple[str, ...] = (APPEND, FUSED) if sparse else (APPEND, ATTEND_ALL)
    if isinstance(layer, OffloadedLayer):
        # A context that the budgets hold is selected whole
        kernels = (APPEND, FUSED, *OFFLOAD, FUSED)
        if cache.offload_config is not None and cache.offload_config.may_wait:
            kernels += (STAMP, STAMP, ATTEND_ARRIVED)
    return LayerPlan(
        layers=(layer.layer_idx,),
        sparse=sparse,
        why=why,
        kept_tokens=cfg.held_tokens if sparse else reach,
        block_budget=cfg.kept_blocks * cfg.block_size if sparse else None,
        index_nbytes=0 if cfg.is_dense(layer.layer_idx) else _index_nbytes(cache),
        backend=runs,
        kernels=kernels if compiled else (),
    )


def _index_nbytes(cache: TLSCache) -> int:
    """Bytes of one layer's index: those that have one have the same."""
    return cache.index_nbytes // sum(not cache.cfg.is_dense(i) for i in range(cache.shape.n_layers))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
