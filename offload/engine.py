"""The engine of one layer: host store, pool, plan and transfers, kept in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from .config import OffloadConfig
from .memory import check_host_bytes, host_bytes_available
from .ops import KernelTransfers, arrive, plan, transfer
from .pool import COUNTERS, DevicePool
from .residency import attended_blocks, open_blocks, plan_step
from .store import HostStore
from .transfers import CopyTransfers, QueuedTransfers, Transfers, side_stream


@dataclass(frozen=True)
class LayerStats:
    """What one layer's engine did since it was made or cleared; rows and KV heads together.

    Attributes:
        transfer: how blocks travel, see :func:`transfer_path`.
        steps: decode steps.
        hit_rate: share of the selected blocks that were on the device when their step began.
        missing_mass: share of the selected blocks' estimated attention mass that was not, mean over steps.
        waits: share of steps that waited for missing blocks, mean over rows and KV heads.
        stall_us: microseconds that attention waited for blocks, mean over steps; 0 where the policy never waits.
        bytes_in, bytes_out: host to device and back, in all.
        step_bytes_in, step_bytes_out: the steps' own, mean over steps: without a prompt on its way to the host, and
            without what opens the pool to steps.
        pool_slots, used_slots: of all rows and KV heads.
        pool_bytes, host_bytes: of slots and tables, and of the host store.
    """

    transfer: str
    steps: int
    hit_rate: float
    missing_mass: float
    waits: float
    stall_us: float
    bytes_in: int
    bytes_out: int
    step_bytes_in: float
    step_bytes_out: float
    pool_slots: int
    used_slots: int
    pool_bytes: int
    host_bytes: int


class LayerOffload:
    """Keys and values of one layer: all of them in the store, some blocks also in the pool.

    Two states. *Closed* (at first, and after anything that moved tokens other than by steps): the pool may lack the
    block that the next token goes to. :meth:`open` makes it *open*: the next ``n_ahead`` tokens have slots, and every
    :meth:`step` keeps it so. It is *warm* once a step has waited for its selection: in a cold pool the async
    policy would find next to nothing. A slot is never dirty: what is appended to the pool goes to the store in the
    same step.

    Order, for each step: :meth:`join`, :meth:`append`, :meth:`step`, attention over the pool. In a captured step
    :meth:`traced_step` takes its place, :meth:`traced_arrival` follows where rows may wait, and the join comes once,
    after the last layer, for all of them.

    Args:
        store: host rows.
        pool: as many rows and heads; on the device of the model.
        config: policy.
        n_ahead: most tokens that one step appends.
        transfers: how blocks travel.
    """

    def __init__(
        self, store: HostStore, pool: DevicePool, config: OffloadConfig, n_ahead: int, transfers: Transfers
    ) -> None:
        self.store, self.pool, self.config = store, pool, config
        self.n_ahead, self.transfers = n_ahead, transfers
        self.is_open = self.is_warm = False
        self._chunk_bytes_out = 0

    @property
    def selected_at_most(self) -> int:
        """Selected blocks of one row and head that one step can serve."""
        return self.pool.n_slots - open_blocks(self.n_ahead, self.pool.block_size)

    def write(self, k: Tensor, v: Tensor, starts: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put a prompt's chunk straight into the store: ``counts[b]`` tokens of k, v [B, HKV, T, D] at ``starts[b]``.

        Blocks that it touches leave the pool; the engine is closed and cold. On CUDA the copies run on the side stream.

        Returns:
            k and v as the store gives them back.
        """
        if self.is_open:
            self.transfers.join()
        self.is_warm = False
        self._drop_from([start // self.pool.block_size for start in starts])
        new = self.store.packed(torch.stack((k, v), 3))
        if k.is_cuda:
            side = side_stream(k.device)
            side.wait_stream(torch.cuda.current_stream(k.device))
            with torch.cuda.stream(side):
                self.store.write(new, starts, counts)
            for x in new:
                x.record_stream(side)
        else:
            self.store.write(new, starts, counts)
        self._chunk_bytes_out += sum(counts) * (self.store.block_bytes // self.pool.block_size) * k.shape[1]
        if self.store.scales is None:
            return k, v
        keys, values = self.store.unpacked(new).unbind(3)
        return keys, values

    def open(self, seq_lens: Tensor) -> None:
        """Give the next tokens of rows of ``seq_lens`` int64 [B] their slots, and wait for what their blocks hold."""
        self.transfers.join()
        none = torch.empty(*self.pool.slots.shape[:2], 0, dtype=torch.int32, device=seq_lens.device)
        with self.uncounted():
            self._plan(none, None, seq_lens, seq_lens, -1.0, resident_too=False)
            self.transfers.start(self.store, self.pool, 0, may_wait=True)
        self.transfers.join()
        self.is_open = True

    def append(self, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, HKV, T, D], at most ``n_ahead`` tokens, into the pool at ``start`` int64 [B].

        Returns k and v as the store would give them back, which is what is written: whether a block has left the pool
        and come again changes nothing.
        """
        t = k.shape[2]
        if not self.is_open or t > self.n_ahead:
            raise RuntimeError(f"append: expected an open engine and at most {self.n_ahead} tokens, got {t}")
        place = self.pool.places(start[:, None] + torch.arange(t, device=k.device))
        held = []
        for i, x in enumerate((k, v)):
            new = self.pool.packed(x)
            for tokens, part in zip(self.pool.tokens, new, strict=True):
                at = place if part.dim() == 3 else place[..., None].expand_as(part)
                tokens[:, :, :, i].scatter_(2, at, part)
            held.append(self.pool.unpacked(new))
        return held[0], held[1]

    def step(
        self, ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, positions: Tensor, *,
        n_written: int, wait: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Bring what the step selected, by the policy, and say what to attend to.

        Args:
            ids: int32 [B, HKV, T, K], selected blocks of each query token, ascending, N past the last.
            scores: float32 [B, HKV, R, N] for the estimated mass; see :func:`.residency.plan_step`.
            start, seq_lens: int64 [B], tokens of each row before and after :meth:`append`.
            positions: int64 [B, T] of the query tokens.
            n_written: tokens that :meth:`append` wrote since the last step, padding included.
            wait: for everything, whatever the policy.

        Returns:
            Blocks to attend to, int32 [B, HKV, T, A], ascending, N past the counts; counts int32 [B, HKV, T].
        """
        bound = -1.0 if wait else self.config.waits_above
        resident_too = self.config.attends_resident and not wait
        chosen = self._plan(_union(ids, self.pool.n_blocks), scores, start, seq_lens, bound, resident_too)
        self.transfers.start(self.store, self.pool, n_written, may_wait=wait or self.config.may_wait)
        self.is_warm |= wait
        if chosen is not None and ids.shape[2] == 1:
            return chosen[0][:, :, None], chosen[1][:, :, None]
        return attended_blocks(self.pool, ids, positions, resident_too=resident_too)

    def traced_step(self, ids: Tensor, scores: Tensor, start: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`step` for one token of a compiled step: by the kernels, on a CPU too; the host keeps no state.

        What a waiting row misses is on its way: it may be read after :meth:`traced_arrival`.

        ids int32 [B, HKV, K] -> blocks to attend to, int32 [B, HKV, A], and their counts [B, HKV].
        """
        config = self.config
        attended = plan(
            self.pool, ids, scores, start, seq_lens, n_ahead=self.n_ahead, waits_above=config.waits_above,
            resident_too=config.attends_resident,
        )  # fmt: skip
        transfer(self.store, self.pool, n_written=1, n_programs=config.transfer_programs, may_wait=config.may_wait)
        return attended

    def traced_arrival(self) -> None:
        """What follows in a compiled step comes after the blocks that rows of the last :meth:`traced_step` wait for."""
        arrive(self.pool)

    def join(self) -> None:
        """What follows comes after every transfer so far."""
        self.transfers.join()

    def cut(self, lens: Sequence[int]) -> None:
        """Forget tokens from ``lens[b]`` on: blocks behind them leave the pool; the engine is closed."""
        self.transfers.join()
        self._drop_from([-(-n // self.pool.block_size) for n in lens])

    def take_rows(self, rows: Tensor, n_tokens: int) -> None:
        """Row i becomes the former row ``rows[i]``, whose first ``n_tokens`` tokens count; the batch keeps its size."""
        self.synchronize()
        self.store.take_rows(rows.cpu(), -(-n_tokens // self.pool.block_size))
        self.pool.take_rows(rows.to(self.pool.slots.device))

    def resized(self, rows: Tensor) -> LayerOffload:
        """An engine of other rows, of which row i is a copy of ``rows[i]``; this one is closed for good."""
        new = self._copy(rows, self.transfers, "another batch size")
        self.close()
        return new

    def __deepcopy__(self, memo: dict[int, object]) -> LayerOffload:
        rows = torch.arange(self.store.rows.shape[0])
        return self._copy(rows, make_transfers(self.pool.slots.device, self.config), "a copy of the cache")

    def reset(self) -> None:
        """Forget every token and count; the buffers stay."""
        self.transfers.join()
        self.pool.reset()
        self.is_open = self.is_warm = False
        self._chunk_bytes_out = 0

    def synchronize(self) -> None:
        """Wait for every transfer: what the host reads in the store from here on is complete."""
        self.transfers.join()
        if self.pool.slots.is_cuda:
            torch.cuda.synchronize(self.pool.slots.device)

    def close(self) -> None:
        """Give the page-locked memory back; the engine must not be used any more."""
        self.synchronize()
        self.store.close()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Steps inside move bytes, which count as moved between steps, and select nothing that counts."""
        pool, i = self.pool, COUNTERS.index("fetched")
        before = [total.clone() for total in pool.sums]
        try:
            yield
        finally:
            fetched = pool.counters[..., i] - before[0][..., i]
            for total, was in zip(pool.sums, before, strict=True):
                total.copy_(was)
            pool.counters[..., i] += fetched
            pool.opening += fetched

    def check_integrity(self) -> None:
        """See :meth:`.pool.DevicePool.check_integrity`."""
        self.pool.check_integrity()

    def stats(self) -> LayerStats:
        """Read the counters. Synchronises with the device."""
        pool = self.pool
        counts = pool.counters.cpu()
        steps, selected, missing, fetched, waits, written = (int(x) for x in counts.sum((0, 1)))
        block_bytes, n_steps = self.store.block_bytes, int(counts[..., 0].max())
        written_bytes = written * (block_bytes // pool.block_size)
        fetched_by_steps = fetched - int(pool.opening.sum())
        return LayerStats(
            transfer=transfer_path(pool.slots.device, self.config),
            steps=n_steps,
            hit_rate=1.0 - missing / selected if selected else float("nan"),
            missing_mass=float(pool.missing_mass.sum()) / steps if steps else float("nan"),
            waits=waits / steps if steps else float("nan"),
            stall_us=float(pool.stalled.sum()) / steps / 1000 if steps else float("nan"),
            bytes_in=fetched * block_bytes,
            bytes_out=written_bytes + self._chunk_bytes_out,
            step_bytes_in=fetched_by_steps * block_bytes / n_steps if n_steps else float("nan"),
            step_bytes_out=written_bytes / n_steps if n_steps else float("nan"),
            pool_slots=pool.block_of_slot.numel(),
            used_slots=int((pool.block_of_slot >= 0).sum()),
            pool_bytes=pool.nbytes,
            host_bytes=self.store.nbytes,
        )

    def _copy(self, rows: Tensor, transfers: Transfers, what: str) -> LayerOffload:
        """An engine whose row i is a copy of ``rows[i]``; MemoryError, for ``what``, if the host cannot hold it."""
        self.synchronize()
        needed = self.store.nbytes // self.store.rows.shape[0] * rows.shape[0]
        check_host_bytes(needed, what, host_bytes_available())
        new = LayerOffload(
            self.store.resized(rows), self.pool.resized(rows.to(self.pool.slots.device)), self.config, self.n_ahead,
            transfers,
        )  # fmt: skip
        new.is_open, new.is_warm, new._chunk_bytes_out = self.is_open, self.is_warm, self._chunk_bytes_out
        return new

    def _plan(
        self, ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, bound: float, resident_too: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Plan; with the kernel also what one query token attends to."""
        if isinstance(self.transfers, KernelTransfers):
            return plan(
                self.pool, ids, scores, start, seq_lens, n_ahead=self.n_ahead, waits_above=bound,
                resident_too=resident_too,
            )  # fmt: skip
        plan_step(self.pool, ids, scores, start, seq_lens, n_ahead=self.n_ahead, waits_above=bound)
        return None

    def _drop_from(self, first_block: list[int]) -> None:
        self.pool.drop_from(torch.tensor(first_block, device=self.pool.slots.device))
        self.is_open = False


def transfer_path(device: torch.device, config: OffloadConfig) -> str:
    """How eager steps move blocks to and from ``device``: "kernel", "copy", or on a CPU "host", copies by the host."""
    return "host" if device.type == "cpu" else config.transfer


def make_transfers(device: torch.device, config: OffloadConfig) -> Transfers:
    """How blocks travel to and from ``device``."""
    path = transfer_path(device, config)
    if path == "host":
        return QueuedTransfers()
    if path == "copy":
        return CopyTransfers(device)
    if find_spec("triton") is None:
        raise RuntimeError("transfer='kernel' needs triton, which is not installed; pip install triton or pass 'copy'")
    return KernelTransfers(device, config.transfer_programs)


def _union(ids: Tensor, n_blocks: int) -> Tensor:
    """[B, HKV, T, K] -> each block once, ascending: [B, HKV, min(N, T * K)]."""
    b, h, t, k = ids.shape
    if t == 1:
        return ids[:, :, 0]
    kept = torch.zeros(b, h, n_blocks + 1, dtype=torch.bool, device=ids.device).scatter(2, ids.flatten(2).long(), True)
    number = torch.arange(n_blocks, dtype=torch.int32, device=ids.device)
    return torch.where(kept[..., :-1], number, n_blocks).sort(-1).values[..., : min(n_blocks, t * k)]
