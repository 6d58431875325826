"""The host store: every key and value of one layer, in memory that the device can read by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .blocks import Blocks, empty_blocks
from .config import StoreDtype


class HostStore(Blocks):
    """Keys and values of one layer in host memory, allocated once, zeros at first; laid out as :class:`.blocks.Blocks`.

    Attributes:
        rows: [B, HKV, N, BLOCK, 2, D], of the model's dtype or int8.
        scales: None, or, beside int8, float32 [B, HKV, N, BLOCK, 2].
        dtype: of keys and values where they are attended to.
        pinned: the device can read it by itself; valid until the store is closed or collected.
    """

    def __init__(
        self, *, batch_size: int, n_kv_heads: int, n_blocks: int, block_size: int, head_dim: int, dtype: torch.dtype,
        pinned: bool, store_dtype: StoreDtype = "model",
    ) -> None:  # fmt: skip
        self.rows, self.scales = empty_blocks(
            batch_size, n_kv_heads, n_blocks, block_size, 2, head_dim, dtype=dtype, store_dtype=store_dtype
        )
        self.dtype, self.store_dtype, self.pinned = dtype, store_dtype, pinned
        self._unpin: list[Callable[[], object]] = []
        try:
            for part in self.parts if pinned else ():
                self._unpin.append(weakref.finalize(self, _unpin, _pin(part)))
        except BaseException:
            # Not when the error's traceback is forgotten: its catcher may try again
            self.close()
            raise

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Rows and, in 8 bits, scales: all that is held."""
        return (self.rows,) if self.scales is None else (self.rows, self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(x.nbytes for x in self.parts)

    def take_rows(self, rows: Tensor, n_blocks: int) -> None:
        """Row i becomes the former row ``rows[i]``, in its first ``n_blocks`` blocks; one head is copied at a time."""
        moved = [(i, row) for i, row in enumerate(rows.tolist()) if i != row]
        for head in range(self.rows.shape[1]) if moved else ():
            for part in self.parts:
                blocks = part[:, head, :n_blocks]
                former = {row: blocks[row].clone() for row in {row for _, row in moved}}
                for i, row in moved:
                    blocks[i] = former[row]

    def write(self, new: tuple[Tensor, ...], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Put the first ``counts[b]`` of new tokens, :meth:`packed` [B, HKV, T, 2, ...], at ``starts[b]``.

        From a CUDA device the copies are queued on the current stream.
        """
        for part, tokens in zip(self.tokens, new, strict=True):
            for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
                # Contiguous here and there, so that each is one copy that the host need not wait for
                for head in range(part.shape[1]):
                    part[row, head, start : start + count].copy_(tokens[row, head, :count], non_blocking=True)

    def read(self, row: int, start: int, end: int, out: Tensor) -> Tensor:
        """One row's tokens [HKV, end - start, 2, D] in ``out``, which is at least as long, on the current stream."""
        for head in range(out.shape[0]):
            parts = tuple(x[row, head, start:end] for x in self.tokens)
            if self.scales is not None:
                # Unpacked where they go
                parts = tuple(x.to(out.device, non_blocking=True) for x in parts)
            out[head, : end - start].copy_(self.unpacked(parts), non_blocking=True)
        return out[:, : end - start]

    def read_keys(self, n_tokens: int, piece_tokens: int, device: torch.device) -> Iterator[Tensor]:
        """The first ``n_tokens`` keys of every row, piece by piece: [B, HKV, S', D] on ``device``."""
        b, h, _, _, two, d = self.rows.shape
        piece = torch.empty(b, h, min(piece_tokens, n_tokens), two, d, dtype=self.dtype, device=device)
        for start in range(0, n_tokens, piece_tokens):
            end = min(start + piece_tokens, n_tokens)
            for row in range(b):
                self.read(row, start, end, piece[row])
            yield piece[:, :, : end - start, 0]

    def resized(self, rows: Tensor) -> HostStore:
        """A store of other rows, of which row i is a copy of ``rows[i]``."""
        _, h, n, size, _, d = self.rows.shape
        new = HostStore(
            batch_size=rows.shape[0], n_kv_heads=h, n_blocks=n, block_size=size, head_dim=d, dtype=self.dtype,
            pinned=self.pinned, store_dtype=self.store_dtype,
        )  # fmt: skip
        for part, former in zip(new.parts, self.parts, strict=True):
            for i, row in enumerate(rows.tolist()):
                part[i] = former[row]
        return new

    def close(self) -> None:
        """Unpin the memory; the device must not read it any more."""
        self.pinned = False
        for unpin in self._unpin:
            unpin()


def _pin(rows: Tensor) -> Tensor:
    """Page-lock the memory where it is: PyTorch's own pinned memory comes in powers of two, up to twice the bytes."""
    torch.cuda.init()  # type: ignore[no-untyped-call,unused-ignore]
    n_bytes = rows.numel() * rows.element_size()
    status = int(torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), n_bytes, 0))  # type: ignore[no-untyped-call,unused-ignore]
    if status != 0:
        _forget_error()
        raise MemoryError(
            f"offload: {n_bytes:,} bytes of host memory could not be page-locked (CUDA error {status}); lower max_len "
            "or batch_size, or raise the limit of locked memory (ulimit -l)"
        )
    return rows


def _forget_error() -> None:
    """Let a kernel's launch report the runtime's last error: else somebody's next launch would, for no fault of its."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _unpin(rows: Tensor) -> None:
    # A store that is collected, not closed, may have transfers under way; nobody may wait while a graph is recorded
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(rows.data_ptr())  # type: ignore[no-untyped-call,unused-ignore]
