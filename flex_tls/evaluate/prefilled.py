"""A prompt that is read once and decoded from by every method, each with an index of its own over the same keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..attention import Backend
from ..cache import TLSCache
from ..cache_layer import new_index
from ..config import TLSConfig
from ..device import why_not_here
from ..integrations.huggingface import enabled
from ..record import Recorder
from .eviction import evicting_cache
from .methods import Method

# Buffers of a whole number of blocks of any size: one cache serves every block size
LARGEST_BLOCK = 128

# Next tokens int64 [B, T] -> logits [B, T, V] of what follows each
Step = Callable[[Tensor], Tensor]


class Prefilled:
    """Keys, values and query statistics of a prompt of B rows of equal length.

    The prompt is read densely and in one piece, as :func:`flex_tls.enable` reads a prompt. A method then decodes as if
    it had read the prompt itself: its index is fitted on the same keys and queries (a test says that logits are equal).

    Args:
        model: a causal model of transformers, not enabled; it is so again whenever no method is decoding.
        ids: int64 [B, S].
        room_tokens: tokens that will be decoded after the prompt, at most.
        backend: of every method, see :meth:`backend_for`.
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: Tensor, room_tokens: int, backend: Backend = "auto") -> None:
        self.model = model
        self.ids = ids
        self.n_tokens = ids.shape[1]
        self._room_tokens = room_tokens
        self._backend = backend
        capacity = -(-(self.n_tokens + room_tokens) // LARGEST_BLOCK) * LARGEST_BLOCK
        self._cache = TLSCache(
            model.config,
            # Labels in every layer note the queries
            TLSConfig(dense_layers=0),
            batch_size=ids.shape[0],
            max_len=capacity,
            dtype=model.dtype,
            device=model.device,
            backend=backend,
        )
        with enabled(model):
            model(ids, past_key_values=self._cache, logits_to_keep=1)
        labels = [layer.index.labels for layer in self._cache.tls_layers if layer.index is not None]
        self._queries = [(x.query_sum, x.query_count) for x in labels]

    def backend_for(self, method: Method) -> str:
        """What decodes a method: "sdpa" for dense attention, "eviction" for H2O, otherwise a backend.

        That is the one asked for, or ("auto") the fused kernels where they can run. Elsewhere "auto" is the reference
        here, which selects and attends to the same: compiling every configuration of a comparison would take longer
        than running it.
        """
        if method.cfg is None:
            return "sdpa"
        return "eviction" if method.evicts else self._chosen()

    def _chosen(self) -> Backend:
        if self._backend != "auto":
            return self._backend
        device = self.model.device
        return "triton" if device.type == "cuda" and why_not_here(device) is None else "reference"

    @property
    def head_dim(self) -> int:
        """D."""
        return self._cache.tls_layers[0].shared.shape.head_dim

    @contextmanager
    def decoding(self, method: Method, recorder: Recorder | None = None) -> Iterator[Step]:
        """Decode from the end of the prompt with a method; dense is the model's own attention."""
        cfg = method.cfg
        if cfg is None:
            yield self._step(dynamic_copy(self._cache, self.model.config))
            return
        if method.evicts:
            with enabled(self.model):
                yield self._step(self._evicting(cfg))
            return
        self._cache.tls_layers[0].shared.backend = self._chosen()
        with torch.no_grad():
            self._index_again(cfg)
        self._cache.recorder = recorder
        try:
            with enabled(self.model):
                yield self._step(self._cache)
        finally:
            self._cache.recorder = None
            self._cache.crop(self.n_tokens)

    @torch.no_grad()
    def _evicting(self, cfg: TLSConfig) -> TLSCache:
        """The prompt read again: what is evicted depends on all of its queries."""
        cache = evicting_cache(self.model.config, cfg, self.ids.shape[0], self.n_tokens + self._room_tokens)
        self.model(self.ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def _index_again(self, cfg: TLSConfig) -> None:
        """What a prefill under ``cfg`` would have left behind."""
        for layer, (query_sum, query_count) in zip(self._cache.tls_layers, self._queries, strict=True):
            keys = layer.buffers()[0]
            layer.shared.configure(cfg)
            layer.index = None
            if cfg.is_dense(layer.layer_idx):
                continue
            layer.index = new_index(layer.shared, keys.dtype, keys.device)
            layer.index.labels.query_sum.copy_(query_sum)
            layer.index.labels.query_count.copy_(query_count)
            layer.index.fit(keys[:, :, : self.n_tokens])
            layer.index.append(keys[:, :, : self.n_tokens])

    def _step(self, past: Any) -> Step:
        @torch.no_grad()
        def step(tokens: Tensor) -> Tensor:
            logits: Tensor = self.model(tokens, past_key_values=past).logits
            return logits

        return step


def dynamic_copy(cache: TLSCache, model_config: Any) -> DynamicCache:
    """The keys and values of ``cache``, rows of equal length, as transformers' default cache."""
    n = cache.get_seq_length()
    copy = DynamicCache(config=model_config)
    for i, layer in enumerate(cache.tls_layers):
        keys, values = (x[:, :, :n].to(layer.on_device()[0].device, copy=True) for x in layer.buffers())
        copy.update(keys, values, i)
    return copy
