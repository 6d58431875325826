"""The host store: every key and value of one layer, in memory that the device can read by itself."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class HostStore:
    """Keys and values of one layer in host memory, allocated once, zeros at first.

    A token's key and value lie side by side, and so do a block's tokens: a block of one KV head is one row of memory,
    and keys and values of a row and head are each one strided view over all of its tokens.

    Attributes:
        rows: [B, HKV, N, BLOCK, 2, D]; keys at 0 and values at 1 of the last dimension but one.
        pinned: the device can read it by itself; valid until the store is closed or collected.
    """

    def __init__(
        self, *, batch_size: int, n_kv_heads: int, n_blocks: int, block_size: int, head_dim: int, dtype: torch.dtype,
        pinned: bool,
    ) -> None:  # fmt: skip
        self.rows = torch.zeros(batch_size, n_kv_heads, n_blocks, block_size, 2, head_dim, dtype=dtype)
        self.pinned = pinned
        self._unpin = weakref.finalize(self, _unpin, _pin(self.rows)) if pinned else None

    @property
    def tokens(self) -> Tensor:
        """The rows as tokens: [B, HKV, S, 2, D]."""
        return self.rows.flatten(2, 3)

    @property
    def keys(self) -> Tensor:
        """[B, HKV, S, D], a view."""
        return self.tokens[:, :, :, 0]

    @property
    def values(self) -> Tensor:
        """[B, HKV, S, D], a view."""
        return self.tokens[:, :, :, 1]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's keys and values."""
        return self.rows[0, 0, 0].numel() * self.rows.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows.numel() * self.rows.element_size()

    def take_rows(self, rows: Tensor, n_blocks: int) -> None:
        """Row i becomes the former row ``rows[i]``, in its first ``n_blocks`` blocks; one head is copied at a time."""
        moved = [(i, row) for i, row in enumerate(rows.tolist()) if i != row]
        for head in range(self.rows.shape[1]) if moved else ():
            blocks = self.rows[:, head, :n_blocks]
            former = {row: blocks[row].clone() for row in {row for _, row in moved}}
            for i, row in moved:
                blocks[i] = former[row]

    def write(self, k: Tensor, v: Tensor, starts: Sequence[int], counts: Sequence[int]) -> None:
        """Put the first ``counts[b]`` tokens of k and v [B, HKV, T, D] at ``starts[b]``.

        From a CUDA device the copies are queued on the current stream.
        """
        both = torch.stack((k, v), 3)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            # Contiguous here and there, so that each is one copy that the host need not wait for
            for head in range(both.shape[1]):
                self.tokens[row, head, start : start + count].copy_(both[row, head, :count], non_blocking=True)

    def read(self, row: int, start: int, end: int, out: Tensor) -> Tensor:
        """One row's tokens [HKV, end - start, 2, D] in ``out``, which is at least as long, on the current stream."""
        for head in range(out.shape[0]):
            out[head, : end - start].copy_(self.tokens[row, head, start:end], non_blocking=True)
        return out[:, : end - start]

    def read_keys(self, n_tokens: int, piece_tokens: int, device: torch.device) -> Iterator[Tensor]:
        """The first ``n_tokens`` keys of every row, piece by piece: [B, HKV, S', D] on ``device``."""
        b, h, _, _, two, d = self.rows.shape
        piece = torch.empty(b, h, min(piece_tokens, n_tokens), two, d, dtype=self.rows.dtype, device=device)
        for start in range(0, n_tokens, piece_tokens):
            end = min(start + piece_tokens, n_tokens)
            for row in range(b):
                self.read(row, start, end, piece[row])
            yield piece[:, :, : end - start, 0]

    def resized(self, rows: Tensor) -> HostStore:
        """A store of other rows, of which row i is a copy of ``rows[i]``."""
        _, h, n, size, _, d = self.rows.shape
        new = HostStore(
            batch_size=rows.shape[0], n_kv_heads=h, n_blocks=n, block_size=size, head_dim=d, dtype=self.rows.dtype,
            pinned=self.pinned,
        )  # fmt: skip
        for i, row in enumerate(rows.tolist()):
            new.rows[i] = self.rows[row]
        return new

    def close(self) -> None:
        """Unpin the memory; the device must not read it any more."""
        self.pinned = False
        if self._unpin is not None:
            self._unpin()


def _pin(rows: Tensor) -> Tensor:
    """Page-lock the memory where it is: PyTorch's own pinned memory comes in powers of two, up to twice the bytes."""
    torch.cuda.init()  # type: ignore[no-untyped-call,unused-ignore]
    n_bytes = rows.numel() * rows.element_size()
    status = int(torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), n_bytes, 0))  # type: ignore[no-untyped-call,unused-ignore]
    if status != 0:
        raise MemoryError(
            f"offload: {n_bytes:,} bytes of host memory could not be page-locked (CUDA error {status}); lower max_len "
            "or batch_size, or raise the limit of locked memory (ulimit -l)"
        )
    return rows


def _unpin(rows: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(rows.data_ptr())  # type: ignore[no-untyped-call,unused-ignore]
