"""Tokens per second of a whole model at the largest batch that fits, by where keys and values are and what is read.

Providers do not fit beside one another: they are measured one after the other, in one process. Selections of offloaded
caches follow a made trace, as local as real text's.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from flex_tls.offload import host_bytes_available

import flex_tls as tls
from flex_tls.memory import free_bytes, longest_that_fits

from .offloaded import TracedStep, offload_figures, traced_step
from .steps import captured_step, fill
from .timing import samples, spread

# Tokens behind the context
ROOM_TOKENS = 64
# What a step takes beside weights and cache: activations, cuBLAS's workspace, the trace
SPARE_BYTES = 3 * 10**9
MOST_ROWS = 1024
# Of the host's memory, for all that is not keys and values
SPARE_SHARE = 0.1


class Way(NamedTuple):
    """How a cache is held and read. ``config``: changes to the budgets; None: every layer dense."""

    offload: tls.OffloadConfig | None = None
    config: dict[str, Any] | None = {}  # noqa: RUF012 - never written to


WAYS = {
    "dense": Way(config=None),
    "two_level": Way(),
    "offload_async": Way(tls.OffloadConfig(policy="async")),
    "offload_exact": Way(tls.OffloadConfig(policy="exact")),
    "offload_int8": Way(tls.OffloadConfig(policy="async", store_dtype="int8")),
    "offload_int8_all_sparse": Way(tls.OffloadConfig(policy="async", store_dtype="int8"), {"dense_layers": 0}),
    # Two and a half times the default budget in the pool, instead of twice: where the link is what bounds a step
    "offload_int8_all_sparse_wide": Way(
        tls.OffloadConfig(policy="async", store_dtype="int8", gpu_blocks=640), {"dense_layers": 0}
    ),
}
TRANSFORMERS = "transformers_offloaded"


def measure(
    model: Any, cfg: tls.TLSConfig, context: int, names: list[str], runs: int, *, host_bytes: int | None,
    most: int | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row of each provider. ``host_bytes``: what keys and values may take, all that is free by default.

    ``most``: rows of a batch at most.
    """
    for name in names:
        _release()
        start = time.perf_counter()
        if name == TRANSFORMERS:
            b, step = 1, _transformers(model, context)
        else:
            b = largest_batch(model, cfg, WAYS[name], context, host_bytes, most)
            if b == 0:
                print(f"  skipping {name}: not one row of {context:,} tokens fits", flush=True)
                continue
            print(f"  building {name}, {b} x {context:,} tokens", flush=True)
            cache = make_cache(model, cfg, WAYS[name], b, context)
            fill(cache, context)
            step = traced_step(model, cache) if cache.offloaded_layers else captured_step(model, cache)
        built = time.perf_counter() - start
        device = next(model.parameters()).device
        s = spread(samples({name: step}, device, runs)[name])
        found = offload_figures(cache) | step.selection if isinstance(step, TracedStep) else {}
        yield {
            "part": "throughput", "provider": name, "n_layers": model.config.num_hidden_layers, "B": b,
            "context": context, "block_size": cfg.block_size, "block_budget": cfg.block_budget,
            "token_budget": cfg.token_budget, "us_median": s.median_us, "us_p10": s.p10_us, "us_p90": s.p90_us,
            "runs": s.runs, "tokens_per_second": b * 1e6 / s.median_us, "build_seconds": built,
            "device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, **found,
        }  # fmt: skip
        if name != TRANSFORMERS:
            cache.close()
            del cache
        del step


def make_cache(model: Any, cfg: tls.TLSConfig, way: Way, b: int, context: int, *, empty: bool = False) -> tls.TLSCache:
    """A cache of ``b`` rows; ``empty`` allocates nothing, to be asked what it would take."""
    n_layers = model.config.num_hidden_layers
    cfg = dataclasses.replace(cfg, **({"dense_layers": n_layers} if way.config is None else way.config))
    device = next(model.parameters()).device
    return tls.TLSCache(
        model.config, cfg, batch_size=b, max_len=context + ROOM_TOKENS, dtype=model.dtype,
        device=None if empty else device, offload=way.offload,
    )  # fmt: skip


def largest_batch(
    model: Any, cfg: tls.TLSConfig, way: Way, context: int, host_bytes: int | None, most: int | None
) -> int:
    """Rows of ``context`` tokens that fit device and host; 0 if not one does."""
    device = next(model.parameters()).device
    room, there = free_bytes(device), host_bytes_available()
    host = min((n for n in (host_bytes, there and int(there * (1 - SPARE_SHARE))) if n is not None), default=None)

    def empty(b: int) -> tls.TLSCache:
        return make_cache(model, cfg, way, b, context, empty=True)

    fits = MOST_ROWS if most is None else most
    if room is not None:
        fits = longest_that_fits(lambda b: empty(b).device_nbytes, room - SPARE_BYTES, fits)
    if host is not None:
        fits = longest_that_fits(lambda b: empty(b).host_nbytes, host, fits)
    return fits


def _transformers(model: Any, context: int) -> Callable[[], object]:
    """One sequence, whose layers' keys and values come to the device in turn, all of them in every step."""
    from transformers import DynamicCache

    config, device = model.config, next(model.parameters()).device
    cache = DynamicCache(config=config, offloading=device.type == "cuda")
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for i in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, dtype=model.dtype, device=device).unbind(), i)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return step


def _release() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
