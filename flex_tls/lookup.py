"""Speculative decoding without a second model: what followed the same tokens earlier in the text is drafted again."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .decode import Loop


def lookup_steps(loop: Loop, ids: Tensor, n: int, draft_tokens: int) -> Generator[Tensor, None, None]:
    """As ``Loop.eager_steps``, up to ``draft_tokens`` tokens drafted and checked in one forward; one row.

    Every token is drawn from the logits that plain decoding would have, and a draft that differs is dropped: the output
    is that of plain decoding, sampled or greedy, unless blocks arrive late (offload that is not ``"exact"``).
    ``ids`` int64 [1, S], the prompt.
    Source: prompt lookup decoding, transformers' ``PromptLookupCandidateGenerator``.
    """
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    drafts: Any = PromptLookupCandidateGenerator(num_output_tokens=draft_tokens, max_length=ids.shape[1] + 1 + n)
    text = torch.cat([ids, loop.token], 1)
    last = text.shape[1] + n
    while text.shape[1] < last:
        # The generator drafts past its max_length; a step gives one token more than it is given drafts
        draft: Tensor = drafts.get_candidates(text)[0][:, text.shape[1] : last - 1]
        held = loop.cache.seq_lens[0]
        position = torch.arange(held, held + 1 + draft.shape[1], device=ids.device)[None]
        logits = loop.model(
            torch.cat([loop.token, draft], 1), position_ids=position, past_key_values=loop.cache, use_cache=True
        ).logits  # fmt: skip
        checked = draft[0].tolist()
        for t in range(len(checked) + 1):
            loop.next(logits[:, t])
            text = torch.cat([text, loop.token], 1)
            report = loop.report.to("cpu", copy=True)
            yield report
            if t < len(checked) and int(report[0]) != checked[t]:
                break
        loop.cache.crop(t - len(checked))
