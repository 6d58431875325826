"""Which token of which row comes next: the bookkeeping of a cache that is fed left-padded batches.

Hugging Face speaks of columns: every row has the same number, and a 2-D mask says which are padding. The cache keeps
rows left aligned and without padding. Nothing here changes until a forward has gone through all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One forward: T new columns of each row, of which the last ``counts[b]`` are tokens and the others padding.

    Attributes:
        n_new: T.
        counts: int64 [B], or None if every column is a token.
        left_pad: int64 [B], T - counts, or None.
        lens_before: tokens that each row held, on the host.
        lens_after: tokens that each row will hold, on the host.
        start: int64 [B], ``lens_before`` on the device.
        seq_lens: int64 [B], ``lens_after`` on the device.
    """

    n_new: int
    counts: Tensor | None
    left_pad: Tensor | None
    lens_before: tuple[int, ...]
    lens_after: tuple[int, ...]
    start: Tensor
    seq_lens: Tensor

    def to(self, device: torch.device) -> Step:
        """The same step with its tensors on ``device``."""
        moved: dict[str, Any] = {f: x.to(device) for f, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @property
    def is_fresh(self) -> bool:
        """The cache was empty: this is a prompt."""
        return max(self.lens_before) == 0

    @property
    def is_uniform(self) -> bool:
        """All rows are equally long and none is padded, so that slices do instead of gathers."""
        return self.counts is None and len(set(self.lens_before)) == 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row afterwards."""
        return max(self.lens_after)


class Progress:
    """Committed columns and tokens, and the step under way.

    Attributes:
        lens: tokens of each row, on the host.
        length: columns so far, padding included; what Hugging Face calls the sequence length.
        step: the forward under way; None between forwards.
    """

    def __init__(self, batch_size: int) -> None:
        self.lens = [0] * batch_size
        self.length = 0
        self.step: Step | None = None
        # Bool [B, length]: which columns are tokens; None as long as all are
        self._columns: Tensor | None = None
        self._next_columns: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.lens)

    def read_mask(self, mask: Tensor | None, n_new: int) -> tuple[Tensor | None, Tensor | None]:
        """(kept, counts) of a mask [B, length + n_new], both int64 [B] or None for "all"; changes nothing.

        ``kept``: tokens of each row that the mask still shows. It may hide a row's last tokens, as when the padding
        after an end-of-sequence token is masked in the next turn. ``counts``: tokens among the new columns.

        Raises:
            ValueError: another shape, right padding, or hidden tokens in the middle of a row.
        """
        if mask is None:
            return None, None
        expected = (self.batch_size, self.length + n_new)
        if mask.dim() != 2 or mask.shape != expected:
            raise ValueError(
                f"attention_mask: expected shape {expected} [B, cached + new columns], {self.length} of them cached, "
                f"got {tuple(mask.shape)}; pass the mask of the whole sequence, or None without padding"
            )
        seen = mask != 0
        columns = self._columns
        if columns is None and bool(seen.all()):
            return None, None
        past, new = seen[:, : self.length], seen[:, self.length :]
        bad = (new[:, :-1] & ~new[:, 1:]).any(1)
        if bool(bad.any()):
            raise ValueError(
                f"attention_mask: expected left padding (zeros, then ones), got a zero after a one in row "
                f"{int(bad.nonzero()[0])}; set tokenizer.padding_side = 'left'"
            )
        stored = torch.ones_like(past) if columns is None else columns.to(past.device)
        kept: Tensor | None = None
        if not torch.equal(stored, past):
            kept = past.sum(1)
            bad = (past != (stored & (stored.cumsum(1) <= kept[:, None]))).any(1)
            if bool(bad.any()):
                raise ValueError(
                    f"attention_mask: expected the {self.length} cached columns to stay as they were, or to hide a "
                    f"row's last tokens, got another mask in row {int(bad.nonzero()[0])}; use a new cache"
                )
        return kept, None if bool(new.all()) else new.sum(1)

    @property
    def held(self) -> list[int]:
        """Tokens of each row that the buffers hold, whether or not a forward is under way."""
        return self.lens if self.step is None else list(self.step.lens_before)

    def begin(self, n_new: int, kept: Tensor | None, counts: Tensor | None, device: torch.device) -> None:
        """Start a forward with what :meth:`read_mask` found; rows were cut to ``kept`` by the caller."""
        before = tuple(self.lens if kept is None else kept.tolist())
        added = [n_new] * self.batch_size if counts is None else counts.tolist()
        after = tuple(old + new for old, new in zip(before, added, strict=True))
        start = torch.tensor(before, dtype=torch.int64, device=device)
        if counts is not None:
            counts = counts.to(device)
        self._next_columns = self._columns_after(n_new, kept, counts)
        self.step = Step(
            n_new=n_new,
            counts=counts,
            left_pad=None if counts is None else n_new - counts,
            lens_before=before,
            lens_after=after,
            start=start,
            seq_lens=start + (n_new if counts is None else counts),
        )

    def commit(self) -> None:
        """The forward went through all layers."""
        assert self.step is not None
        self.lens = list(self.step.lens_after)
        self.length += self.step.n_new
        self._columns, self._next_columns = self._next_columns, None
        self.step = None

    def advance(self, n: int) -> None:
        """``n`` more columns, all of them tokens."""
        self._columns = self._columns_after(n, None, None)
        self.lens = [x + n for x in self.lens]
        self.length += n

    def abandon(self) -> None:
        """The forward under way never ended: as if it had not begun."""
        self.step, self._next_columns = None, None

    def crop(self, length: int) -> None:
        """Keep the first ``length`` columns."""
        if self._columns is None:
            self.lens = [min(x, length) for x in self.lens]
        else:
            self._columns = self._columns[:, :length]
            self.lens = self._columns.sum(1).tolist()
        self.length = length

    def take_rows(self, rows: Tensor) -> None:
        """Row i becomes the former row ``rows[i]``."""
        if self._columns is not None:
            self._columns = self._columns[rows.to(self._columns.device)]
        if len(set(self.lens)) == 1:
            # No need to bring the rows to the host: they are all alike
            self.lens = self.lens[:1] * rows.shape[0]
        else:
            self.lens = [self.lens[i] for i in rows.tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs beside the counts."""
        return {} if self._columns is None else {"columns": self._columns}

    def restore(self, length: int, lens: list[int], tensors: dict[str, Tensor]) -> None:
        """Go on from ``length`` columns with ``lens`` tokens in the rows, of which ``tensors`` says what is padding."""
        self.lens, self.length, self._columns = list(lens), length, tensors.get("columns")

    def reset(self) -> None:
        """Forget everything but the batch size."""
        self.lens, self.length = [0] * self.batch_size, 0
        self._columns = None
        self.abandon()

    def _columns_after(self, n_new: int, kept: Tensor | None, counts: Tensor | None) -> Tensor | None:
        if self._columns is None and kept is None and counts is None:
            return None
        device = next(x.device for x in (self._columns, kept, counts) if x is not None)
        b = self.batch_size
        old = self._columns
        if old is None:
            old = torch.ones(b, self.length, dtype=torch.bool, device=device)
        if kept is not None:
            old = old & (old.cumsum(1) <= kept.to(device)[:, None])
        new = torch.arange(n_new, device=device)
        pad = torch.zeros(b, dtype=torch.int64, device=device) if counts is None else n_new - counts.to(device)
        return torch.cat([old, new >= pad[:, None]], dim=1)
