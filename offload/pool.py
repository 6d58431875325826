"""The device pool: block slots of one layer, and the table that says which block sits where."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .blocks import Blocks, empty_blocks
from .config import StoreDtype

# What a step counts, per row and KV head; see :class:`DevicePool`
COUNTERS = ("steps", "selected", "missing", "fetched", "waits", "written")


class DevicePool(Blocks):
    """Slots for blocks, per row and KV head, because selections are. All buffers keep their addresses.

    Attributes:
        slots: [B, HKV, P, BLOCK, 2, D], of the model's dtype or int8, laid out as :class:`.blocks.Blocks`.
        scales: None, or, beside int8, float32 [B, HKV, P, BLOCK, 2].
        dtype: of keys and values where they are attended to.
        slot_of_block: int32 [B, HKV, N], the slot that holds a block; -1 for none.
        block_of_slot: int32 [B, HKV, P], the block that a slot holds; -1 for none.
        last_used: int32 [B, HKV, P], the step that last needed the slot's block.
        arrived: int32 [B, HKV, P], the step in which the slot's block was fetched.
        clock: int32 [B, HKV], steps planned so far.
        begins, lens: int32 [B, HKV], tokens of the row before and after the last planned step.
        fetch_block, fetch_slot: int32 [B, HKV, P], what the last step fetches and where to; past the count anything.
        fetch_count: int32 [B, HKV].
        waits: int32 [B, HKV], 1 where the last step waits for what it fetches.
        counters: int64 [B, HKV, 6], sums: steps that selected, selected blocks, those that were missing, fetched
            blocks, steps that waited for missing ones, tokens written.
        opening: int64 [B, HKV], those of the fetched blocks that came between steps, to open or warm the pool.
        missing_mass: float64 [B, HKV], sum over steps of the missing share of the selected blocks' estimated mass.
        stalled: int64 [B, HKV], nanoseconds that attention waited for blocks; rows and heads wait for one another.
    """

    def __init__(
        self, *, batch_size: int, n_kv_heads: int, n_slots: int, n_blocks: int, block_size: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, store_dtype: StoreDtype = "model",
    ) -> None:  # fmt: skip
        b, h, p = batch_size, n_kv_heads, n_slots
        self.slots, self.scales = empty_blocks(
            b, h, p, block_size, 2, head_dim, dtype=dtype, store_dtype=store_dtype, device=device
        )
        self.dtype = dtype

        def ints(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.slot_of_block = ints(b, h, n_blocks, fill=-1)
        self.block_of_slot = ints(b, h, p, fill=-1)
        self.last_used, self.arrived = ints(b, h, p), ints(b, h, p)
        self.clock, self.begins, self.lens = ints(b, h), ints(b, h), ints(b, h)
        self.fetch_block, self.fetch_slot = ints(b, h, p, fill=n_blocks), ints(b, h, p, fill=p)
        self.fetch_count, self.waits = ints(b, h), ints(b, h)
        self.counters = ints(b, h, len(COUNTERS), dtype=torch.int64)
        self.opening = ints(b, h, dtype=torch.int64)
        self.missing_mass = torch.zeros(b, h, dtype=torch.float64, device=device)
        self.stalled = ints(b, h, dtype=torch.int64)

    @property
    def n_blocks(self) -> int:
        """N."""
        return self.slot_of_block.shape[2]

    @property
    def n_slots(self) -> int:
        """P."""
        return self.slots.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.slots.shape[3]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Slots and, in 8 bits, scales."""
        return (self.slots,) if self.scales is None else (self.slots, self.scales)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Slots, scales and tables, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What steps add to, and :meth:`clear_counters` sets to zero."""
        return self.counters, self.opening, self.missing_mass, self.stalled

    @property
    def nbytes(self) -> int:
        """Bytes of slots, scales and tables."""
        return sum(x.nbytes for x in self.buffers.values())

    def places(self, positions: Tensor) -> Tensor:
        """Where in :attr:`tokens` tokens sit whose blocks are here: positions int64 [B, T] -> int64 [B, HKV, T]."""
        block = (positions // self.block_size)[:, None].expand(-1, self.slots.shape[1], -1)
        return self.slot_of_block.gather(2, block).long() * self.block_size + (positions % self.block_size)[:, None]

    def drop_from(self, first_block: Tensor) -> None:
        """Forget blocks ``first_block[b]`` and later; int64 [B]."""
        first = first_block[:, None, None]
        self.block_of_slot.masked_fill_(self.block_of_slot >= first, -1)
        number = torch.arange(self.n_blocks, device=first.device)
        self.slot_of_block.masked_fill_(number >= first, -1)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the former row ``rows[i]``; in place."""
        for buffer in self.buffers.values():
            buffer.copy_(buffer.index_select(0, rows))

    def resized(self, rows: Tensor) -> DevicePool:
        """A pool of other rows, of which row i is a copy of ``rows[i]``."""
        new = copy.copy(self)
        for name, buffer in self.buffers.items():
            setattr(new, name, buffer.index_select(0, rows))
        return new

    def reset(self) -> None:
        """Forget every block and every count."""
        self.drop_from(torch.zeros(self.slots.shape[0], dtype=torch.int64, device=self.slots.device))
        for buffer in (
            self.last_used, self.arrived, self.clock, self.begins, self.lens, self.fetch_count, self.waits,
        ):  # fmt: skip
            buffer.zero_()
        self.clear_counters()

    def clear_counters(self) -> None:
        """Count anew."""
        for total in self.sums:
            total.zero_()

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks and slots are a bijection and every number is in range. Synchronises."""
        n, p = self.n_blocks, self.n_slots
        slots, blocks = self.slot_of_block.cpu(), self.block_of_slot.cpu()
        assert bool(((slots >= -1) & (slots < p)).all()), "slot_of_block names a slot that does not exist"
        assert bool(((blocks >= -1) & (blocks < n)).all()), "block_of_slot names a block that does not exist"
        back = blocks.gather(2, slots.clamp_min(0).long())
        assert bool(((slots < 0) | (back == torch.arange(n))).all()), "a block's slot holds another block"
        back = slots.gather(2, blocks.clamp_min(0).long())
        assert bool(((blocks < 0) | (back == torch.arange(p))).all()), "a slot's block sits in another slot"
        clock = self.clock.cpu()[..., None]
        assert bool((self.last_used.cpu() <= clock).all()), "a slot was used in a step to come"
        assert bool((self.fetch_count.cpu() <= p).all()), "more blocks are fetched than there are slots"
