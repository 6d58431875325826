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
    "input_ids", "position_ids", "past_key_values", "attention_mask", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
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
        """A compiled step's logits [B, 1, V] hold until the next call."""
        cache = inputs.get("past_key_values")
        if not isinstance(cache, TLSCache) or not _is_step(inputs):
            return self.model(**inputs)
        if self.replays is None or self.replays.cache is not cache:
            self.replays = _Replays(self.model, cache, self.options)
        if not self.replays.can_go_on(inputs.get("position_ids")):
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
        # By whether they are sparse
        self.steps: dict[bool, _Replay] = {}

    def can_go_on(self, positions: Tensor | None) -> bool:
        """Whether the next token can be a compiled step: there is room, and what it selects is at hand.

        ``positions``, int64 [B or 1, 1], must be those of the cache.
        """
        cache = self.cache
        if not self.is_possible or cache.get_seq_length() >= cache.max_len:
            return False
        cache.fit_where_due()
        if cache.seq_lens == self.held:
            return True
        # Nothing has run yet, or something else has. A step counts positions on by itself, as ``generate`` does
        lens = torch.tensor(cache.seq_lens)
        if positions is not None and not bool((positions[:, 0].cpu() == lens).all()):
            return False
        if not cache.prepare():
            return False
        cache.join()
        self.start.copy_(lens)
        return True

    def next(self, token: Tensor) -> Tensor:
        """Logits [B, V] of the tokens after ``token`` int64 [B, 1]."""
        cache = self.cache
        self.token.copy_(token)
        sparse = max(cache.seq_lens) + 1 > cache.cfg.dense_up_to_tokens
        if sparse not in self.steps:
            self.steps[sparse] = self._build(sparse)
        step = self.steps[sparse]
        step.run()
        cache.advance(1)
        self.held = cache.seq_lens
        if cache.auditor is not None:
            cache.auditor.count_step()
        if step.queries:
            cache.audit(step.queries)
        return step.logits

    def _build(self, sparse: bool) -> _Replay:
        compiled = DecodeStep.of(self.model, self.cache, sparse, self.options)
        step = _Replay(compiled.queries)

        def run() -> None:
            step.logits = compiled(self.token, self.start, is_shown(None))
            self.start += 1

        step.run = run
        if self.token.is_cuda:
            state = [self.token, self.start, *self.cache.counters]
            step.run = captured(run, state, rejoin=self.cache.rejoin)
        return step


class _Replay:
    """A step that can be run again and again.

    Attributes:
        queries: what it leaves for an audit.
        logits: [B, V], what the last run gave; a graph's are at one place.
    """

    run: Callable[[], None]
    logits: Tensor

    def __init__(self, queries: list[Tensor]) -> None:
        self.queries = queries


def _is_step(inputs: Mapping[str, Any]) -> bool:
    token = inputs.get("input_ids")
    more = {name for name, value in inputs.items() if value is not None and value is not False} - ARGUMENTS
    return isinstance(token, Tensor) and token.shape[1] == 1 and not more
