"""Sinks and the newest tokens (StreamingLLM, arXiv 2309.17453): no selection at all."""

from __future__ import annotations

from functools import partial

import torch
from flex_tls.masks import block_mask
from torch import Tensor

from ..cases import Case
from ..inputs import InputSet, selection
from .attend import attention_over
from .flex import flex_calls
from .registry import Job, provider, tokens_of


def _window(case: Case, device: torch.device) -> Tensor:
    """Block numbers [B, HKV, K]: the first and the newest, as many as the block budget pays for."""
    number = torch.arange(case.n_blocks, device=device)
    return torch.cat([number[:1], number[case.n_blocks - case.kept_blocks + 1 :]]).expand(case.B, case.HKV, -1)


@provider("sliding_window", "attention", splits=True)
def sliding_window(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """By FlexAttention."""
    window = _window(case, sets[0].q.device)
    calls = flex_calls(case, sets, [block_mask(selection(case, window))] * len(sets), split_kv)
    return Job(calls, [tokens_of(case, window)] * len(sets), case.kv_bytes(case.block_budget))


@provider("sliding_window_triton", "attention", needs="triton")
def sliding_window_triton(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """By our attention kernel."""
    window = _window(case, sets[0].q.device)
    attend = attention_over(case, sets[0].q.device, case.block_budget, by_block=True)
    ids = window.reshape(case.rows, -1).int().contiguous()
    counts = torch.full((case.rows,), case.kept_blocks, dtype=torch.int32, device=ids.device)
    calls = [partial(attend, i, ids, counts) for i in sets]
    return Job([*calls], [tokens_of(case, window)] * len(sets), case.kv_bytes(case.block_budget))
