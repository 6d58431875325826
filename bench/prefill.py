"""Seconds to read a prompt: ours, in chunks, index included, and transformers' sdpa over the whole prompt at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import flex_tls as tls
from flex_tls.integrations.huggingface import enabled
from flex_tls.prefill import read_prompt

from .decode import model_row
from .rows import Machine, ModelRow

DEFAULT = ("ours[4096]", "ours[8192]", "ours[16384]", "ours_flash[8192]", "transformers_sdpa")


def measure(
    model: Any, cfg: tls.TLSConfig, case: str, batch_size: int, context: int, names: Iterable[str], runs: int,
    machine: Machine, floor_ms: float,
) -> list[ModelRow]:  # fmt: skip
    """Rows of one context. ``ours[N]``: chunks of N tokens; ``ours_flash[N]``: by flash attention alone."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    cache = tls.TLSCache(
        model.config, cfg, batch_size=batch_size, max_len=context + 64, dtype=model.dtype, device=device
    )
    ids = torch.randint(0, model.config.vocab_size, (batch_size, context), device=device)
    calls = {name: partial(_call(name), model, cache, ids) for name in names}
    first: dict[str, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    # The first call of each builds cuDNN's plans and picks cuBLAS's kernels
    for i in range(runs + 1):
        for name, call in calls.items():
            seconds = _timed(call, cuda)
            print(f"  {name}: {seconds:.2f} s{' (first call)' if i == 0 else ''}", flush=True)
            if i:
                taken[name].append(seconds * 1e6)
            else:
                first[name] = seconds
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return [
        model_row("prefill", model, case, cache, context, name, us, first[name], peak, floor_ms, machine,
                  tokens=context)
        for name, us in taken.items()
    ]  # fmt: skip


def _call(name: str) -> Callable[..., None]:
    kind, _, chunk = name.rstrip("]").partition("[")
    if kind == "transformers_sdpa":
        return _transformers
    if kind not in ("ours", "ours_flash") or not chunk.isdigit():
        raise ValueError(f"providers: expected transformers_sdpa, ours[CHUNK] or ours_flash[CHUNK], got {name!r}")
    return partial(_ours, chunk_tokens=int(chunk), flash=kind == "ours_flash")


def _ours(model: Any, cache: tls.TLSCache, ids: torch.Tensor, *, chunk_tokens: int, flash: bool) -> None:
    kernels = [SDPBackend.FLASH_ATTENTION] if flash else list(SDPBackend.__members__.values())[1:]
    cache.reset()
    with torch.no_grad(), enabled(model), sdpa_kernel(kernels):
        read_prompt(model, cache, ids, chunk_tokens=chunk_tokens)
    # What the first sparse step would do
    cache.fit_where_due()


def _transformers(model: Any, cache: tls.TLSCache, ids: torch.Tensor) -> None:
    from transformers import DynamicCache

    with torch.no_grad():
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)


def _timed(call: Callable[[], None], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
