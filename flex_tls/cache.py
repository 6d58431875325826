"""``TLSCache``: keys, values and index of a Hugging Face model, in buffers that are allocated once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import Backend, check_backend, resolve_backend
from .audit import Auditor, OnDrift
from .cache_layer import Shared, TLSLayer, new_index
from .config import TLSConfig
from .fused import why_not_here
from .model_config import read_model_config
from .progress import Progress
from .record import Recorder


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
        audit_every: decode steps between two comparisons of one layer's selection with its true attention, which reads
            all of the layer's keys; None for none. What they find is in ``auditor.stats()``.
        on_drift: what happens to a layer that keeps less of the true attention than ``least_mass``: ``"report"``
            alone, ``"widen"`` doubles its budgets, ``"dense"`` lets it attend densely from then on.
        least_mass: a share.

    Attributes:
        recorder: set a :class:`flex_tls.record.Recorder` to collect what sparse steps keep and read.
        auditor: the :class:`flex_tls.audit.Auditor`, or None.

    Raises:
        ValueError: a model that is not supported, a length or batch size below 1.
        MemoryError: the buffers do not fit; says how many bytes they need. Buffers are allocated here if ``dtype`` and
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
            sparse = [i for i in range(shape.n_layers) if not self.cfg.is_dense(i)]
            self._shared.auditor = Auditor(sparse, audit_every, on_drift, least_mass)
        self._dtype = dtype
        self._device = None if device is None else torch.device(device)
        # Steps that flex_tls.decode compiled, each of which holds its model; they live as long as the buffers they read
        self.compiled_steps: dict[tuple[Any, int, bool], Any] = {}
        super().__init__(layers=[TLSLayer(self._shared, i) for i in range(shape.n_layers)])
        if dtype is not None and self._device is not None:
            self._allocate(dtype, self._device)

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
        for layer in self.tls_layers:
            if layer.index is not None:
                layer.index.advance(n)

    def refit_if_outgrown(self) -> None:
        """Choose new label projections where the context has outgrown them; eager forwards do it by themselves."""
        with torch.no_grad():
            for layer in self.tls_layers:
                layer.refit_if_outgrown()

    @property
    def refit_at_tokens(self) -> float:
        """Shortest length at which :meth:`refit_if_outgrown` would do something; infinite if none."""
        return min(layer.refit_at_tokens for layer in self.tls_layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns; a positive number keeps that many, as in older transformers."""
        self._settle()
        progress = self._shared.progress
        length = tokens_to_remove if tokens_to_remove > 0 else max(progress.length + tokens_to_remove, 0)
        if length >= progress.length:
            return
        progress.crop(length)
        for layer in self.tls_layers:
            layer.cut(progress.lens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes the former row ``beam_idx[i]``, int64 [B]."""
        self._settle()
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
        """Bytes of all keys and values, allocated or to be."""
        shape, dtype = self._shared.shape, self._layout()[0]
        tokens = self.batch_size * self._shared.capacity_tokens
        return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * tokens * dtype.itemsize

    @property
    def index_nbytes(self) -> int:
        """Bytes of all indexes, allocated or to be."""
        n_indexed = sum(not self.cfg.is_dense(i) for i in range(self._shared.shape.n_layers))
        return n_indexed * new_index(self._shared, self._layout()[0], torch.device("meta")).nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of everything, allocated or to be."""
        return self.kv_nbytes + self.index_nbytes

    def _layout(self) -> tuple[torch.dtype, torch.device]:
        return self._dtype or self._shared.shape.dtype, self._device or torch.device("cpu")

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        resolve_backend(self._shared.backend, device, why_not_here(device))
        self._dtype, self._device = dtype, device
        try:
            # Also under a caller's inference mode, whose tensors could not be written to outside of it
            with torch.inference_mode(False):
                for layer in self.tls_layers:
                    layer.allocate(dtype, device)
        except RuntimeError as error:
            for layer in self.tls_layers:
                layer.keys = layer.values = layer.index = None
                layer.is_initialized = False
            if "alloc" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryError(
                f"TLSCache: {self.nbytes:,} bytes needed on {device} ({self.kv_nbytes:,} for keys and values, "
                f"{self.index_nbytes:,} for the index), which could not be allocated; lower max_len "
                f"({self._shared.max_len}) or batch_size ({self.batch_size})"
            ) from error

    def _settle(self) -> None:
        """Undo a forward that did not reach the last layer."""
        progress = self._shared.progress
        if progress.step is not None:
            progress.abandon()
            for layer in self.tls_layers:
                layer.cut(progress.lens)
