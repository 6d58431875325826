"""``TLSCache``: keys, values and index of a Hugging Face model, in buffers that are allocated once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import saved
from .attention import Backend, check_backend, resolve_backend
from .audit import Auditor, AuditStats, OnDrift
from .cache_layer import Shared, TLSLayer
from .config import TLSConfig
from .device import why_not_here
from .footprint import Footprint, check_fits, footprint
from .index import KVIndex, advance, fit
from .model_config import ModelShape, read_model_config
from .offload import LayerStats, OffloadConfig, ops
from .offloaded_layer import (
    OffloadedLayer,
    allocate_offloaded,
    balanced_pools,
    check_rows,
    choose_offloaded,
    size_pools,
)
from .paged import paged_backend
from .progress import Progress
from .record import Recorder
from .step import why_not_compiled


class CacheStats(dict[int, LayerStats]):
    """What the offload engine of each offloaded layer did, by layer; empty without offload.

    Attributes:
        audit: mass, KL and recall that the drift monitor found; None without ``audit_every``.
    """

    def __init__(self, layers: dict[int, LayerStats], audit: AuditStats | None) -> None:
        super().__init__(layers)
        self.audit = audit


class TLSCache(Cache):  # type: ignore[misc,unused-ignore]
    """Cache of a model whose long contexts are decoded with two-level attention.

    Use it with :func:`flex_tls.enable`: ``model.generate(**inputs, past_key_values=cache)``. Call ``generate`` again
    with the longer sequence to go on. Gradients do not flow through the cache.

    Args:
        model_config: ``model.config``.
        cfg: budgets and index.
        batch_size: rows (B); with beam search, prompts times beams.
        max_len: tokens of the longest row, padding and generated tokens included.
        dtype: of keys and values; that of the first keys by default.
        device: where the buffers live; that of the first keys by default.
        backend: of :func:`flex_tls.two_level_attention`.
        offload: hold keys and values in host memory and some blocks on the device. Layers that attend to everything in
            every step (``dense_layers``) or to a sliding window stay on the device.
        audit_every: decode steps between two comparisons of one layer's selection with its true attention, which reads
            all of the layer's keys; None for none. What they find is in ``stats().audit``.
        on_drift: what happens to a layer that keeps less of the true attention than ``least_mass``: ``"report"``
            alone, ``"widen"`` doubles its budgets, ``"dense"`` lets it attend densely from then on. The last two
            are not compiled: :func:`flex_tls.generate` then needs ``compiled=False``.
        least_mass: a share.

    Attributes:
        recorder: set a :class:`flex_tls.record.Recorder` to collect what sparse steps keep and read.
        auditor: the :class:`flex_tls.audit.Auditor`, or None.

    Raises:
        ValueError: a model that is not supported, a length or batch size below 1, a pool too small for a step.
        MemoryError: the buffers do not fit device or host; says how many bytes they need, how many are free, and the
            longest length that fits. Nothing has been allocated then. Buffers are allocated here if ``dtype`` and
            ``device`` are given, else by the first forward.
    """

    def __init__(
        self,
        model_config: Any,
        cfg: TLSConfig | None = None,
        *,
        batch_size: int = 1,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        backend: Backend = "auto",
        offload: OffloadConfig | None = None,
        audit_every: int | None = None,
        on_drift: OnDrift = "report",
        least_mass: float = 0.9,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_backend(backend)
        shape = read_model_config(model_config)
        self._shared = Shared(cfg or TLSConfig(), backend, shape, max_len, Progress(batch_size))
        if audit_every is not None:
            if offload is not None:
                raise ValueError(
                    f"audit_every: expected None with offload, got {audit_every}; an audit reads all keys of a layer, "
                    "which are in host memory then"
                )
            sparse = [i for i in range(shape.n_layers) if not self.cfg.is_dense(i)]
            self._shared.auditor = Auditor(sparse, audit_every, on_drift, least_mass)
        if offload is not None and self.cfg.sparse_from_tokens:
            raise ValueError(
                f"sparse_from_tokens: expected 0 with offload, got {self.cfg.sparse_from_tokens}; dense attention "
                "would read a layer's whole host memory in every step"
            )
        self._dtype = dtype
        self._device = None if device is None else torch.device(device)
        # Compiled steps (flex_tls/step.py), each of which holds its model; they live as long as the buffers they read
        self.compiled_steps: dict[tuple[Any, ...], Any] = {}
        self.offload_config = offload
        away = [] if offload is None else choose_offloaded(self._shared)
        super().__init__(
            layers=[(OffloadedLayer if i in away else TLSLayer)(self._shared, i) for i in range(shape.n_layers)]
        )
        if offload is not None:
            size_pools(self.offloaded_layers, offload, dtype or shape.dtype)
        if dtype is not None and self._device is not None:
            self._allocate(dtype, self._device)

    def __getstate__(self) -> dict[str, Any]:
        """A copy compiles its own steps: these read this cache's buffers, and hold the model."""
        return {**self.__dict__, "compiled_steps": {}}

    def begin(self, attention_mask: Tensor | None, n_new: int, batch_size: int | None = None) -> None:
        """Announce a forward of ``n_new`` (T) columns. :func:`flex_tls.enable` calls it before every forward.

        Args:
            attention_mask: [B, cached + T], nonzero where there is a token; None if there is no padding.
            n_new: columns that the forward adds, padding included.
            batch_size: rows of the forward, if known.

        Raises:
            ValueError: the cache is too short (says the length needed), the batch has another size, the mask is not
                left padded or hides cached tokens. Nothing has changed then.

        A forward that never reached the last layer is forgotten here. Synchronises if there is a mask.
        """
        progress = self._shared.progress
        if n_new < 1:
            raise ValueError(f"n_new: expected at least 1 new token, got {n_new}")
        if batch_size is not None and batch_size != progress.batch_size:
            raise ValueError(
                f"batch: expected {progress.batch_size} rows, the cache's batch_size, got {batch_size}; make the cache "
                f"with batch_size={batch_size} (beam search: prompts times beams)"
            )
        needed = progress.length + n_new
        if needed > self._shared.max_len:
            raise ValueError(
                f"max_len: expected room for {needed} tokens ({progress.length} cached and {n_new} new), got "
                f"max_len={self._shared.max_len}; make the cache with max_len={needed} and room for the answer"
            )
        kept, counts = progress.read_mask(attention_mask, n_new)
        self._settle()
        if kept is not None:
            for layer in self.tls_layers:
                layer.cut(kept.tolist())
        progress.begin(n_new, kept, counts, self._device or torch.device("cpu"))
        if n_new <= self.cfg.sparse_query_tokens:
            self.fit_where_due()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [B, HKV, T, D]; see :class:`TLSLayer`."""
        layer = self.tls_layers[layer_idx]
        step = layer.begun()
        if not layer.is_initialized:
            self._allocate(self._dtype or key_states.dtype, self._device or key_states.device)
        if step.start.device != self._device and self._device is not None:
            self._shared.progress.step = step.to(self._device)
        return layer.update(key_states, value_states)

    def advance(self, n: int) -> None:
        """Count ``n`` tokens of every row that a compiled step has written into every layer."""
        self._settle()
        self._shared.progress.advance(n)
        advance([layer.index for layer in self.tls_layers if layer.index is not None], n)

    def audit(self, queries: list[Tensor]) -> None:
        """Audit the layer that is due, with the layers' queries [B, HQ, T, D] of a compiled step that was counted."""
        auditor = self._shared.auditor
        if auditor is not None and auditor.due is not None:
            with torch.no_grad():
                self.tls_layers[auditor.due].audit(queries[auditor.due])

    def fit_where_due(self) -> None:
        """Index what layers hold, and choose new label projections where the context has outgrown them.

        Eager forwards of few tokens do it by themselves. Synchronises if anything is due.
        """
        due = [layer for layer in self.tls_layers if layer.fit_is_due]
        lens = self._shared.progress.held
        with torch.no_grad():
            for device in {layer.on_device()[0].device for layer in due}:
                here = [layer for layer in due if layer.on_device()[0].device == device]
                indexes = [cast(KVIndex, layer.index) for layer in here]
                fit(indexes, [layer.key_chunks(max(lens)) for layer in here], torch.tensor(lens, device=device))
                for layer in here:
                    layer.label()

    @property
    def refit_at_tokens(self) -> float:
        """Shortest length at which :meth:`fit_where_due` would fit anew; infinite if none."""
        return min(layer.refit_at_tokens for layer in self.tls_layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns; a positive number keeps that many, as in older transformers."""
        self._settle()
        progress = self._shared.progress
        # Assisted generation counts in tensors
        tokens_to_remove = int(tokens_to_remove)
        length = tokens_to_remove if tokens_to_remove > 0 else max(progress.length + tokens_to_remove, 0)
        if length >= progress.length:
            return
        progress.crop(length)
        for layer in self.tls_layers:
            layer.cut(progress.lens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``, int64 [B].

        Raises MemoryError, before anything has changed, if the host cannot hold as many rows.
        """
        self._settle()
        check_rows(self.offloaded_layers, beam_idx.shape[0])
        with torch.no_grad():
            for layer in self.tls_layers:
                layer.take_rows(beam_idx)
        self._shared.progress.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; the buffers grow."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (int or bool)."""
        self.reorder_cache(torch.arange(self.batch_size)[indices.cpu()])

    def reset(self) -> None:
        """Forget every token, for the next prompt; the buffers stay."""
        self._shared.progress.reset()
        for layer in self.tls_layers:
            layer.reset()

    @property
    def recorder(self) -> Recorder | None:
        """Collects what sparse steps keep and read; None by default."""
        return self._shared.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._shared.recorder = recorder

    @property
    def auditor(self) -> Auditor | None:
        """The drift monitor, if ``audit_every`` asked for one."""
        return self._shared.auditor

    @property
    def cfg(self) -> TLSConfig:
        """The configuration."""
        return self._shared.cfg

    @property
    def tls_layers(self) -> list[TLSLayer]:
        """``layers``, by the type that they have."""
        return cast(list[TLSLayer], self.layers)

    @property
    def offloaded_layers(self) -> list[OffloadedLayer]:
        """Those whose keys and values are in host memory."""
        return [layer for layer in self.tls_layers if isinstance(layer, OffloadedLayer)]

    def prepare(self) -> bool:
        """Bring into the pools what decoding begins with; before compiled steps, eager ones do it by themselves.

        False if an eager step must come first: a row without a token has nothing to fit an index on, and where a pool
        is cold a step waits for all that it selects.
        """
        if min(self.seq_lens) == 0:
            return False
        for layer in self.offloaded_layers:
            layer.prepare()
        return all(layer.opened().is_warm for layer in self.offloaded_layers)

    def join(self) -> None:
        """What follows comes after every transfer between host and device so far; outside of compiled steps."""
        for layer in self.offloaded_layers:
            layer.opened().join()

    def join_in_step(self) -> None:
        """The same at the end of a compiled step."""
        if self.offloaded_layers:
            ops.join(self.offloaded_layers[-1].opened().pool)

    def rejoin(self) -> None:
        """The same where a step breaks off while a graph records it, wherever it had come to."""
        for device in {layer.opened().pool.slots.device for layer in self.offloaded_layers}:
            ops.rejoin(device)

    @property
    def is_compileable(self) -> bool:
        """Whether ``model.generate`` may decode by the compiled step, on CUDA; True while no device is known."""
        return self._device is None or why_not_compiled(self, self._device) is None

    @property
    def counters(self) -> list[Tensor]:
        """What :meth:`stats` reads, on the device."""
        return [total for layer in self.offloaded_layers for total in layer.opened().pool.sums]

    def stats(self) -> CacheStats:
        """What offloaded layers did since the cache was made or reset, and what audits found. Synchronises."""
        auditor, offloaded = self._shared.auditor, self.offloaded_layers
        return CacheStats(
            {layer.layer_idx: layer.opened().stats() for layer in offloaded if layer.is_initialized},
            None if auditor is None else auditor.stats(),
        )

    def balanced_gpu_blocks(self) -> tuple[int, ...]:
        """``OffloadConfig.gpu_blocks`` for later caches: as many slots in all, more for layers that missed more.

        What a layer needs depends on the model more than on the text (docs/design.md, section 10): decode a hundred
        tokens of any long text, at the budgets and the context length to come, and keep the numbers. Synchronises.

        Raises:
            ValueError: there is no offload, or nothing was decoded.
        """
        return balanced_pools(self.offloaded_layers)

    def save(self, path: str | Path) -> None:
        """Write every token, the index and the configuration to the folder ``path``, for :meth:`load`.

        Raises:
            ValueError: ``path`` exists, or the cache has no buffers yet.
            OSError: it could not be written; nothing is left at ``path`` then, and the cache is as before.
        """
        self._settle()
        self.fit_where_due()
        saved.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model_config: Any,
        *,
        max_len: int | None = None,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
        offload: OffloadConfig | None = None,
    ) -> TLSCache:
        """The cache that :meth:`save` wrote, with or without offload and in any ``store_dtype``, however it was saved.

        With offload ``sparse_from_tokens`` is 0, whatever it was.

        Args:
            path: the folder.
            model_config: of the same model.
            max_len: room for more tokens, or fewer, than it was saved with.
            device, backend, offload: as in :class:`TLSCache`.

        Raises:
            ValueError: another model, no such folder, a damaged file; says which.
        """
        return saved.load(cls, path, model_config, max_len=max_len, device=device, backend=backend, offload=offload)

    def close(self) -> None:
        """Give all buffers back, page-locked host memory too; the cache is as new."""
        self.reset()
        for layer in self.tls_layers:
            layer.release()
        self.compiled_steps.clear()

    @property
    def progress(self) -> Progress:
        """Which token of which row comes next."""
        return self._shared.progress

    @property
    def shape(self) -> ModelShape:
        """The model's layers."""
        return self._shared.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, allocated or to be."""
        return self._dtype or self.shape.dtype

    @property
    def device(self) -> torch.device | None:
        """Of the buffers; None if nobody has said it yet."""
        return self._device

    @property
    def backend(self) -> Backend:
        """Of :func:`flex_tls.two_level_attention`, as it was asked for."""
        return self._shared.backend

    @property
    def max_len(self) -> int:
        """Columns that fit."""
        return self._shared.max_len

    @property
    def batch_size(self) -> int:
        """B."""
        return self._shared.progress.batch_size

    @property
    def seq_lens(self) -> list[int]:
        """Tokens that each row holds, without padding."""
        return list(self._shared.progress.lens)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of all keys and values, allocated or to be, wherever they are."""
        takes = self._takes(self.max_len, self.dtype)
        return takes.kv_on_device + takes.kv_on_host

    @property
    def host_nbytes(self) -> int:
        """Bytes of the keys and values in host memory, allocated or to be; 0 without offload."""
        return self._takes(self.max_len, self.dtype).kv_on_host

    @property
    def device_nbytes(self) -> int:
        """Bytes on the model's device, allocated or to be: keys and values that stay there, index, pools."""
        return self._takes(self.max_len, self.dtype).on_device

    @property
    def pools_nbytes(self) -> int:
        """Bytes of the pools of block slots and their tables, allocated or to be; 0 without offload."""
        return self._takes(self.max_len, self.dtype).pools

    @property
    def index_nbytes(self) -> int:
        """Bytes of all indexes, allocated or to be."""
        return self._takes(self.max_len, self.dtype).indexes

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, wherever they are, and of all indexes, allocated or to be."""
        return self.kv_nbytes + self.index_nbytes

    def _takes(self, max_len: int, dtype: torch.dtype) -> Footprint:
        """What a cache like this one takes for ``max_len`` tokens."""
        return footprint(replace(self._shared, max_len=max_len), self.offloaded_layers, self.offload_config, dtype)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        resolve_backend(self._shared.backend, device, why_not_here(device))
        if self.offload_config is not None:
            size_pools(self.offloaded_layers, self.offload_config, dtype)
        needed = check_fits(lambda n: self._takes(n, dtype), self.max_len, self.batch_size, device)
        try:
            # Also under a caller's inference mode, whose tensors could not be written to outside of it
            with torch.inference_mode(False):
                if self.offload_config is not None:
                    paged_backend(self._shared.backend, device)
                    allocate_offloaded(self.offloaded_layers, self.offload_config, dtype, device)
                for layer in self.tls_layers:
                    if not layer.is_initialized:
                        layer.allocate(dtype, device)
        except BaseException as error:
            for layer in self.tls_layers:
                layer.release()
            if not isinstance(error, RuntimeError):
                raise
            if "alloc" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(
                f"{needed}, which could not be allocated; lower max_len ({self.max_len}) or batch_size "
                f"({self.batch_size})"
            ) from error
        self._dtype, self._device = dtype, device

    def _settle(self) -> None:
        """Undo a forward that did not reach the last layer."""
        progress = self._shared.progress
        if progress.step is not None:
            progress.abandon()
            for layer in self.tls_layers:
                layer.cut(progress.lens)
