"""Caches with and without their keys and values in host memory, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from flex_tls.offload.int8 import dequantised, quantised
from torch import Tensor

import flex_tls as tls
from tests.integrations.models import SPARSE
from tests.offload.machine import poison


def cache_for(model: Any, offload: tls.OffloadConfig | None, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    arguments = {"max_len": 200, "backend": "reference", **kwargs}
    cache = tls.TLSCache(
        model.config, arguments.pop("cfg", SPARSE), batch_size=batch_size, offload=offload, dtype=torch.float32,
        device="cpu", **arguments,
    )  # fmt: skip
    for layer in cache.offloaded_layers:
        # Slots that nothing was written to must never be read
        poison(layer.opened().pool)
    return cache


def plain_cache_for(model: Any, offload: tls.OffloadConfig, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    """What ``offload`` must equal where it waits: no offload, over the keys and values that its store gives back."""
    cache = cache_for(model, None, batch_size, **kwargs)
    for layer in cache.tls_layers:
        if not cache.cfg.is_dense(layer.layer_idx) and layer.window is None:

            def write(k: Tensor, v: Tensor, step: Any, write: Any = layer._write) -> tuple[Tensor, Tensor]:
                held: tuple[Tensor, Tensor] = write(as_held(k, offload), as_held(v, offload), step)
                return held

            layer._write = write  # type: ignore[method-assign]
    return cache


def as_held(x: Tensor, offload: tls.OffloadConfig) -> Tensor:
    """Keys or values as the store gives them back."""
    return dequantised(*quantised(x), x.dtype) if offload.store_dtype == "int8" else x
