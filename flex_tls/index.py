"""The index of one layer: token labels for both levels and, for some kinds, block summaries for level 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import labels
from ._check import check_no_nan, check_seq_lens, check_tensor
from .config import TLSConfig
from .labels import TokenLabels
from .summaries import BlockSummary, MeanSummary, MinMaxSummary


@dataclass(frozen=True)
class KeyChunks:
    """Keys that are not all on the device at once: ``read()`` yields them in order, [B, HKV, S', D], S in all."""

    n_tokens: int
    read: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, k: Tensor | KeyChunks) -> KeyChunks:
        """Keys as chunks; a tensor is one."""
        return k if isinstance(k, KeyChunks) else cls(k.shape[2], lambda: (k,))


# Query tokens of one call that the fused kernels take
MAX_QUERY_TOKENS = 16


class KVIndex:
    """What selection knows of a layer's keys, grown as tokens come.

    Rows are left aligned: token s of row b sits at slot s, and slots from ``seq_lens[b]`` on are never read
    (:func:`flex_tls.ragged.align_left` turns a left-padded batch into this). Buffers are allocated once for
    ``capacity_tokens`` and keep their addresses; :meth:`append` writes in place and does not synchronise.

    Attributes:
        seq_lens: int64 [B], tokens held by each row.
        max_len: upper bound on the longest row, known to the host.
        fitted_tokens: longest row that the labels' projection was fitted on; 0 before the first fit.
        observed_tokens: query tokens noted since that fit.
        capacity_tokens: tokens that a row can hold (S).
    """

    def __init__(
        self,
        cfg: TLSConfig,
        *,
        batch_size: int,
        n_kv_heads: int,
        head_dim: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("n_kv_heads", n_kv_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if capacity_tokens < 1:
            raise ValueError(f"capacity_tokens: expected room for at least 1 token, got {capacity_tokens}")
        device = torch.device(device)
        self.cfg = cfg
        self.dtype = dtype
        self.capacity_tokens = capacity_tokens
        self.n_blocks = -(-capacity_tokens // cfg.block_size)
        self.seq_lens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_len = 0
        self.fitted_tokens = 0
        self.observed_tokens = 0
        dims = min(cfg.label_channels, head_dim)
        words = None if cfg.index == "oracle" else cfg.label_words(dims)
        # Whole blocks: selection then never meets a ragged edge, where Inductor's C++ (torch 2.13) reads stale memory
        self.labels = TokenLabels.empty(
            batch_size, n_kv_heads, self.n_blocks * cfg.block_size, head_dim, dims=dims, words=words, device=device
        )
        # Workspace of the fused kernels: all zeros before and after each call
        rows = batch_size * n_kv_heads * MAX_QUERY_TOKENS
        self.arrivals = torch.zeros(3, rows, dtype=torch.int32, device=device)
        shape = (batch_size, n_kv_heads, self.n_blocks, head_dim)
        self.summary: BlockSummary | None = None
        if cfg.index in ("quest", "box"):
            radius = 1.0 if cfg.index == "quest" else cfg.box_radius
            self.summary = MinMaxSummary(*shape, dtype, device, radius)
        elif cfg.index == "mean":
            self.summary = MeanSummary(*shape, dtype, device)

    @classmethod
    def build(
        cls,
        k: Tensor,
        cfg: TLSConfig,
        seq_lens: Tensor | None = None,
        q: Tensor | None = None,
        capacity_tokens: int | None = None,
    ) -> KVIndex:
        """Index a prompt: allocate, :meth:`fit`, :meth:`append`.

        Args:
            k: keys [B, HKV, S, D], un-repeated, after rotary embedding, rows left aligned.
            cfg: block size, index kind, label width.
            seq_lens: int [B], tokens of each row; all S by default.
            q: the prompt's queries [B, HQ, T, D], the last T tokens of each row; they weight the labels' projection.
            capacity_tokens: room for later tokens; S by default (then nothing can be appended).

        Raises:
            ValueError: empty rows, lengths beyond S, NaN in the keys, capacity below S.
        """
        check_tensor("k", k, (None, None, None, None), "B, HKV, S, D")
        b, h, s, d = k.shape
        capacity = s if capacity_tokens is None else capacity_tokens
        if s < 1:
            raise ValueError("k: expected at least 1 token, got 0; an empty sequence has no index")
        if capacity < s:
            raise ValueError(f"capacity_tokens: expected at least {s}, the keys' length, got {capacity}")
        lens = check_seq_lens(seq_lens, b, s, k.device)
        index = cls(
            cfg, batch_size=b, n_kv_heads=h, head_dim=d, capacity_tokens=capacity, dtype=k.dtype, device=k.device
        )
        index.fit(k, lens, q)
        index.append(k, None if seq_lens is None else lens)
        return index

    @property
    def batch_size(self) -> int:
        """B."""
        return self.seq_lens.shape[0]

    @property
    def n_kv_heads(self) -> int:
        """HKV."""
        return self.labels.codes.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.labels.to_query.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, labels, projection and summaries."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    @property
    def bytes_per_token(self) -> float:
        """Bytes a step reads to score one token of one KV head: its label and its share of the block summary."""
        codes = self.labels.codes
        total = codes.shape[2] * codes.element_size()
        if self.summary is None:
            return float(total)
        wide = sum(x.shape[-1] * x.element_size() for x in self.summary.tensors.values())
        return total + wide / self.cfg.block_size

    @property
    def kv_share(self) -> float:
        """``nbytes`` as a share of the bytes of the keys and values of the same capacity."""
        kv = 2 * self.batch_size * self.n_kv_heads * self.capacity_tokens * self.head_dim * self.dtype.itemsize
        return self.nbytes / kv

    def fit(self, k: Tensor | KeyChunks, seq_lens: Tensor | None = None, q: Tensor | None = None) -> None:
        """Choose the labels' projection and quantiser from k [B, HKV, S, D] and, if given, q [B, HQ, T, D] alone.

        Without ``q`` the queries of earlier calls and of :meth:`observe` count. As many queries as keys (T = S) are
        taken row by row as the keys' own. Sinks are left out where a row is four times longer: they are always kept,
        and their outlying keys would stretch the quantiser's range. Synchronises; call at prefill, never in a captured
        step.
        """
        keys = KeyChunks.of(k)
        lens = check_seq_lens(seq_lens, self.batch_size, keys.n_tokens, self.seq_lens.device)
        self._check_numbers(keys, lens)
        if q is not None:
            self._check_queries(q)
            self.labels.forget_queries()
            self.observe(q, lens if q.shape[2] == keys.n_tokens else None)
        _fit([self], [keys], lens)

    def observe(self, q: Tensor, counts: Tensor | None = None) -> None:
        """Note queries q [B, HQ, T, D] of a prompt's chunk, left aligned, for the next :meth:`fit` or :meth:`refit`.

        ``counts`` int [B]: valid queries of each row, T by default. What queries ask decides which errors of a label
        matter: a projection fitted on a prompt's first sixth alone had ten times the KL (docs/design.md).
        """
        self._check_queries(q)
        t = q.shape[2]
        column = torch.arange(t, device=q.device).expand(self.batch_size, t)
        self.labels.observe(q, column < (t if counts is None else counts.to(q.device)[:, None]))
        self.observed_tokens += t

    def refit(self, k: Tensor | KeyChunks) -> None:
        """Choose the projection anew from the cached keys k [B, HKV, S, D] and label every token again.

        For contexts that outgrew what the projection was fitted on. Synchronises.
        """
        self.fit(k, self.seq_lens)
        self.relabel(k)

    def relabel(self, k: Tensor | KeyChunks) -> None:
        """Label the cached keys k [B, HKV, S, D] anew, after a fit."""
        for first, chunk in self._chunks(KeyChunks.of(k)):
            self.labels.write(chunk, torch.full_like(self.seq_lens, first))

    def append(self, k_new: Tensor, counts: Tensor | None = None) -> None:
        """Take new keys k_new [B, HKV, T, D], in place. ``counts`` int64 [B]: valid keys of each row (default T).

        Without ``counts`` nothing synchronises and nothing but temporaries is allocated, so that a decode step can be
        captured; with ``counts`` (ragged prefill) the host asks for the longest row.
        """
        self._check_keys("k_new", k_new)
        t = k_new.shape[2]
        if counts is None:
            longest = self.max_len + t
        elif counts.shape != (self.batch_size,):
            raise ValueError(f"counts: expected shape ({self.batch_size},), got {tuple(counts.shape)}")
        else:
            longest = int((self.seq_lens + counts).max())
        self._check_room(longest)
        self.labels.write(k_new, self.seq_lens, counts)
        if self.summary is not None:
            column = torch.arange(t, device=k_new.device)
            block = (self.seq_lens[:, None] + column) // self.cfg.block_size
            if counts is not None:
                block = torch.where(column < counts[:, None], block, self.n_blocks)
            self.summary.add(k_new, block)
        self.seq_lens += t if counts is None else counts
        self.max_len = longest

    def crop(self, seq_lens: Tensor | int, k: Tensor | None = None) -> None:
        """Keep the first ``seq_lens`` tokens of each row (an int, or int [B]); rows already shorter stay.

        Args:
            seq_lens: lengths to keep, at least 0.
            k: cached keys [B, HKV, S', D], on any device. Kinds with block summaries need them to summarise the cut
                block again.
        """
        keep = torch.as_tensor(seq_lens, device=self.seq_lens.device, dtype=torch.int64).expand(self.batch_size)
        if int(keep.min()) < 0:
            raise ValueError(f"seq_lens: expected at least 0 tokens to keep, got {int(keep.min())}")
        keep = torch.minimum(keep, self.seq_lens)
        if self.summary is not None:
            if k is None:
                raise ValueError(
                    f"k: expected the cached keys, got None; index={self.cfg.index!r} summarises the cut block again"
                )
            size = self.cfg.block_size
            cut = keep // size
            self.summary.forget_from(cut)
            slot = cut[:, None] * size + torch.arange(size, device=keep.device)
            inside = slot < keep[:, None]
            slot = slot.clamp_max(k.shape[2] - 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            tail = k.gather(2, slot.to(k.device)).to(keep.device)
            self._check_keys("k", tail)
            self.summary.add(tail, torch.where(inside, cut[:, None], self.n_blocks))
        self.seq_lens.copy_(keep)
        self.max_len = int(keep.max())

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes the former row ``rows[i]`` (beam search); ``rows`` int64 [B'], the batch may change size.

        With B' = B everything is written in place, otherwise new buffers are allocated.
        """
        for name, buffer in self.labels.tensors.items():
            setattr(self.labels, name, _take_rows(buffer, rows))
        if self.summary is not None:
            for name, buffer in self.summary.tensors.items():
                self.summary.tensors[name] = _take_rows(buffer, rows)
        self.seq_lens = _take_rows(self.seq_lens, rows)
        if self.arrivals.shape[1] != self.batch_size * self.n_kv_heads * MAX_QUERY_TOKENS:
            self.arrivals = self.arrivals.new_zeros(3, self.batch_size * self.n_kv_heads * MAX_QUERY_TOKENS)

    def reset(self) -> None:
        """Forget every token and the fit; the buffers stay."""
        self.seq_lens.zero_()
        self.labels.forget_queries()
        self.max_len = 0
        self.fitted_tokens = 0
        self.observed_tokens = 0
        if self.summary is not None:
            self.summary.reset()

    def _tensors(self) -> list[Tensor]:
        extra = [] if self.summary is None else list(self.summary.tensors.values())
        return [*self.labels.tensors.values(), self.seq_lens, *extra]

    def _chunks(self, keys: KeyChunks) -> Iterator[tuple[int, Tensor]]:
        """(first slot, keys) of each chunk, checked."""
        first = 0
        for chunk in keys.read():
            self._check_keys("k", chunk)
            yield first, chunk
            first += chunk.shape[2]

    def _weighted(self, keys: KeyChunks, lens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(keys, weight bool [B, S']) of each chunk of rows of ``lens`` int64 [B]: what a fit counts."""
        for first, chunk in self._chunks(keys):
            slot = self._slots(first, chunk)
            counts = (slot >= self.cfg.sink_tokens) | (lens[:, None] <= 4 * self.cfg.sink_tokens)
            yield chunk, (slot < lens[:, None]) & counts

    def _check_numbers(self, keys: KeyChunks, lens: Tensor) -> None:
        """Raise ValueError if a token of rows of ``lens`` int64 [B] has NaN in its key."""
        for first, chunk in self._chunks(keys):
            check_no_nan("k", chunk, self._slots(first, chunk) < lens[:, None], first)

    def _slots(self, first: int, chunk: Tensor) -> Tensor:
        return torch.arange(first, first + chunk.shape[2], device=chunk.device)

    def _check_keys(self, name: str, k: Tensor) -> None:
        check_tensor(name, k, (self.batch_size, self.n_kv_heads, None, self.head_dim), "B, HKV, S, D")
        if k.dtype != self.dtype:
            raise TypeError(f"{name}: expected dtype {self.dtype}, the index's, got {k.dtype}")
        if k.device != self.seq_lens.device:
            raise ValueError(f"{name}: expected device {self.seq_lens.device}, the index's, got {k.device}")

    def _check_queries(self, q: Tensor) -> None:
        check_tensor("q", q, (self.batch_size, None, None, self.head_dim), "B, HQ, T, D")
        if q.device != self.seq_lens.device:
            raise ValueError(f"q: expected device {self.seq_lens.device}, the index's, got {q.device}")
        if q.shape[1] % self.n_kv_heads or q.shape[1] == 0:
            raise ValueError(f"q: expected HQ to be a multiple of HKV = {self.n_kv_heads}, got {q.shape[1]}")

    def _check_room(self, longest: int) -> None:
        if longest > self.capacity_tokens:
            raise ValueError(
                f"index: expected at most capacity_tokens={self.capacity_tokens} tokens a row, {longest} needed; "
                f"build it with capacity_tokens of at least {longest}"
            )


def advance(indexes: Sequence[KVIndex], n: int) -> None:
    """Count ``n`` more tokens of every row, whose labels a compiled step wrote (see ``flex_tls.static``).

    All layers in one launch: transformers' ``generate`` counts after every token.
    """
    for index in indexes:
        index._check_room(index.max_len + n)
    if indexes:
        torch._foreach_add_([index.seq_lens for index in indexes], n)
    for index in indexes:
        index.max_len += n


def fit(indexes: Sequence[KVIndex], keys: Sequence[KeyChunks], lens: Tensor) -> None:
    """:meth:`KVIndex.fit` of several layers of one configuration, with the queries that each has observed.

    ``keys``: of each layer, for rows of ``lens`` int64 [B]. Synchronises.
    """
    for index, k in zip(indexes, keys, strict=True):
        index._check_numbers(k, lens)
    _fit(indexes, keys, lens)


def _fit(indexes: Sequence[KVIndex], keys: Sequence[KeyChunks], lens: Tensor) -> None:
    weighted = [partial(index._weighted, k, lens) for index, k in zip(indexes, keys, strict=True)]
    labels.fit([index.labels for index in indexes], weighted, indexes[0].cfg.label_basis)
    for index in indexes:
        index.fitted_tokens = int(lens.max())
        index.observed_tokens = 0


def _take_rows(buffer: Tensor, rows: Tensor) -> Tensor:
    taken = buffer.index_select(0, rows.to(buffer.device))
    return buffer.copy_(taken) if taken.shape == buffer.shape else taken
