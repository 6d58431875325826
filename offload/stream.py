"""Reading a row of the host store in order, two pieces under way at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .store import HostStore
from .transfers import side_stream


class RowReader:
    """Reads rows of any store of one shape to a device; owns two buffers [HKV, ``piece_tokens``, 2, D] there.

    A piece is valid until the next one is asked for, on the stream that was current when reading began.
    """

    def __init__(self, like: HostStore, device: torch.device, piece_tokens: int) -> None:
        _, h, _, _, two, d = like.rows.shape
        self.device, self.piece_tokens = device, piece_tokens
        self._buffers = (
            [torch.empty(h, piece_tokens, two, d, dtype=like.dtype, device=device) for _ in range(2)]
            if device.type == "cuda"
            else []
        )

    def read(self, store: HostStore, row: int, n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [HKV, S', D] of the row's first ``n_tokens`` tokens, piece by piece."""
        starts = range(0, n_tokens, self.piece_tokens)
        if self.device.type != "cuda":
            for start in starts:
                end = min(start + self.piece_tokens, n_tokens)
                keys, values = store.unpacked(tuple(x[row, :, start:end] for x in store.tokens)).unbind(2)
                yield keys, values
            return
        side, main = side_stream(self.device), torch.cuda.current_stream(self.device)
        # What was written to the store, and whoever still reads the buffers, comes first
        side.wait_stream(main)
        arrived: list[tuple[Tensor, torch.cuda.Event]] = []
        for i, start in enumerate((*starts, None)):
            if start is not None:
                with torch.cuda.stream(side):
                    piece = store.read(row, start, min(start + self.piece_tokens, n_tokens), self._buffers[i % 2])
                    arrived.append((piece, side.record_event()))
            if i > 0:
                piece, event = arrived.pop(0)
                main.wait_event(event)
                keys, values = piece.unbind(2)
                yield keys, values
                side.wait_stream(main)
