"""When a row of a batch has ended, decided on the device: part of a captured step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# No token: fills the place of tokens before a short prompt, and matches nothing
NONE = 2**31 - 1


class Stops:
    """Stop tokens, and stop strings by transformers' rule: a token that completes one ends the row, and is kept.

    Args:
        ids: int64 [B, S], the prompt; a stop string may begin in it.
        token_ids: tokens that end a row.
        strings: strings that end a row.
        tokenizer: transformers' tokenizer of the model, for ``strings``.

    Attributes:
        token_ids: int64 [n].
        tail: int64 [B, M], the last tokens that a stop string could reach, None without strings.

    Raises:
        ValueError: strings without a tokenizer, or an empty one.
    """

    def __init__(
        self, ids: Tensor, token_ids: Sequence[int], strings: Sequence[str] = (), tokenizer: Any = None
    ) -> None:
        self.token_ids = torch.tensor(list(token_ids), dtype=torch.int64, device=ids.device)
        self.tail: Tensor | None = None
        if not strings:
            return
        if any(not string for string in strings):
            raise ValueError(f"stop_strings: expected strings with at least one character, got {list(strings)}")
        if tokenizer is None:
            raise ValueError("tokenizer: expected the model's tokenizer, to read stop_strings with, got None")
        from transformers import StopStringCriteria

        self._criteria = StopStringCriteria(tokenizer, list(strings))
        m = self._criteria.maximum_token_len
        self.tail = torch.full((ids.shape[0], m), NONE, dtype=torch.int64, device=ids.device)
        held = min(m, ids.shape[1])
        self.tail[:, m - held :] = ids[:, ids.shape[1] - held :]

    def ends(self, token: Tensor) -> Tensor:
        """Whether ``token`` int64 [B], the next of each row, ends it: bool [B]. Strings remember it."""
        ended = torch.isin(token, self.token_ids)
        if self.tail is not None:
            self.tail.copy_(torch.cat([self.tail[:, 1:], token[:, None]], 1))
            ended = ended | self._criteria(self.tail, None)
        return ended
