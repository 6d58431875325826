"""Milliseconds of one decode step of a whole model, random weights in a real configuration.

Providers take turns over the same keys and values, which are really there: ours with two levels, ours with every layer
dense (in the same compiled, captured step, by a kernel as fast as cuDNN's), and what transformers offers.
"""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls._check import dtype_name
from flex_tls.integrations.projections import FUSED

from .offloaded import During, TracedStep, no_residency, no_side_stream, offloaded_step
from .rows import Machine, ModelRow
from .steps import Step, captured_step, fill
from .timing import samples, spread

# Tokens behind the context: what transformers' static cache appends while it is timed
ROOM_TOKENS = 256
TUNED = {"coordinate_descent_tuning": True}
# What torch.compile's mode "max-autotune" sets
AUTOTUNED = {"max_autotune": True, **TUNED}
# Inductor's kernels are set up while the one before still runs, as ours are
OVERLAPPED = {"triton.enable_pdl": True}
SKINNY = {"skinny": True}


class Bed:
    """A model and one cache for all contexts of a batch size, so that a step is compiled once."""

    def __init__(self, model: Any, cfg: tls.TLSConfig, batch_size: int, longest: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self._fused: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
        # Weights are laid once as fused projections want them: steps that are captured point to where they lie
        with self.projections({}):
            pass
        options: Any = {"batch_size": batch_size, "max_len": longest + ROOM_TOKENS}
        self.sparse = tls.TLSCache(model.config, cfg, dtype=model.dtype, device=self.device, **options)
        fill(self.sparse, longest)
        # Every layer dense, over the same buffers
        cfg = dataclasses.replace(cfg, dense_layers=model.config.num_hidden_layers)
        self.dense = tls.TLSCache(model.config, cfg, **options)
        for layer, shared in zip(self.dense.tls_layers, self.sparse.tls_layers, strict=True):
            layer.keys, layer.values = shared.buffers()
            layer.is_initialized = True
        self.dense.advance(longest)

    def set_context(self, context: int) -> None:
        """Cut both caches; contexts come from long to short."""
        for cache in (self.sparse, self.dense):
            cache.crop(context)

    @contextmanager
    def projections(self, options: Mapping[str, Any] | None) -> Iterator[None]:
        """The model with its projections fused as ``options`` say, None for not: while a step is built.

        The second time it is the same objects again, for which a step was compiled.
        """
        if options is None:
            yield
            return
        held = self._fused.get(repr(options))
        if held is None:
            tls.fuse_projections(self.model, **options)
            held = self._fused[repr(options)] = [
                (module, {name: vars(module)[name] for name in (FUSED, "forward")})
                for module in self.model.modules() if FUSED in vars(module)
            ]  # fmt: skip
        for module, attributes in held:
            vars(module).update(attributes)
        try:
            yield
        finally:
            tls.unfuse_projections(self.model)

    def buffers(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, HKV, length, D] of every layer, views."""
        return [tuple(x[:, :, :length] for x in layer.buffers()) for layer in self.sparse.tls_layers]  # type: ignore[misc]


def _ours(bed: Bed, *, dense: bool = False, options: Mapping[str, Any] | None = None) -> Step:
    return captured_step(bed.model, bed.dense if dense else bed.sparse, options=options)


def _offloaded(bed: Bed, *, during: During = nullcontext, is_captured: bool = True, **offload: Any) -> Step:
    return offloaded_step(bed.model, bed.sparse, tls.OffloadConfig(**offload), during=during, is_captured=is_captured)


def _inputs(bed: Bed) -> dict[str, Any]:
    b, context = bed.sparse.batch_size, bed.sparse.get_seq_length()
    return {
        "input_ids": torch.zeros(b, 1, dtype=torch.int64, device=bed.device),
        "position_ids": torch.full((b, 1), context, dtype=torch.int64, device=bed.device),
        "use_cache": True, "logits_to_keep": 1,
    }  # fmt: skip


def _transformers_static(bed: Bed) -> Step:
    """transformers' fastest: static cache, ``torch.compile(mode="reduce-overhead")``, sdpa. Appends in every step."""
    from transformers import StaticCache

    context = bed.sparse.get_seq_length()
    cache = StaticCache(config=bed.model.config, max_cache_len=context + ROOM_TOKENS)
    for layer, (keys, values) in zip(cache.layers, bed.buffers(context + ROOM_TOKENS), strict=True):
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        layer.keys, layer.values = keys, values
        layer.cumulative_length.fill_(context)
        for x in (keys, values):
            torch._dynamo.mark_static_address(x)
    forward = torch.compile(bed.model.forward, mode="reduce-overhead", fullgraph=True)
    inputs = _inputs(bed)

    def step() -> None:
        with torch.no_grad():
            forward(**inputs, past_key_values=cache)

    return step


def _transformers_default(bed: Bed) -> Step:
    """What ``generate`` does by default: dynamic cache, eager, sdpa. Every step copies keys and values, as there."""
    from transformers import DynamicCache

    inputs = _inputs(bed)
    cache = DynamicCache(config=bed.model.config)
    held = bed.buffers(bed.sparse.get_seq_length())

    def step() -> None:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            layer.dtype, layer.device = keys.dtype, keys.device
        if bed.device.type == "cuda":
            # The host is what bounds it: nothing may be queued ahead
            torch.cuda.synchronize()
        with torch.no_grad():
            bed.model(**inputs, past_key_values=cache)

    return step


@dataclasses.dataclass(frozen=True)
class Provider:
    """A way to decode. ``dense``: every layer is; ``copies``: of all keys and values.

    ``fused``: arguments of ``tls.fuse_projections``, None where projections stay single.
    """

    make: Callable[[Bed], Step]
    dense: bool = False
    fused: Mapping[str, Any] | None = None
    copies: int = 0


PROVIDERS = {
    "two_level": Provider(_ours),
    "dense": Provider(lambda bed: _ours(bed, dense=True), dense=True),
    "dense_tuned": Provider(lambda bed: _ours(bed, dense=True, options=TUNED), dense=True),
    "two_level_tuned": Provider(lambda bed: _ours(bed, options=TUNED)),
    "two_level_autotuned": Provider(lambda bed: _ours(bed, options=AUTOTUNED)),
    "two_level_fused": Provider(_ours, fused={}),
    "two_level_fused_tuned": Provider(lambda bed: _ours(bed, options=TUNED), fused={}),
    "two_level_skinny": Provider(_ours, fused=SKINNY),
    "dense_skinny": Provider(lambda bed: _ours(bed, dense=True), dense=True, fused=SKINNY),
    "two_level_overlapped": Provider(lambda bed: _ours(bed, options=OVERLAPPED)),
    "two_level_skinny_overlapped": Provider(lambda bed: _ours(bed, options=OVERLAPPED), fused=SKINNY),
    "dense_skinny_overlapped": Provider(
        lambda bed: _ours(bed, dense=True, options=OVERLAPPED), dense=True, fused=SKINNY
    ),
    "dense_overlapped": Provider(lambda bed: _ours(bed, dense=True, options=OVERLAPPED), dense=True),
    "offload_async": Provider(lambda bed: _offloaded(bed, policy="async")),
    "offload_async_int8": Provider(lambda bed: _offloaded(bed, policy="async", store_dtype="int8")),
    "offload_corrected": Provider(lambda bed: _offloaded(bed, policy="corrected")),
    "offload_exact": Provider(lambda bed: _offloaded(bed, policy="exact")),
    "offload_no_side_stream": Provider(lambda bed: _offloaded(bed, policy="async", during=no_side_stream)),
    "offload_no_residency": Provider(lambda bed: _offloaded(bed, policy="exact", during=no_residency)),
    # The host reads what to copy: no graph can hold that. The other is what to compare it with
    "offload_copy_uncaptured": Provider(
        lambda bed: _offloaded(bed, policy="async", transfer="copy", is_captured=False)
    ),
    "offload_async_uncaptured": Provider(lambda bed: _offloaded(bed, policy="async", is_captured=False)),
    "transformers_static": Provider(_transformers_static),
    "transformers_default": Provider(_transformers_default, copies=1),
}
DEFAULT = ("two_level", "dense", "transformers_static", "transformers_default")


def build(
    bed: Bed, names: Iterable[str], until: float = math.inf
) -> tuple[dict[str, Step], dict[str, float], list[str]]:
    """Steps that can be timed, the seconds that each took to build, and the names of those that failed.

    Those that would likely not be built by ``until``, of the monotonic clock, are left out: what is built is measured.
    """
    steps: dict[str, Step] = {}
    seconds: dict[str, float] = {}
    failed = []
    for name in names:
        needed = PROVIDERS[name].copies * bed.sparse.kv_nbytes
        free = torch.cuda.mem_get_info()[0] if bed.device.type == "cuda" else needed
        if free < needed:
            print(f"  skipping {name}: needs {needed / 1e9:.0f} GB more, {free / 1e9:.0f} GB are free", flush=True)
            continue
        if time.monotonic() + max(seconds.values(), default=0.0) > until:
            print(f"  no time to build {name}", flush=True)
            continue
        print(f"  building {name}", flush=True)
        start = time.perf_counter()
        try:
            with bed.projections(PROVIDERS[name].fused):
                step = PROVIDERS[name].make(bed)
                for _ in range(3):
                    step()
            steps[name] = step
        except Exception:  # noqa: BLE001 - one provider that cannot run must not cost the others their figures
            traceback.print_exc()
            failed.append(name)
        seconds[name] = time.perf_counter() - start
    return steps, seconds, failed


def measure(
    bed: Bed, case: str, names: Iterable[str], runs: int, machine: Machine, floor_ms: float, until: float = math.inf
) -> tuple[list[ModelRow], dict[str, Step], list[str]]:
    """Rows of providers over the bed's context, their steps, and the names of those that failed."""
    cuda = bed.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps, seconds, failed = build(bed, names, until)
    taken = samples(steps, bed.device, runs) if steps else {}
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return [
        model_row("decode", bed.model, case, bed.dense if PROVIDERS[name].dense else bed.sparse,
                  bed.sparse.get_seq_length(), name, us, seconds[name], peak, floor_ms, machine, tokens=1,
                  step=steps[name])
        for name, us in taken.items()
    ], steps, failed  # fmt: skip


def model_row(
    bench: str, model: Any, case: str, cache: tls.TLSCache, context: int, name: str, us: list[float], build_s: float,
    peak: int, floor_ms: float, machine: Machine, *, tokens: int, step: Step | None = None,
) -> ModelRow:  # fmt: skip
    """The row of samples ``us``, each of which brought ``tokens`` tokens a row; ``step`` is asked for its figures."""
    s, cfg = spread(us), cache.cfg
    figures = step.figures() if isinstance(step, TracedStep) else {}
    return ModelRow(
        bench=bench, case=case, B=cache.batch_size, n_layers=model.config.num_hidden_layers, context=context,
        max_len=cache.max_len, provider=name, block_budget=cfg.block_budget, token_budget=cfg.token_budget,
        block_size=cfg.block_size, dense_layers=cfg.dense_layers, dtype=dtype_name(model.dtype),
        ms_median=s.median_us / 1e3, ms_p10=s.p10_us / 1e3, ms_p90=s.p90_us / 1e3,
        ms_p99=sorted(us)[int(0.99 * (len(us) - 1) + 0.5)] / 1e3,
        runs=s.runs, tokens_per_second=tokens * cache.batch_size * 1e6 / s.median_us, weights_floor_ms=floor_ms,
        build_seconds=build_s, peak_bytes=peak, **figures, **machine._asdict(),
    )  # fmt: skip
