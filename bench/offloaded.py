"""Decode steps of a model whose keys and values are in host memory, with selections as local as real text's.

Random weights select at random from step to step. So level 1 runs, and then a generated trace says what it chose:
blocks that overlap with the last steps' as they do on real text. Its look-up is a small kernel a layer that real steps
lack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from flex_tls.offload import ops
from torch import Tensor

import flex_tls as tls
from flex_tls import offloaded_layer, static
from flex_tls.decode import Loop
from flex_tls.fused_pool import Chosen
from flex_tls.integrations.huggingface import enabled
from flex_tls.offloaded_layer import OffloadedLayer
from flex_tls.paged import Scored

from .steps import Step, captured_step
from .trace import overlaps, trace

# Steps of a trace, which then begins again
TRACE_STEPS = 64
# Steps that warm the pools; on a CPU a dry run
WARM_STEPS = {"cuda": TRACE_STEPS, "cpu": 2}
# Rows of the first layer's trace whose overlaps are said: all are made by one rule
MEASURED_ROWS = 8

During = Callable[[], AbstractContextManager[object]]


class TracedStep:
    """A step of ``cache`` that selects by a trace; every call takes the trace's next choice."""

    def __init__(self, cache: tls.TLSCache, step: Step, clock: Tensor, overlap: tuple[float, float, float]) -> None:
        self.cache, self.step, self.clock, self.overlap = cache, step, clock, overlap

    def __call__(self) -> None:
        self.step()
        self.clock.add_(1)

    @property
    def selection(self) -> dict[str, Any]:
        """What rows say of it: see :class:`.rows.ModelRow`."""
        return {"trace": "made", "overlap_1_4_16": list(self.overlap)}

    def figures(self) -> dict[str, Any]:
        """The same, and the traffic since the pools were warm."""
        found = offload_figures(self.cache)
        return {**self.selection, "hit_rate": found["hit_rate"], "fetched_bytes": found["fetched_bytes"]}


def offloaded_step(
    model: Any, sparse: tls.TLSCache, offload: tls.OffloadConfig, *, during: During = nullcontext,
    is_captured: bool = True,
) -> TracedStep:  # fmt: skip
    """One step over what ``sparse`` holds; see :func:`traced_step`."""
    cache = tls.TLSCache(
        model.config, sparse.cfg, batch_size=sparse.batch_size, max_len=sparse.max_len, dtype=sparse.dtype,
        device=next(model.parameters()).device, offload=offload,
    )  # fmt: skip
    context, b = sparse.get_seq_length(), sparse.batch_size
    for layer, given in zip(cache.tls_layers, sparse.tls_layers, strict=True):
        keys, values = given.buffers()
        # Labels are shared; trace and, if steps append, lengths are not
        index: Any = copy.copy(given.index)
        if index is not None:
            index.seq_lens = index.seq_lens.clone()
            # As if fitted on all of it: no step fits anew
            index.fitted_tokens = context
        layer.index = index
        if isinstance(layer, OffloadedLayer):
            layer.opened().write(keys[:, :, :context], values[:, :, :context], [0] * b, [context] * b)
        else:
            layer.keys, layer.values, layer.is_initialized = keys, values, True
    cache.progress.advance(context)
    return traced_step(model, cache, during=during, is_captured=is_captured)


def traced_step(
    model: Any, cache: tls.TLSCache, *, during: During = nullcontext, is_captured: bool = True
) -> TracedStep:
    """One captured step; every replay decodes the same place, by the trace's next choice. Pools are warm then.

    ``during``: entered whenever the model itself runs. Without ``is_captured`` that is in every step, and the cache
    grows by a token each time.
    """
    device = next(model.parameters()).device
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    overlap = (0.0, 0.0, 0.0)
    for number, layer in enumerate(cache.offloaded_layers):
        index: Any = layer.index
        n_filled = cache.get_seq_length() // index.cfg.block_size + 1
        kept = min(layer.cfg.kept_blocks, n_filled)
        rows = cache.batch_size * index.n_kv_heads
        index.trace = trace(TRACE_STEPS, rows, n_filled, kept, device=device, seed=number)
        index.clock = clock
        if number == 0:
            overlap = overlaps(index.trace[:, :MEASURED_ROWS], n_filled)
        layer.prepare()
        # The trace warms it
        layer.opened().is_warm = True

    def running() -> ExitStack:
        stack = ExitStack()
        for context in (_traced_choices(), during()):
            stack.enter_context(context)
        return stack

    make = captured_step if is_captured else _uncaptured_step
    step = TracedStep(cache, make(model, cache, during=running), clock, overlap)
    for _ in range(WARM_STEPS[device.type]):
        step()
    for layer in cache.offloaded_layers:
        layer.opened().pool.clear_counters()
    return step


def _uncaptured_step(model: Any, cache: tls.TLSCache, *, during: During) -> Step:
    """The model's own forward, not compiled, as ``generate(compiled=False)`` runs it; every step appends a token."""
    ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=next(model.parameters()).device)
    loop = Loop(model, cache, ids)

    def step() -> None:
        with torch.no_grad(), enabled(model), during():
            next(loop.eager_steps(1))

    return step


@contextmanager
def no_side_stream() -> Iterator[None]:
    """Transfers by the same kernel, on the stream of whoever starts them: the step goes on when they are done."""

    def own(device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    with patch.object(ops, "side_stream", own), patch.object(ops, "urgent_stream", own):
        yield


@contextmanager
def no_residency() -> Iterator[None]:
    """Before each plan the pool forgets all blocks before the one that the step's token was written to.

    So what was selected is fetched again, and a step has to wait for it: for policy "exact". Forgetting is six small
    kernels a layer, which are timed too.
    """
    import flex_tls.kernels.plan_residency as planning

    real = planning.launch_plan_residency

    def launch(
        ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, slot_of_block: Tensor,
        block_of_slot: Tensor, *rest: Tensor, block_size: int, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        written = (start // block_size)[:, None, None]
        number = torch.arange(slot_of_block.shape[2], device=start.device)
        slot_of_block.masked_fill_(number < written, -1)
        block_of_slot.masked_fill_(block_of_slot < written, -1)
        return real(ids, scores, start, seq_lens, slot_of_block, block_of_slot, *rest, block_size=block_size, **options)

    with patch.object(planning, "launch_plan_residency", launch):
        yield


def offload_figures(cache: tls.TLSCache) -> dict[str, float]:
    """What the engines counted since the pools were warm; rates are means over layers, stalls and bytes of one step."""
    stats = list(cache.stats().values())
    return {
        "hit_rate": sum(s.hit_rate for s in stats) / len(stats),
        "fetched_bytes": sum(s.step_bytes_in for s in stats),
        "stall_us": sum(s.stall_us for s in stats),
        "host_bytes": sum(s.host_bytes for s in stats),
        "pool_bytes": sum(s.pool_bytes for s in stats),
    }


@contextmanager
def _traced_choices() -> Iterator[None]:
    """While a step is compiled, or runs uncompiled, level 1's choice is the trace's."""
    choose_blocks, score = static.choose_blocks, offloaded_layer.score

    def choose(q: Tensor, index: Any, cfg: tls.TLSConfig, scale: float, seq_lens: Tensor) -> Chosen:
        chosen = choose_blocks(q, index, cfg, scale, seq_lens)
        return chosen._replace(blocks=_traced(index))

    def scored(q: Tensor, index: Any, *rest: Any) -> Scored:
        found = score(q, index, *rest)
        chosen = found.chosen
        blocks = _traced(index).view(*chosen.indices.shape[:3], -1)
        counts = torch.full_like(chosen.counts, blocks.shape[-1])
        return found._replace(chosen=replace(chosen, indices=blocks, counts=counts))

    with patch.object(static, "choose_blocks", choose), patch.object(offloaded_layer, "score", scored):
        yield


def _traced(index: Any) -> Tensor:
    """Int32 [B * HKV, K]."""
    ids: Tensor = index.trace.index_select(0, index.clock % index.trace.shape[0])[0]
    return ids
