"""What a cache takes, and whether it fits before it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .cache_layer import Shared, new_index
from .memory import free_bytes, longest_that_fits
from .offload import OffloadConfig
from .offloaded_layer import OffloadedLayer


class Footprint(NamedTuple):
    """Bytes of a cache: keys and values on the model's device and in host memory, indexes, pools of slots."""

    kv_on_device: int
    kv_on_host: int
    indexes: int
    pools: int

    @property
    def on_device(self) -> int:
        """All that is on the model's device."""
        return self.kv_on_device + self.indexes + self.pools


def footprint(
    shared: Shared, offloaded: Sequence[OffloadedLayer], config: OffloadConfig | None, dtype: torch.dtype
) -> Footprint:
    """Of a cache with what ``shared`` says, of which ``offloaded`` layers are in host memory, pools as they are."""
    shape, meta = shared.shape, torch.device("meta")
    tokens = shared.progress.batch_size * shared.capacity_tokens * shape.n_kv_heads
    n_indexed = sum(not shared.cfg.is_dense(i) for i in range(shape.n_layers))
    away = 0 if config is None else tokens * config.token_bytes(shape.head_dim, dtype.itemsize)
    return Footprint(
        kv_on_device=(shape.n_layers - len(offloaded)) * tokens * 2 * shape.head_dim * dtype.itemsize,
        kv_on_host=len(offloaded) * away,
        indexes=n_indexed * new_index(shared, dtype, meta).nbytes,
        pools=0 if config is None else sum(layer.new_pool(config, dtype, meta).nbytes for layer in offloaded),
    )


def check_fits(takes: Callable[[int], Footprint], max_len: int, batch_size: int, device: torch.device) -> str:
    """What ``takes(max_len)`` needs on ``device``, in words; MemoryError, with what would fit, if it does not fit."""
    needed = takes(max_len)
    total = needed.on_device
    text = (
        f"TLSCache: {total:,} bytes needed on {device} ({total - needed.indexes:,} for keys and values, "
        f"{needed.indexes:,} for the index)"
    )
    room = free_bytes(device)
    if room is not None and total > room:
        fits = longest_that_fits(lambda n: takes(n).on_device, room, max_len)
        way = f"max_len={fits} is the longest that fits" if fits else "no length fits"
        raise MemoryError(f"{text}, {room:,} are free; {way} with batch_size={batch_size}, got max_len={max_len}")
    return text
