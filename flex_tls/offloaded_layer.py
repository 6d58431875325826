"""A layer of a ``TLSCache`` whose keys and values live in host memory, with a pool of block slots on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .attention import Attended
from .cache_layer import Shared, TLSLayer, new_index
from .config import TLSConfig
from .dense import dense_attention
from .index import KeyChunks, KVIndex
from .mods import MaskMod, query_positions
from .offload import (
    DevicePool,
    HostStore,
    LayerOffload,
    OffloadConfig,
    RowReader,
    balanced_slots,
    check_host_bytes,
    host_bytes_available,
    make_transfers,
    open_blocks,
)
from .paged import Scored, attend_pages, earlier, paged_backend, score
from .pages import Pages
from .progress import Step
from .ragged import align_left, align_right
from .static import decode_offloaded
from .streamed import streamed_attention

# The last queries of a prompt choose what is on the device when decoding begins: the union of sixteen selections is
# twice one of them, as the default pool is
WARM_QUERIES = 16
# Tokens of the past that are on the device at once while a long chunk attends to it, or while an index is fitted
PIECE_TOKENS = 8192


class OffloadedLayer(TLSLayer):  # type: ignore[no-untyped-call,unused-ignore]
    """As :class:`TLSLayer`; keys and values are in the host store, the index and some blocks on the device.

    A prompt's chunks go to the store and attend densely, the past streamed back in pieces. Decode steps append to the
    pool and attend to what is in it, by the policy; see :class:`flex_tls.offload.LayerOffload`.
    """

    def __init__(self, shared: Shared, layer_idx: int) -> None:
        super().__init__(shared, layer_idx)
        # Slots of the pool per row and KV head; see size_pools
        self.n_slots = 0
        self.engine: LayerOffload | None = None
        self._new: tuple[Tensor, Tensor] | None = None
        self._last_queries: Tensor | None = None
        self._scale = 1.0
        self._reader: RowReader | None = None

    def place(self, store: HostStore, config: OffloadConfig, reader: RowReader) -> None:
        """Take a store, and allocate pool and index on the device of ``reader``, which layers share."""
        shared, device, dtype = self.shared, reader.device, store.dtype
        pool = self.new_pool(config, dtype, device)
        transfers = make_transfers(device, config)
        self.engine = LayerOffload(store, pool, config, shared.cfg.sparse_query_tokens, transfers)
        self._reader = reader
        self.index = new_index(shared, dtype, device)
        self.is_initialized = True

    def new_pool(self, config: OffloadConfig, dtype: torch.dtype, device: torch.device) -> DevicePool:
        """An empty pool for this layer."""
        shared = self.shared
        size = shared.cfg.block_size
        return DevicePool(
            batch_size=shared.progress.batch_size, n_kv_heads=shared.shape.n_kv_heads, n_slots=self.n_slots,
            n_blocks=shared.capacity_tokens // size, block_size=size, head_dim=shared.shape.head_dim, dtype=dtype,
            device=device, store_dtype=config.store_dtype,
        )  # fmt: skip

    def release(self) -> None:
        """Give every buffer back; the layer is as new."""
        if self.engine is not None:
            self.engine.close()
        self.engine = self._reader = self._new = self._last_queries = self.index = None
        self.is_initialized = False

    def opened(self) -> LayerOffload:
        """The engine, once buffers are allocated."""
        assert self.engine is not None
        return self.engine

    def buffers(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, HKV, S, D], in host memory; a copy if that holds int8.

        Waits for the device: for reports and for copies.
        """
        engine = self.opened()
        engine.synchronize()
        return engine.store.keys, engine.store.values

    def held(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """As :meth:`TLSLayer.held`, of int8 no more made out than is asked for."""
        engine = self.opened()
        engine.synchronize()
        keys, values = (tuple(x[:, :, :n_tokens, i] for x in engine.store.tokens) for i in range(2))
        return engine.store.unpacked(keys), engine.store.unpacked(values)

    def restore(self, k: Tensor, v: Tensor) -> None:
        """As :meth:`TLSLayer.restore`."""
        b, _, n, _ = k.shape
        store = self.opened().store
        store.write(store.packed(torch.stack((k, v), 3)), [0] * b, [n] * b)

    def on_device(self) -> tuple[Tensor, Tensor]:
        """The pool's, [B, HKV, P * BLOCK, D]; of int8 shape, dtype and device alone, which every forward asks for."""
        pool = self.opened().pool
        if pool.scales is None:
            return pool.keys, pool.values
        b, h, n, _, d = pool.tokens[0].shape
        like = torch.empty((), dtype=pool.dtype, device=pool.slots.device).expand(b, h, n, d)
        return like, like

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """As :meth:`TLSLayer.attend`."""
        step = self._step
        if step is not None and self._new is not None:
            # The newest of a prompt's queries, right aligned as they come
            self.remember(q[:, :, -WARM_QUERIES:].clone(), scale)
        try:
            return super().attend(q, scale)
        finally:
            self._new = None

    def decode(
        self, q: Tensor, k_new: Tensor, v_new: Tensor, start: Tensor, *, scale: float, sparse: bool, arrivals: Tensor
    ) -> Tensor:
        """As :meth:`TLSLayer.decode`; a context that the budgets hold is selected whole."""
        assert self.index is not None
        return decode_offloaded(q, k_new, v_new, self.opened(), self.index, start, self.cfg, scale=scale)

    @property
    def last_queries(self) -> Tensor | None:
        """A prompt's last queries [B, HQ, up to 16, D], until they have said what decoding begins with."""
        return self._last_queries

    @property
    def scale(self) -> float:
        """Of the last attention's scores."""
        return self._scale

    def remember(self, q: Tensor, scale: float) -> None:
        """Set :attr:`last_queries` and :attr:`scale`."""
        self._last_queries, self._scale = q, scale

    def prepare(self) -> None:
        """Bring the next tokens' blocks and, after a prompt, what its last queries select into the pool.

        Eager steps do it by themselves; before compiled ones it must be called.
        """
        if self.index is not None and self.index.fitted_tokens and not self.opened().is_open:
            with torch.no_grad():
                self._open(self.index.seq_lens.clone())

    def cut(self, lens: list[int]) -> None:
        """Keep the first ``lens[b]`` tokens of each row."""
        self._step = self._new = self._last_queries = None
        if self.engine is None or self.index is None:
            return
        self.engine.cut(lens)
        if max(lens) == 0:
            self.index.reset()
        elif self.index.fitted_tokens:
            keys = None if self.index.summary is None else self.buffers()[0]
            self.index.crop(torch.tensor(lens), keys)

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the former row ``rows[i]``; a batch of another size gets new buffers."""
        if self.engine is None or self.index is None:
            return
        if rows.shape[0] == self.engine.store.rows.shape[0]:
            self.engine.take_rows(rows, max(self.shared.progress.lens))
        else:
            self.engine = self.engine.resized(rows)
        if self._last_queries is not None:
            self._last_queries = self._last_queries.index_select(0, rows.to(self._last_queries.device))
        self.index.reorder(rows.to(self.index.seq_lens.device))

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        super().reset()
        self._new = self._last_queries = None
        if self.engine is not None:
            self.engine.reset()

    def _write(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        engine, index = self.opened(), self.index
        decoding = not step.is_fresh and step.n_new <= engine.n_ahead
        if decoding and index is not None and index.fitted_tokens:
            if not engine.is_open:
                self._open(step.start)
            engine.join()
            return engine.append(k, v, step.start)
        counts = [after - before for before, after in zip(step.lens_before, step.lens_after, strict=True)]
        self._new = engine.write(k, v, step.lens_before, counts)
        return self._new

    def _prompt(self, step: Step) -> tuple[Tensor, Tensor]:
        assert self._new is not None
        return self._new

    def _attend_all(self, q: Tensor, step: Step, scale: float) -> Tensor:
        if self._new is None:
            same = len(set(step.lens_after)) == 1
            keys, values = self._all_resident(step)
            return dense_attention(q, keys, values, step.seq_lens, scale=scale, same_length=same)
        if not q.is_cuda:
            # The store itself is where the queries are
            return super()._attend_all(q, step, scale)
        if step.left_pad is not None:
            q = align_left(q, step.left_pad)
        counts = [after - before for before, after in zip(step.lens_before, step.lens_after, strict=True)]
        out = streamed_attention(q, *self._new, step.lens_before, counts, self._past, scale=scale)
        return out if step.left_pad is None else align_right(out, step.left_pad)

    def _all_resident(self, step: Step) -> tuple[Tensor, Tensor]:
        """Every key and value of a context that the budgets hold, from the pool, in logical order."""
        engine = self.opened()
        pool, size = engine.pool, engine.pool.block_size
        n_blocks = -(-step.longest // size)
        number = torch.arange(n_blocks, dtype=torch.int32, device=step.seq_lens.device)
        held = (step.seq_lens + size - 1) // size
        ids = torch.where(number < held[:, None], number, pool.n_blocks)
        ids = ids[:, None, None].expand(-1, pool.slots.shape[1], -1, -1)
        engine.step(
            ids, None, step.start, step.seq_lens, step.seq_lens[:, None] - 1, n_written=step.n_new, wait=True
        )  # fmt: skip
        pages = self._pages()
        keys, values = (pages.gathered(x)[:, :, : step.longest] for x in (pool.keys, pool.values))
        return keys, values

    def _attend_two_levels(
        self, q: Tensor, step: Step, index: KVIndex, cfg: TLSConfig, mask_mod: MaskMod | None, scale: float,
        selected: bool,
    ) -> Attended:  # fmt: skip
        engine = self.opened()
        n_written, start = step.n_new, step.start
        parts = []
        for part, view, positions, scored in self._pieces(q, index, mask_mod, scale):
            ids, counts = engine.step(
                scored.chosen.indices, scored.blocks, start, step.seq_lens, positions, n_written=n_written,
                wait=not engine.is_warm,
            )  # fmt: skip
            kept = replace(scored.chosen, indices=ids, counts=counts)
            backend = paged_backend(self.shared.backend, q.device)
            result = attend_pages(
                part, engine.pool.keys, engine.pool.values, self._pages(), scored, kept, view, cfg, backend, mask_mod,
                scale,
            )  # fmt: skip
            parts.append(result._replace(blocks=scored.chosen))
            n_written = 0
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _pieces(
        self, q: Tensor, index: KVIndex, mask_mod: MaskMod | None, scale: float
    ) -> Iterator[tuple[Tensor, KVIndex, Tensor, Scored]]:
        """(queries, index as they see it, their positions int64 [B, T'], their level 1), what came before joined.

        As many query tokens at a time as the pool can serve; every query token selects for itself in any case.
        """
        engine, cfg, t = self.opened(), self.cfg, q.shape[2]
        backend = paged_backend(self.shared.backend, q.device)
        all_fit = engine.pool.n_slots == index.n_blocks
        at_once = t if all_fit else max(1, engine.selected_at_most // min(cfg.kept_blocks, index.n_blocks))
        for first in range(0, t, at_once):
            last = min(first + at_once, t)
            view, part = earlier(index, t - last), q[:, :, first:last]
            scored = score(part, view, cfg, backend, mask_mod, scale)
            engine.join()
            yield part, view, query_positions(view.seq_lens, last - first), scored

    def _open(self, lens: Tensor) -> None:
        """Make room for the next tokens of rows of ``lens`` int64 [B]; after a prompt also fetch what it ended with."""
        engine, index = self.opened(), self.index
        assert index is not None
        engine.open(lens)
        q, self._last_queries = self._last_queries, None
        if q is None or index.max_len <= self.shared.cfg.dense_up_to_tokens:
            return
        with engine.uncounted():
            for _, _, positions, scored in self._pieces(q, index, None, self._scale):
                engine.step(scored.chosen.indices, None, lens, lens, positions, n_written=0, wait=True)

    def _pages(self) -> Pages:
        pool = self.opened().pool
        return Pages(pool.slot_of_block, pool.block_of_slot, pool.block_size)

    def _past(self, row: int, n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._reader is not None
        return self._reader.read(self.opened().store, row, n_tokens)

    def key_chunks(self, n_tokens: int) -> KeyChunks:
        """As :meth:`TLSLayer.key_chunks`, streamed from the host."""
        engine = self.opened()
        engine.join()
        store, device = engine.store, engine.pool.slots.device
        if device.type == "cpu":
            return KeyChunks.of(store.keys[:, :, :n_tokens])
        return KeyChunks(n_tokens, lambda: store.read_keys(n_tokens, PIECE_TOKENS, device))


def choose_offloaded(shared: Shared) -> list[int]:
    """Layers that can do without most of their keys: neither dense in every step nor bound to a sliding window."""
    cfg = shared.cfg
    away = [i for i, window in enumerate(shared.shape.windows) if not cfg.is_dense(i) and window is None]
    if not away:
        raise ValueError(
            f"offload: expected a layer with full attention besides dense_layers={cfg.dense_layers}, got none of "
            f"{shared.shape.n_layers}; these layers read all they hold in every step, leave offload out"
        )
    return away


def size_pools(layers: list[OffloadedLayer], config: OffloadConfig, dtype: torch.dtype) -> None:
    """Set each layer's number of slots; raises ValueError if one is too small for a step."""
    shared = layers[0].shared
    cfg, shape = shared.cfg, shared.shape
    n_blocks = shared.capacity_tokens // cfg.block_size
    sizes = config.pool_blocks(
        n_layers=len(layers), n_heads=shared.progress.batch_size * shape.n_kv_heads, n_blocks=n_blocks,
        kept_blocks=min(cfg.kept_blocks, n_blocks), least=_least_slots(shared),
        block_bytes=cfg.block_size * config.token_bytes(shape.head_dim, dtype.itemsize),
    )  # fmt: skip
    for layer, size in zip(layers, sizes, strict=True):
        layer.n_slots = size


def balanced_pools(layers: list[OffloadedLayer]) -> tuple[int, ...]:
    """See :meth:`TLSCache.balanced_gpu_blocks`."""
    hits = [layer.opened().stats().hit_rate for layer in layers if layer.is_initialized]
    if not hits or any(math.isnan(x) for x in hits):
        raise ValueError("balanced_gpu_blocks: expected a cache with offload that has decoded, got none; decode first")
    shared = layers[0].shared
    n_blocks = shared.capacity_tokens // shared.cfg.block_size
    slots = [layer.n_slots for layer in layers]
    least = min(_least_slots(shared), n_blocks)
    return balanced_slots(slots, [1.0 - x for x in hits], least=least, most=n_blocks)


def _least_slots(shared: Shared) -> int:
    """Slots without which a step of some layer could not run: one selection and the blocks of new tokens."""
    cfg = shared.cfg
    kept = max(shared.cfg_of_layer[i].kept_blocks for i in choose_offloaded(shared))
    return min(kept, shared.capacity_tokens // cfg.block_size) + open_blocks(cfg.sparse_query_tokens, cfg.block_size)


def allocate_offloaded(
    layers: list[OffloadedLayer], config: OffloadConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Allocate stores, pools as :func:`size_pools` left them, and indexes, after a look at what the host has."""
    shared = layers[0].shared
    shape, b = shared.shape, shared.progress.batch_size
    token_bytes = config.token_bytes(shape.head_dim, dtype.itemsize)
    needed = len(layers) * b * shared.capacity_tokens * shape.n_kv_heads * token_bytes
    what = f"keys and values of {b} x {shared.capacity_tokens:,} tokens in {len(layers)} layers"
    check_host_bytes(needed, what, host_bytes_available())
    reader: RowReader | None = None
    for layer in layers:
        store = HostStore(
            batch_size=b, n_kv_heads=shape.n_kv_heads, n_blocks=shared.capacity_tokens // shared.cfg.block_size,
            block_size=shared.cfg.block_size, head_dim=shape.head_dim, dtype=dtype, pinned=device.type == "cuda",
            store_dtype=config.store_dtype,
        )  # fmt: skip
        try:
            reader = reader or RowReader(store, device, PIECE_TOKENS)
            layer.place(store, config, reader)
        except BaseException:
            # A layer that has no engine yet does not know its store
            store.close()
            raise


def check_rows(layers: list[OffloadedLayer], n_rows: int) -> None:
    """Raise MemoryError unless the host can hold ``n_rows`` rows of every layer, resized one after another."""
    stores = [layer.engine.store for layer in layers if layer.engine is not None]
    if not stores or n_rows == stores[0].rows.shape[0]:
        return
    new = [store.nbytes // store.rows.shape[0] * n_rows for store in stores]
    # Each former store goes when its successor is there
    grown = sum(max(0, after - store.nbytes) for after, store in zip(new, stores, strict=True))
    check_host_bytes(grown + min(new[-1], stores[-1].nbytes), f"a batch of {n_rows} rows", host_bytes_available())


def _joined(parts: list[Attended]) -> Attended:
    """One result for query tokens that were taken in pieces."""
    blocks = [x.blocks for x in parts if x.blocks is not None]
    tokens = [x.tokens for x in parts if x.tokens is not None]
    return Attended(
        torch.cat([x.out for x in parts], 2),
        None,
        replace(
            blocks[0],
            indices=torch.cat([x.indices for x in blocks], 2),
            counts=torch.cat([x.counts for x in blocks], 2),
        ),
        replace(
            tokens[0],
            words=torch.cat([x.words for x in tokens], 2),
            positions=torch.cat([x.positions for x in tokens], 1),
        ),
    )
