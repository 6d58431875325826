"""What moves blocks between host store and pool, beside the step; a step that waits goes on when they are there.

Every way has the same three methods. Between :meth:`start` and :meth:`join` the slots of ``pool.fetch_slot`` and the
host's rows of the step's own tokens belong to the transfers; nobody else may read or write them, nor the pool's lists.
Only rows that wait may read their slots when :meth:`start` has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter_ns
from typing import Protocol

import torch
from torch import Tensor

from .pool import DevicePool
from .store import HostStore


class Transfers(Protocol):
    """Carries out what :func:`flex_tls.offload.residency.plan_step` has listed."""

    def start(self, store: HostStore, pool: DevicePool, n_written: int, may_wait: bool) -> None:
        """Fetch now where ``pool.waits``; queue the other fetches, and the way to the host of the step's own tokens.

        ``n_written``: most tokens that a row was given since the last start; 0 if they are in the store already.

        ``may_wait`` says whether any row and head can wait at all: if not, nothing is launched to find out.
        """

    def join(self) -> None:
        """What follows comes after all transfers that were started."""


class QueuedTransfers:
    """For pools on the CPU: what a stream would do beside the step is queued, and done at the join.

    A scheduler that is deterministic, and that a test can drive: :meth:`run` does part of the queue at any moment.
    """

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def start(self, store: HostStore, pool: DevicePool, n_written: int, may_wait: bool) -> None:
        if self.queue:
            raise RuntimeError("transfers: expected a join before the next start, got an earlier step's transfers")
        waits = pool.waits.bool()
        if may_wait:
            with _stalling(pool):
                fetch(store, pool, waits)
        if n_written:
            self.queue.append(lambda: write_through(store, pool, n_written))
        for head in range(pool.waits.shape[1]):
            one = torch.zeros_like(waits)
            one[:, head] = True
            self.queue.append(lambda one=one: fetch(store, pool, one & ~waits))  # type: ignore[misc]

    def run(self, n: int) -> None:
        """Do the first ``n`` transfers of the queue."""
        for transfer in self.queue[:n]:
            transfer()
        del self.queue[:n]

    def join(self) -> None:
        self.run(len(self.queue))


class CopyTransfers:
    """A copy a block, on a side stream, from a list that is read on the host: each step waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.side = side_stream(device)

    def start(self, store: HostStore, pool: DevicePool, n_written: int, may_wait: bool) -> None:
        now = pool.waits.bool()
        if may_wait:
            with _stalling(pool):
                _copy_blocks(store, pool, now)
        self.side.wait_stream(torch.cuda.current_stream(pool.slots.device))
        with torch.cuda.stream(self.side):
            _copy_blocks(store, pool, ~now)
            _copy_tokens(store, pool, n_written)

    def join(self) -> None:
        torch.cuda.current_stream(self.side.device).wait_stream(self.side)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which all transfers of all caches run, in the order of their starts.

    All but those that somebody waits for: these have the :func:`urgent_stream`.
    """
    return _stream(_number(device), "side")


def urgent_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device for what somebody waits for, past all that other layers' starts have queued."""
    return _stream(_number(device), "urgent")


def _number(device: torch.device) -> int:
    # "cuda" and "cuda:0" are one device
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _stream(device_index: int, purpose: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device_index)  # type: ignore[no-untyped-call,unused-ignore]


@contextmanager
def _stalling(pool: DevicePool) -> Iterator[None]:
    """What is done inside stalls the step: its time, by the host's clock, from when the step's work so far is done."""

    def time_ns() -> int:
        if pool.slots.is_cuda:
            torch.cuda.current_stream(pool.slots.device).synchronize()
        return perf_counter_ns()

    began = time_ns()
    yield
    pool.stalled += time_ns() - began


def fetch(store: HostStore, pool: DevicePool, rows: Tensor) -> None:
    """Copy the listed blocks of the rows and heads ``rows`` bool [B, HKV] into their slots; store and pool on a CPU."""
    entry = torch.arange(pool.n_slots) < pool.fetch_count[..., None]
    row, head, i = (entry & rows[..., None]).nonzero(as_tuple=True)
    block, slot = (x[row, head, i].long() for x in (pool.fetch_block, pool.fetch_slot))
    for device, host in zip(pool.parts, store.parts, strict=True):
        device[row, head, slot] = host[row, head, block]


def write_through(store: HostStore, pool: DevicePool, n_written: int) -> None:
    """Copy the tokens that the planned step appended, at most ``n_written`` a row, from pool to store on a CPU."""
    for row, begin, end in _written(pool, n_written):
        position = torch.arange(begin, end)
        place = pool.places(position.expand(pool.slots.shape[0], -1))[row]
        head = torch.arange(place.shape[0])[:, None]
        for host, device in zip(store.tokens, pool.tokens, strict=True):
            host[row, head, position] = device[row, head, place]


def _written(pool: DevicePool, n_written: int) -> Iterator[tuple[int, int, int]]:
    """(row, first position, position after the last) of each row's new tokens. Synchronises."""
    if n_written:
        yield from zip(range(pool.lens.shape[0]), pool.begins[:, 0].tolist(), pool.lens[:, 0].tolist(), strict=True)


def _copy_blocks(store: HostStore, pool: DevicePool, rows: Tensor) -> None:
    entry = torch.arange(pool.n_slots, device=rows.device) < pool.fetch_count[..., None]
    row, head, i = (entry & rows[..., None]).nonzero(as_tuple=True)
    listed = torch.stack((row, head, pool.fetch_block[row, head, i].long(), pool.fetch_slot[row, head, i].long()), 1)
    for b, h, block, slot in listed.tolist():
        for device, host in zip(pool.parts, store.parts, strict=True):
            device[b, h, slot].copy_(host[b, h, block], non_blocking=True)


def _copy_tokens(store: HostStore, pool: DevicePool, n_written: int) -> None:
    for b, begin, end in _written(pool, n_written):
        position = torch.arange(begin, end, device=pool.slots.device).expand(pool.slots.shape[0], -1)
        for h, places in enumerate(pool.places(position)[b].tolist()):
            for at, place in zip(range(begin, end), places, strict=True):
                for host, device in zip(store.tokens, pool.tokens, strict=True):
                    host[b, h, at].copy_(device[b, h, place], non_blocking=True)
