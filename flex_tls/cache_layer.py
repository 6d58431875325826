"""One layer of a ``TLSCache``: its buffers, its index, and which attention a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention import Attended, Backend, attend
from .audit import Auditor
from .config import TLSConfig
from .dense import causal_attention, chunk_attention, dense_attention
from .index import KeyChunks, KVIndex
from .model_config import ModelShape
from .mods import MaskMod
from .progress import Progress, Step
from .ragged import align_left, align_right
from .record import Recorder
from .static import decode_layer

# Labels are fitted when decoding begins, on all keys and queries of the prompt. A projection fitted on this many tokens
# is not fitted again; before, every time the context has quadrupled
FIT_ENOUGH_TOKENS = 4096
REFIT_GROWTH = 4
# What is read later is fitted too, with its queries, if it made the context this much longer
REFIT_AFTER_CHUNKS = 1.25


@dataclass
class Shared:
    """What the layers of one cache share."""

    cfg: TLSConfig
    backend: Backend
    shape: ModelShape
    max_len: int
    progress: Progress
    recorder: Recorder | None = None
    auditor: Auditor | None = None
    cfg_of_layer: list[TLSConfig] = field(init=False)

    def __post_init__(self) -> None:
        self.configure(self.cfg)

    def configure(self, cfg: TLSConfig) -> None:
        """Take other settings from now on. Raises ValueError if they are of a model with another number of layers."""
        shares, n_layers = cfg.block_shares, self.shape.n_layers
        if shares is not None and len(shares) != n_layers:
            raise ValueError(f"block_shares: expected {n_layers} numbers, one a layer, got {len(shares)}")
        # Here, since a compiled step that is traced could not work it out
        self.cfg, self.cfg_of_layer = cfg, [cfg.for_layer(i) for i in range(n_layers)]

    @property
    def capacity_tokens(self) -> int:
        size = self.cfg.block_size
        return -(-self.max_len // size) * size


class TLSLayer(CacheLayerMixin):  # type: ignore[misc,no-untyped-call,unused-ignore]
    """Keys and values [B, HKV, S, D] of one layer and, unless it stays dense, their index.

    Rows are left aligned. :meth:`update` writes, :meth:`attend` reads; both belong to the step that
    :meth:`TLSCache.begin` began.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, shared: Shared, layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.shared = shared
        self.layer_idx = layer_idx
        self.window = shared.shape.windows[layer_idx]
        self.index: KVIndex | None = None
        self._step: Step | None = None
        # Of the scores, as the last eager forward gave it: a prompt goes before every compiled step
        self._scale = 0.0

    @property
    def cfg(self) -> TLSConfig:
        """The layer's configuration."""
        return self.shared.cfg_of_layer[self.layer_idx]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys of this dtype on this device."""
        self.allocate(key_states.dtype, key_states.device)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate keys, values and index."""
        shared = self.shared
        b, s = shared.progress.batch_size, shared.capacity_tokens
        self.keys = torch.zeros(b, shared.shape.n_kv_heads, s, shared.shape.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        if not shared.cfg.is_dense(self.layer_idx):
            self.index = new_index(shared, dtype, device)
        self.is_initialized = True

    def release(self) -> None:
        """Give every buffer back; the layer is as new."""
        self.keys = self.values = self.index = None
        self.is_initialized = False

    def begun(self) -> Step:
        """The step under way, not yet taken by this layer."""
        step = self.shared.progress.step
        if step is None or step is self._step:
            raise RuntimeError(
                "TLSCache.update: expected TLSCache.begin before every forward, got none; call tls.enable(model), "
                "which does it"
            )
        return step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, HKV, T, D]. Returns the whole buffers; the keys know their layer."""
        step = self.begun()
        keys, values = self.on_device()
        for name, new in (("key", key_states), ("value", value_states)):
            b, h, _, d = keys.shape
            if new.shape != (b, h, step.n_new, d):
                raise ValueError(
                    f"{name}: expected shape {(b, h, step.n_new, d)} [B, HKV, T, D], got {tuple(new.shape)}; was the "
                    "cache made for this model and batch size?"
                )
            if (new.dtype, new.device) != (keys.dtype, keys.device):
                raise ValueError(
                    f"{name}: expected {keys.dtype} on {keys.device}, the cache's, got {new.dtype} on {new.device}; "
                    "make the cache with the model's dtype and device (or with neither)"
                )
        with torch.no_grad():
            if step.left_pad is not None:
                key_states = align_left(key_states, step.left_pad)
                value_states = align_left(value_states, step.left_pad)
            index = self.index
            key_states, value_states = self._write(key_states, value_states, step)
            if index is not None and index.fitted_tokens:
                index.append(key_states, step.counts)
        self._step = step
        # A view, which lives as long as the attention call does: no reference cycle keeps the buffers alive
        handle = keys.view_as(keys)
        handle._tls_layer = self  # type: ignore[attr-defined]
        return handle, values

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Attention of the step's queries q [B, HQ, T, D], after :meth:`update`; the last layer ends the step.

        A prompt attends densely; so do chunks of more than ``sparse_query_tokens`` queries, ``dense_layers``, and
        contexts that the budgets hold whole or ``sparse_from_tokens`` is above. All else is two-level attention.
        """
        step, progress = self._step, self.shared.progress
        self._scale = scale
        if step is None or step is not progress.step:
            raise RuntimeError("TLSLayer.attend: expected TLSLayer.update before it in the same forward, got none")
        index = self.index
        if index is not None and (not index.fitted_tokens or step.n_new > self.shared.cfg.sparse_query_tokens):
            # What the next fit will weight
            with torch.no_grad():
                index.observe(q if step.left_pad is None else align_left(q, step.left_pad), step.counts)
        out = self._attend_prompt(q, step, scale) if step.is_fresh else self._attend_past(q, step, scale)
        if self.layer_idx == self.shared.shape.n_layers - 1:
            progress.commit()
        return out

    def decode(
        self, q: Tensor, k_new: Tensor, v_new: Tensor, start: Tensor, *, scale: float, sparse: bool, arrivals: Tensor
    ) -> Tensor:
        """Write and attend in a compiled step; see :func:`flex_tls.static.decode_layer`."""
        keys, values = self.buffers()
        return decode_layer(
            q, k_new, v_new, keys, values, self.index, start, self.cfg, scale=scale, sparse=sparse,
            arrivals=arrivals,
        )  # fmt: skip

    def audit(self, q: Tensor) -> None:
        """Compare what a compiled step selected for q [B, HQ, T, D], after :meth:`TLSCache.advance` counted it."""
        auditor, index = self.shared.auditor, self.index
        assert auditor is not None
        if index is None or self.why_dense(q.shape[2], max(self.shared.progress.lens)) is not None:
            return
        # The compiled step's own kernels, whatever an eager step would run
        tokens = attend(q, *self.buffers(), index, self.cfg, scale=self._scale, backend="triton").tokens
        assert tokens is not None
        auditor.add(self.layer_idx, q, self.buffers()[0], tokens, self.cfg, scale=self._scale)

    def why_dense(self, n_new: int, longest: int) -> str | None:
        """Why ``n_new`` tokens that make the longest row ``longest`` attend densely; None if they select."""
        cfg, reach = self.cfg, self.reach(longest)
        if cfg.is_dense(self.layer_idx):
            return f"dense_layers={cfg.dense_layers}: this layer stays dense"
        if n_new > cfg.sparse_query_tokens:
            return f"{n_new:,} query tokens, more than sparse_query_tokens={cfg.sparse_query_tokens}"
        if reach <= cfg.held_tokens:
            return f"the budgets hold all {reach:,} tokens that a query sees"
        if reach <= cfg.dense_up_to_tokens:
            return f"{reach:,} tokens in sight, fewer than sparse_from_tokens={cfg.sparse_from_tokens:,}"
        return None

    def reach(self, longest: int) -> int:
        """Tokens that a query can see in a row of ``longest``."""
        return longest if self.window is None else min(longest, self.window)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, HKV, S, D]."""
        return cast(Tensor, self.keys), cast(Tensor, self.values)

    def restore(self, k: Tensor, v: Tensor) -> None:
        """Hold k and v [B, HKV, S', D], on any device, as the rows' first tokens; lengths are the caller's."""
        for buffer, new in zip(self.buffers(), (k, v), strict=True):
            buffer[:, :, : new.shape[2]].copy_(new)

    def held(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``n_tokens`` of every row."""
        keys, values = self.buffers()
        return keys[:, :, :n_tokens], values[:, :, :n_tokens]

    def on_device(self) -> tuple[Tensor, Tensor]:
        """What the model's device holds of them, [B, HKV, ..., D], in their dtype."""
        return self.buffers()

    def cut(self, lens: list[int]) -> None:
        """Keep the first ``lens[b]`` tokens of each row."""
        self._step = None
        if self.index is None:
            return
        if max(lens) == 0:
            self.index.reset()
        elif self.index.fitted_tokens:
            self.index.crop(torch.tensor(lens), self.buffers()[0])

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the former row ``rows[i]``; in place if the batch keeps its size."""
        if not self.is_initialized:
            return
        keys, values = self.buffers()
        rows = rows.to(keys.device)
        if rows.shape[0] == keys.shape[0]:
            used = max(self.shared.progress.lens)
            for buffer in (keys, values):
                buffer[:, :, :used] = buffer[:, :, :used].index_select(0, rows)
        else:
            self.keys, self.values = keys.index_select(0, rows), values.index_select(0, rows)
        if self.index is not None:
            self.index.reorder(rows)

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self._step = None
        if self.index is not None:
            self.index.reset()

    def get_seq_length(self) -> int:
        """Columns so far, padding included, as Hugging Face counts."""
        return self.shared.progress.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns after a forward of ``query_length``, offset 0)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Columns that fit."""
        return self.shared.max_len

    @property
    def fit_is_due(self) -> bool:
        """Whether the index is to be fitted before the next sparse step."""
        index, lens = self.index, self.shared.progress.held
        if index is None or min(lens) == 0:
            return False
        return not index.fitted_tokens or index.max_len >= self.refit_at_tokens

    @property
    def refit_at_tokens(self) -> float:
        """Length from which on the fit is outgrown; infinite if it lasts."""
        index = self.index
        if index is None or not index.fitted_tokens:
            return math.inf
        if index.observed_tokens:
            return REFIT_AFTER_CHUNKS * index.fitted_tokens
        return REFIT_GROWTH * index.fitted_tokens if index.fitted_tokens < FIT_ENOUGH_TOKENS else math.inf

    def key_chunks(self, n_tokens: int) -> KeyChunks:
        """The first ``n_tokens`` keys of every row, for the index."""
        return KeyChunks.of(self.held(n_tokens)[0])

    def label(self) -> None:
        """Put every token that the cache holds into the index, which has just been fitted."""
        index, lens = self.index, self.shared.progress.held
        assert index is not None
        keys = self.key_chunks(max(lens))
        if index.max_len:
            index.relabel(keys)
            return
        ragged, first = len(set(lens)) > 1, 0
        held = torch.tensor(lens, device=index.seq_lens.device)
        for chunk in keys.read():
            index.append(chunk, (held - first).clamp(0, chunk.shape[2]) if ragged else None)
            first += chunk.shape[2]

    def _write(self, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Put the step's keys and values [B, HKV, T, D], left aligned, behind each row's tokens; gives them as held."""
        keys, values = self.buffers()
        _write(keys, k, step)
        _write(values, v, step)
        return k, v

    def _prompt(self, step: Step) -> tuple[Tensor, Tensor]:
        """Keys and values [B, HKV, T, D] of a fresh cache's first tokens, left aligned."""
        keys, values = (x[:, :, : step.n_new] for x in self.buffers())
        return keys, values

    def _attend_prompt(self, q: Tensor, step: Step, scale: float) -> Tensor:
        keys, values = self._prompt(step)
        if step.left_pad is None:
            return causal_attention(q, keys, values, scale=scale, window=self.window)
        out = causal_attention(align_left(q, step.left_pad), keys, values, scale=scale, window=self.window)
        return align_right(out, step.left_pad)

    def _attend_past(self, q: Tensor, step: Step, scale: float) -> Tensor:
        shared, cfg, index = self.shared, self.cfg, self.index
        decoding = step.n_new <= cfg.sparse_query_tokens
        recorder = shared.recorder if decoding else None
        reach = self.reach(step.longest)
        n_read = step.n_new * sum(min(n, reach) for n in step.lens_after)
        if recorder is not None and self.layer_idx == 0:
            recorder.count_tokens(step.n_new * len(step.lens_after))
        auditor = shared.auditor if decoding else None
        if auditor is not None:
            if self.layer_idx == 0:
                auditor.count_step()
            cfg = auditor.config(self.layer_idx, cfg)
        dense = self.why_dense(step.n_new, step.longest) is not None
        if dense or index is None or not index.fitted_tokens or self.reach(step.longest) <= cfg.dense_up_to_tokens:
            if recorder is not None:
                keys = self.on_device()[0]
                recorder.add_dense(n_read, 2 * keys.shape[1] * keys.shape[3] * keys.element_size())
            return self._attend_all(q, step, scale)
        mask_mod = None if self.window is None else window_mask(self.window)
        audited = auditor is not None and auditor.due == self.layer_idx
        result = self._attend_two_levels(q, step, index, cfg, mask_mod, scale, recorder is not None or audited)
        if auditor is not None and audited:
            assert result.tokens is not None
            auditor.add(self.layer_idx, q, self.buffers()[0], result.tokens, cfg, scale=scale, mask_mod=mask_mod)
        if recorder is not None:
            assert result.blocks is not None
            assert result.tokens is not None
            recorder.add_sparse(
                self.layer_idx, q, self.buffers()[0].to(q.device), index, result.blocks, result.tokens,
                n_tokens=n_read, scale=scale, mask_mod=mask_mod,
            )  # fmt: skip
        return result.out

    def _attend_all(self, q: Tensor, step: Step, scale: float) -> Tensor:
        """Attention to every token."""
        if step.n_new > self.shared.cfg.sparse_query_tokens and self.window is None:
            return chunk_attention(q, *self.buffers(), step.lens_after, scale=scale)
        keys, values = self.held(step.longest)
        same = len(set(step.lens_after)) == 1
        return dense_attention(q, keys, values, step.seq_lens, scale=scale, window=self.window, same_length=same)

    def _attend_two_levels(
        self, q: Tensor, step: Step, index: KVIndex, cfg: TLSConfig, mask_mod: MaskMod | None, scale: float,
        selected: bool,
    ) -> Attended:  # fmt: skip
        """Attention to what two levels keep; the selections too if ``selected``."""
        return attend(
            q, *self.buffers(), index, cfg,
            mask_mod=mask_mod, scale=scale, backend=self.shared.backend, selected=selected,
        )  # fmt: skip


@cache
def window_mask(window: int) -> MaskMod:
    """``mask_mod`` of a sliding window: a query sees itself and the ``window - 1`` tokens before it.

    One function per window, so that compiled attention knows it again.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < window

    return mask_mod


def new_index(shared: Shared, dtype: torch.dtype, device: torch.device) -> KVIndex:
    """An empty index for one layer of a cache."""
    return KVIndex(
        shared.cfg,
        batch_size=shared.progress.batch_size,
        n_kv_heads=shared.shape.n_kv_heads,
        head_dim=shared.shape.head_dim,
        capacity_tokens=shared.capacity_tokens,
        dtype=dtype,
        device=device,
    )


def _write(buffer: Tensor, new: Tensor, step: Step) -> None:
    """Put new [B, HKV, T, D], left aligned, behind each row's tokens. Padding lands in slots that are never read."""
    t = new.shape[2]
    if step.is_uniform:
        first = step.lens_before[0]
        buffer[:, :, first : first + t] = new
    else:
        slots = step.start[:, None] + torch.arange(t, device=new.device)
        buffer.scatter_(2, slots[:, None, :, None].expand(new.shape), new)
