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
from flex_tls.decode import Loop
from flex_tls.fused import Chosen
from flex_tls.integrations.huggingface import enabled
from flex_tls.offloaded_layer import OffloadedLayer

from .trace import trace

# Steps of a trace, which then begins again; as many warm the pools
TRACE_STEPS = 64


def offloaded_step(model: Any, sparse: tls.TLSCache, offload: tls.OffloadConfig) -> Callable[[], object]:
    """One captured step over what ``sparse`` holds; every replay decodes the same place, by the trace's next choice."""
    device = next(model.parameters()).device
    clock = torch.zeros(1, dtype=torch.int64, device=device)
    cache = _offloaded(model, sparse, offload, clock)
    ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
    loop = Loop(model, cache, ids, progress=True)
    loop.start.copy_(torch.tensor(cache.seq_lens))
    with torch.no_grad(), enabled(model), _traced_choices():
        replay = loop.build(sparse=True)

    def step() -> None:
        if device.type == "cuda":
            replay()
        else:
            with torch.no_grad(), enabled(model), _traced_choices():
                replay()
        loop.start.sub_(1)
        clock.add_(1)

    for _ in range(TRACE_STEPS):
        step()
    stats = list(cache.stats().values())
    steps = stats[0].steps
    print(
        f"  offloaded, {offload.policy}: hit rate {sum(s.hit_rate for s in stats) / len(stats):.3f}, "
        f"{sum(s.bytes_in for s in stats) / steps / 1e6:.1f} MB in a step, "
        f"{sum(s.host_bytes for s in stats) / 1e9:.1f} GB on the host, "
        f"{sum(s.pool_bytes for s in stats) / 1e9:.2f} GB of slots",
        flush=True,
    )
    return step


def _offloaded(model: Any, sparse: tls.TLSCache, offload: tls.OffloadConfig, clock: Tensor) -> tls.TLSCache:
    cache = tls.TLSCache(
        model.config, sparse.cfg, batch_size=sparse.batch_size, max_len=sparse.max_len, dtype=sparse.dtype,
        device=clock.device, offload=offload,
    )  # fmt: skip
    context, b = sparse.get_seq_length(), sparse.batch_size
    for number, (layer, given) in enumerate(zip(cache.tls_layers, sparse.tls_layers, strict=True)):
        keys, values = given.buffers()
        if not isinstance(layer, OffloadedLayer):
            layer.keys, layer.values, layer.index = keys, values, given.index
            continue
        layer.opened().write(keys[:, :, :context], values[:, :, :context], [0] * b, [context] * b)
        index: Any = given.index
        layer.index = index
        n_filled = context // index.cfg.block_size + 1
        kept = min(index.cfg.kept_blocks, n_filled)
        index.trace = trace(TRACE_STEPS, b * index.n_kv_heads, n_filled, kept, device=clock.device, seed=number)
        index.clock = clock
        layer.prepare()
        # The trace warms it
        layer.opened().is_warm = True
    cache.progress.advance(context)
    return cache


@contextmanager
def _traced_choices() -> Iterator[None]:
    """While a step is compiled, level 1's choice is the trace's."""
    real = static.choose_blocks

    def choose(q: Tensor, index: Any, cfg: tls.TLSConfig, scale: float, seq_lens: Tensor) -> Chosen:
        chosen = real(q, index, cfg, scale, seq_lens)
        return chosen._replace(blocks=index.trace.index_select(0, index.clock % TRACE_STEPS)[0])

    static.choose_blocks = choose
    try:
        yield
    finally:
        static.choose_blocks = real
