"""What an engine is compared with: Python dictionaries and sets, one pool of one row and head at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from flex_tls.offload import DevicePool, HostStore, LayerOffload, OffloadConfig
from flex_tls.offload.config import StoreDtype
from flex_tls.offload.transfers import QueuedTransfers
from torch import Tensor

SIZE = 16


@dataclass
class Model:
    """One pool: which slot holds which block, and when it was last needed."""

    n_slots: int
    block_of_slot: dict[int, int] = field(default_factory=dict)
    last_used: dict[int, int] = field(default_factory=dict)
    clock: int = 0

    def plan(self, selected: list[int], opened: list[int]) -> tuple[list[int], list[int]]:
        """(blocks that were resident, blocks evicted) of a step that selects and opens these."""
        self.clock += 1
        before = sorted(self.block_of_slot.values())
        needed = sorted({*selected, *opened})
        absent = sorted((block for block in needed if block not in before), key=lambda x: (x not in selected, x))
        free = [s for s in range(self.n_slots) if s not in self.block_of_slot]
        old = sorted(
            (s for s, block in self.block_of_slot.items() if block not in needed),
            key=lambda s: (self.last_used[s], s),
        )
        victims = sorted((free + old)[: len(absent)])
        assert len(victims) == len(absent)
        evicted = [self.block_of_slot[s] for s in victims if s in self.block_of_slot]
        self.block_of_slot.update(zip(victims, absent, strict=True))
        for s, block in self.block_of_slot.items():
            if block in needed:
                self.last_used[s] = self.clock
        return before, evicted

    def drop_from(self, first: int) -> None:
        self.block_of_slot = {s: block for s, block in self.block_of_slot.items() if block < first}


def make_engine(
    config: OffloadConfig, *, b: int = 2, hkv: int = 2, n_blocks: int = 12, n_slots: int = 6, d: int = 4,
    n_ahead: int = 2, dtype: torch.dtype = torch.float32, store_dtype: StoreDtype = "model",
) -> tuple[LayerOffload, QueuedTransfers]:  # fmt: skip
    store = HostStore(
        batch_size=b, n_kv_heads=hkv, n_blocks=n_blocks, block_size=SIZE, head_dim=d, dtype=dtype, pinned=False,
        store_dtype=store_dtype,
    )  # fmt: skip
    pool = DevicePool(
        batch_size=b, n_kv_heads=hkv, n_slots=n_slots, n_blocks=n_blocks, block_size=SIZE, head_dim=d, dtype=dtype,
        device=torch.device("cpu"), store_dtype=store_dtype,
    )  # fmt: skip
    # Whatever was never fetched must never be read
    poison(pool)
    transfers = QueuedTransfers()
    return LayerOffload(store, pool, config, n_ahead, transfers), transfers


def poison(pool: DevicePool, slots: tuple[int | Tensor, ...] = ()) -> None:
    """Make every number that these slots, by default all, give back a NaN; in 8 bits by their scales."""
    (pool.slots if pool.scales is None else pool.scales)[slots] = torch.nan


def table(pool: DevicePool, b: int, h: int) -> dict[int, int]:
    return {s: block for s, block in enumerate(pool.block_of_slot[b, h].tolist()) if block >= 0}


def listed(ids: Tensor, n_blocks: int) -> list[int]:
    return [i for i in ids.tolist() if i < n_blocks]
