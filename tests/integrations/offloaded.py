"""Caches with and without their keys and values in host memory, on the CPU."""

from __future__ import annotations

from typing import Any

import torch

import flex_tls as tls
from tests.integrations.models import SPARSE


def cache_for(model: Any, offload: tls.OffloadConfig | None, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    arguments = {"max_len": 200, "backend": "reference", **kwargs}
    cache = tls.TLSCache(
        model.config, arguments.pop("cfg", SPARSE), batch_size=batch_size, offload=offload, dtype=torch.float32,
        device="cpu", **arguments,
    )  # fmt: skip
    for layer in cache.offloaded_layers:
        # Slots that nothing was written to must never be read
        layer.opened().pool.slots.fill_(torch.nan)
    return cache
