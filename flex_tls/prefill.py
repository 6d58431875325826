"""Reading a prompt: the model's own forward in chunks, which bound the memory that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import TLSCache
from .notice import bar

CHUNK_TOKENS = 4096


def read_prompt(
    model: Any, cache: TLSCache, ids: Tensor, mask: Tensor | None = None, *, chunk_tokens: int = CHUNK_TOKENS,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Feed what ``cache`` does not hold yet of ids int64 [B, S]; returns logits [B, V] of the tokens after.

    ``mask`` [B, S]: zeros where there is padding, on the left; None without padding. ``chunk_tokens`` bounds the
    memory that a forward takes beside the cache.
    """
    first, n = cache.get_seq_length(), ids.shape[1]
    # Rows without a token in a chunk would spoil it: padding and the first tokens go together
    pad = 0 if mask is None else int((mask == 0).sum(1).max())
    ends = [*range(max(first, pad) + chunk_tokens, n, chunk_tokens), n]
    with bar("reading the prompt", n - first, "tok", progress) as shown:
        for end in ends:
            logits: Tensor = model(
                ids[:, first:end], attention_mask=None if mask is None else mask[:, :end],
                position_ids=_positions(mask, first, end, ids), past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            shown.update(end - first)
            first = end
    return logits


def _positions(mask: Tensor | None, first: int, end: int, ids: Tensor) -> Tensor:
    """Positions int64 [B, end - first], from 0 at each row's first token."""
    if mask is None:
        return torch.arange(first, end, device=ids.device).expand(ids.shape[0], -1)
    return (mask[:, :end].long().cumsum(1) - 1).clamp_min(0)[:, first:]
