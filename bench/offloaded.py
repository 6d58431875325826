"""Decode steps of a model whose keys and values are in host memory, with selections as local as real text's.

Random weights select at random from step to step. So level 1 runs, and then a generated trace says what it chose:
blocks that overlap with the last steps' as they do on real text. Its look-up is a small kernel a layer that real steps
lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls import static
from flex_tls.fused_pool import Chosen
from flex_tls.offloaded_layer import OffloadedLayer

from .steps import captured_step
from .trace import trace

# Steps of a trace, which then begins again; as many warm the pools. On a CPU a dry run
TRACE_STEPS = {"cuda": 64, "cpu": 2}


def offloaded_step(model: Any, sparse: tls.TLSCache, offload: tls.OffloadConfig) -> Callable[[], object]:
    """One captured step over what ``sparse`` holds; see :func:`traced_step`."""
    cache = tls.TLSCache(
        model.config, sparse.cfg, batch_size=sparse.batch_size, max_len=sparse.max_len, dtype=sparse.dtype,
        device=next(model.parameters()).device, offload=offload,
    )  # fmt: skip
    context, b = sparse.get_seq_length(), sparse.batch_size
    for layer, given in zip(cache.tls_layers, sparse.tls_layers, strict=True):
        keys, values = given.buffers()
        if isinstance(layer, OffloadedLayer):
            layer.opened().write(keys[:, :, :context], values[:, :, :context], [0] * b, [context] * b)
            layer.index = given.index
        else:
            layer.keys, layer.values, layer.index = keys, values, given.index
    cache.progress.advance(context)
    step = traced_step(model, cache)
    for _ in range(TRACE_STEPS[cache.device.type]):
        step()
    found = offload_figures(cache)
    print(f"  offloaded, {offload.policy}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return step


def traced_step(model: Any, cache: tls.TLSCache) -> Callable[[], object]:
    """One captured step; every replay decodes the same place, by the trace's next choice. Pools are warm then."""
    device = next(model.parameters()).device
    n_steps = TRACE_STEPS[device.type]
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    traces = []
    for number, layer in enumerate(cache.offloaded_layers):
        index: Any = layer.index
        n_filled = cache.get_seq_length() // index.cfg.block_size + 1
        kept = min(layer.cfg.kept_blocks, n_filled)
        rows = cache.batch_size * index.n_kv_heads
        index.trace = trace(n_steps, rows, n_filled, kept, device=device, seed=number)
        index.clock = clock
        traces.append(index.trace)
        layer.prepare()
        # The trace warms it
        layer.opened().is_warm = True
    replay = captured_step(model, cache, during=_traced_choices)

    # The captured step reads the traces, whoever gives the same index others
    def step(_kept: list[Tensor] = traces) -> None:
        replay()
        clock.add_(1)

    for _ in range(n_steps):
        step()
    for layer in cache.offloaded_layers:
        layer.opened().pool.clear_counters()
    return step


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
    """While a step is compiled, level 1's choice is the trace's."""
    real = static.choose_blocks

    def choose(q: Tensor, index: Any, cfg: tls.TLSConfig, scale: float, seq_lens: Tensor) -> Chosen:
        chosen = real(q, index, cfg, scale, seq_lens)
        return chosen._replace(blocks=index.trace.index_select(0, index.clock % index.trace.shape[0])[0])

    static.choose_blocks = choose
    try:
        yield
    finally:
        static.choose_blocks = real
