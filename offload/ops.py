"""Plan, transfers and join as operators that ``torch.compile`` traces and a CUDA graph captures.

Streams: two for each device, on which transfers run in the order of their starts, what rows wait for on the one and all
else on the other. Every start forks them from the current stream; :func:`await_arrival` joins what the last one's rows
wait for, :func:`join_transfers` everything. Ownership: all tensors but ``ids``, ``scores``, ``start`` and ``seq_lens``
belong to an engine and keep their addresses; the transfers read none of those four.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pool import DevicePool
from .residency import check_room, open_blocks
from .store import HostStore
from .transfers import side_stream, urgent_stream

_TABLES = (
    "slot_of_block", "block_of_slot", "last_used", "arrived", "clock", "begins", "lens", "fetch_block", "fetch_slot",
    "fetch_count", "waits", "counters", "missing_mass",
)  # fmt: skip
_LISTS = ("slot_of_block", "begins", "lens", "fetch_block", "fetch_slot", "fetch_count", "waits")


def plan(
    pool: DevicePool, ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, *, n_ahead: int,
    waits_above: float, resident_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`.residency.plan_step` and, for one query token, :func:`.residency.attended_blocks`, in one launch.

    ``scores`` may be wider than the pool has blocks; what is not of a selected block is not read.

    Returns int32 [B, HKV, A] and its counts [B, HKV].
    """
    check_room(pool, ids, n_ahead)
    attended: tuple[Tensor, Tensor] = plan_residency(
        ids, scores, start, seq_lens, *(getattr(pool, name) for name in _TABLES), n_ahead, pool.block_size,
        waits_above, resident_too,
    )  # fmt: skip
    return attended


def transfer(store: HostStore, pool: DevicePool, *, n_written: int, n_programs: int, may_wait: bool) -> None:
    """Start what the last plan listed. With ``may_wait`` what rows wait for is there after :func:`arrive`."""
    lists = (getattr(pool, name) for name in _LISTS)
    transfer_blocks(store.rows, store.scales, pool.slots, pool.scales, *lists, n_written, n_programs, may_wait)


def arrive(pool: DevicePool) -> None:
    """The current stream goes on after what rows wait for, of every :func:`transfer` with ``may_wait`` so far.

    What that took is added to ``pool.stalled``.
    """
    await_arrival(pool.slots, pool.stalled)


def join(pool: DevicePool) -> None:
    """The current stream goes on after every transfer that was started on the pool's device."""
    join_transfers(pool.slots)


def rejoin(device: torch.device) -> None:
    """Bring back into the current stream's capture what it has forked, if anything; see ``flex_tls/capture.py``."""
    current = torch.cuda.current_stream(device)
    for stream in (urgent_stream(device), side_stream(device)):
        with torch.cuda.stream(stream):
            forked = torch.cuda.is_current_stream_capturing()
        if forked:
            current.wait_stream(stream)


@torch.library.custom_op("flex_tls::plan_residency", mutates_args=_TABLES)
def plan_residency(
    ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, slot_of_block: Tensor, block_of_slot: Tensor,
    last_used: Tensor, arrived: Tensor, clock: Tensor, begins: Tensor, lens: Tensor, fetch_block: Tensor,
    fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, counters: Tensor, missing_mass: Tensor, n_ahead: int,
    block_size: int, waits_above: float, resident_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`flex_tls.kernels.plan_residency.launch_plan_residency`."""
    from ..kernels.plan_residency import launch_plan_residency

    with torch.cuda.device_of(ids):  # type: ignore[no-untyped-call,unused-ignore]
        return launch_plan_residency(
            ids.contiguous(), None if scores is None else scores.contiguous(), start, seq_lens, slot_of_block,
            block_of_slot, last_used, arrived, clock, begins, lens, fetch_block, fetch_slot, fetch_count, waits,
            counters, missing_mass, n_open=open_blocks(n_ahead, block_size), n_ahead=n_ahead, block_size=block_size,
            waits_above=waits_above, resident_too=resident_too,
        )  # fmt: skip


@plan_residency.register_fake
def _(
    ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, slot_of_block: Tensor, block_of_slot: Tensor,
    last_used: Tensor, arrived: Tensor, clock: Tensor, begins: Tensor, lens: Tensor, fetch_block: Tensor,
    fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, counters: Tensor, missing_mass: Tensor, n_ahead: int,
    block_size: int, waits_above: float, resident_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, hkv, w = ids.shape
    return ids.new_empty(b, hkv, block_of_slot.shape[2] if resident_too else w), ids.new_empty(b, hkv)


@torch.library.custom_op("flex_tls::transfer_blocks", mutates_args=("rows", "scales", "slots", "slot_scales"))
def transfer_blocks(
    rows: Tensor, scales: Tensor | None, slots: Tensor, slot_scales: Tensor | None, slot_of_block: Tensor,
    begins: Tensor, lens: Tensor, fetch_block: Tensor, fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor,
    n_written: int, n_programs: int, may_wait: bool,
) -> None:  # fmt: skip
    """:func:`flex_tls.kernels.fetch_blocks.launch_fetch_blocks`, first for rows that wait, on streams of their own."""
    from ..kernels.fetch_blocks import launch_fetch_blocks

    parts = (rows, scales, slots, slot_scales)
    lists = (slot_of_block, begins, lens, fetch_block, fetch_slot, fetch_count, waits)
    if not slots.is_cuda:
        for waiting in (True, False):
            launch_fetch_blocks(
                *parts, *lists, n_written=0 if waiting else n_written, n_programs=n_programs, waiting=waiting
            )
        return
    side = side_stream(slots.device)
    with torch.cuda.device_of(slots):  # type: ignore[no-untyped-call,unused-ignore]
        side.wait_stream(torch.cuda.current_stream())
        if may_wait:
            urgent = urgent_stream(slots.device)
            urgent.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(urgent):
                launch_fetch_blocks(*parts, *lists, n_written=0, n_programs=n_programs, waiting=True)
            # Nobody waits for the rest: it leaves the link to these. And whoever joins the one stream joins both
            side.wait_stream(urgent)
        with torch.cuda.stream(side):
            launch_fetch_blocks(*parts, *lists, n_written=n_written, n_programs=n_programs, waiting=False)


@transfer_blocks.register_fake
def _(*arguments: Any) -> None:
    return None


# Whoever reads scales reads slots too, so that these alone keep a traced step in order
@torch.library.custom_op("flex_tls::join_transfers", mutates_args=("slots",))
def join_transfers(slots: Tensor) -> None:
    """The current stream waits for the side stream of the device; nothing on a CPU."""
    if slots.is_cuda:
        torch.cuda.current_stream(slots.device).wait_stream(side_stream(slots.device))


@join_transfers.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.library.custom_op("flex_tls::await_arrival", mutates_args=("slots", "stalled"))
def await_arrival(slots: Tensor, stalled: Tensor) -> None:
    """The current stream waits for the blocks that rows wait for, and measures how long; nothing on a CPU."""
    from ..kernels.stamp import launch_stamp

    if slots.is_cuda:
        with torch.cuda.device_of(slots):  # type: ignore[no-untyped-call,unused-ignore]
            launch_stamp(stalled, after=False)
            torch.cuda.current_stream(slots.device).wait_stream(urgent_stream(slots.device))
            launch_stamp(stalled, after=True)


@await_arrival.register_fake
def _(*arguments: Any) -> None:
    return None


class KernelTransfers:
    """By one kernel on ``n_programs`` programs, beside the step; nothing waits on the host.

    On a CPU, for tests, the kernel is interpreted and all is done at once.
    """

    def __init__(self, device: torch.device, n_programs: int) -> None:
        self.side = side_stream(device) if device.type == "cuda" else None
        self.n_programs = n_programs

    def start(self, store: HostStore, pool: DevicePool, n_written: int, may_wait: bool) -> None:
        """See :class:`.transfers.Transfers`."""
        transfer(store, pool, n_written=n_written, n_programs=self.n_programs, may_wait=may_wait)
        if may_wait:
            arrive(pool)

    def join(self) -> None:
        """See :class:`.transfers.Transfers`."""
        if self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)
