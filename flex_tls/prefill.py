"""Reading a prompt: the model's own forward in chunks, which bound the memory that it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import TLSCache
from .notice import bar

# Of all rows together: what reads 96k tokens of Qwen3-8B at 95 % of the speed of sdpa on an H100 (docs/design.md)
CHUNK_TOKENS = 16384


def read_prompt(
    model: Any, cache: TLSCache, ids: Tensor, mask: Tensor | None = None, *, chunk_tokens: int | None = None,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Feed what ``cache`` does not hold yet of ids int64 [B, S]; returns logits [B, V] of the tokens after.

    Args:
        mask: [B, S], zeros where there is padding, on the left; None without padding.
        chunk_tokens: columns of one forward, CHUNK_TOKENS over all rows by default. They bound the memory that it takes
            beside the cache: about 100 kB a token of Qwen3-8B in bfloat16 (three activations of its MLP; as many bytes
            where a chunk's two attentions are merged), so 1.6 GB by default. Counted, not measured.
        progress: show a bar.
    """
    first, n = cache.get_seq_length(), ids.shape[1]
    if chunk_tokens is None:
        chunk_tokens = max(CHUNK_TOKENS // ids.shape[0], cache.cfg.sparse_query_tokens + 1)
    # What is left over goes with the chunk before it where it alone would attend sparsely
    sparse_tokens = cache.cfg.sparse_query_tokens
    rest = sparse_tokens if chunk_tokens > sparse_tokens else 0
    ends = [*range(first + chunk_tokens, n - rest, chunk_tokens), n]
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
