"""transformers' automatic compilation: ``model.generate`` decodes by the compiled step of ``tls.generate``.

``generate`` asks a cache whether it ``is_compileable``, and the model for its compiled forward. transformers would
compile ``model.__call__``; an enabled model gives :class:`CompiledForward` instead, in which the host's decisions come
between two steps: which step, whether the index is fitted anew, whether there is room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache import TLSCache
from ..capture import captured
from ..notice import is_shown
from ..step import DecodeStep, why_not_compiled

# What ``generate`` passes for a token. Whatever else is asked for (hidden states, say), the model's own forward gives
ARGUMENTS = {
    "input_ids", "position_ids", "past_key_values", "attention_mask", "use_cache", "logits_to_keep", "return_dict"
}  # fmt: skip


class CompiledForward:
    """The model's forward, in which one token a row over a :class:`flex_tls.TLSCache` is the compiled step.

    Attributes:
        options: Inductor's.
    """

    def __init__(self, model: Any, options: Mapping[str, Any] | None = None) -> None:
        self.model, self.options = model, options
        self.replays: _Replays | None = None

    def __call__(self, **inputs: Any) -> Any:
        """Logits [B, 1, V] are overwritten by the next call."""
        cache = inputs.get("past_key_values")
        if not isinstance(cache, TLSCache) or not _is_step(inputs):
            return self.model(**inputs)
        if self.replays is None or self.replays.cache is not cache:
            self.replays = _Replays(self.model, cache, self.options)
        if not self.replays.can_go_on():
            return self.model(**inputs)
        logits: Any = self.replays.next(inputs["input_ids"])[:, None]
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


class _Replays:
    """Compiled steps of one cache, on CUDA one graph each.

    Attributes:
        held: tokens of each row after the last of them.
    """

    def __init__(self, model: Any, cache: TLSCache, options: Mapping[str, Any] | None) -> None:
        self.model, self.cache, self.options = model, cache, options
        device = model.device
        self.is_possible = why_not_compiled(cache, device) is None
        self.token = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.start = torch.zeros(cache.batch_size, dtype=torch.int64, device=device)
        self.held: list[int] = []
        self.logits = torch.empty(0)
        # By whether they are sparse: the step, and the queries that it leaves for an audit
        self.steps: dict[bool, tuple[Callable[[], None], list[Tensor]]] = {}

    def can_go_on(self) -> bool:
        """Whether the next token can be a compiled step: there is room, and what it selects is at hand."""
        cache = self.cache
        if not self.is_possible or cache.get_seq_length() >= cache.max_len:
            return False
        cache.fit_where_due()
        if cache.seq_lens == self.held:
            return True
        # Nothing has run yet, or something else has
        if not cache.prepare():
            return False
        cache.join()
        self.start.copy_(torch.tensor(cache.seq_lens))
        return True

    def next(self, token: Tensor) -> Tensor:
        """Logits [B, V] of the tokens after ``token`` int64 [B, 1]."""
        cache = self.cache
        self.token.copy_(token)
        sparse = max(cache.seq_lens) + 1 > cache.cfg.dense_up_to_tokens
        if sparse not in self.steps:
            self.steps[sparse] = self._build(sparse)
        run, queries = self.steps[sparse]
        if cache.auditor is not None:
            cache.auditor.count_step()
        run()
        cache.advance(1)
        self.held = cache.seq_lens
        if queries:
            cache.audit(queries)
        return self.logits

    def _build(self, sparse: bool) -> tuple[Callable[[], None], list[Tensor]]:
        step = DecodeStep.of(self.model, self.cache, sparse, self.options)

        def run() -> None:
            self.logits = step(self.token, self.start, is_shown(None))
            self.start += 1

        if not self.token.is_cuda:
            return run, step.queries
        state = [self.token, self.start, *self.cache.counters]
        return captured(run, state, rejoin=self.cache.rejoin), step.queries


def _is_step(inputs: Mapping[str, Any]) -> bool:
    token = inputs.get("input_ids")
    more = {name for name, value in inputs.items() if value is not None and value is not False} - ARGUMENTS
    return isinstance(token, Tensor) and token.shape[1] == 1 and not more
