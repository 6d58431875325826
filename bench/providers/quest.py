"""Quest (arXiv 2406.10774): blocks alone, by an upper bound on their scores.

A block is known by the minimum and maximum of each channel of its keys, in the keys' dtype, made before the timing.
Its score is ``sum_d max(q_d low_d, q_d high_d)``; the heads of a group agree by their maximum (the paper has one KV
head for each query head). The newest block is always kept, as in the authors' code. Blocks of ``block_size`` tokens
rather than the authors' 16: a quarter of the bytes at 64. Attention sees every token of the kept blocks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import InputSet
from .attend import attention_over
from .registry import Call, Job, Make, provider, tokens_of


def _quest(budget: str) -> Make:
    """Blocks worth the case's ``budget``, of as many tokens as that."""

    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        from ..kernels.score_boxes import launch_score_boxes

        budget_tokens: int = getattr(case, budget)
        kept = budget_tokens // case.block_size
        device = sets[0].q.device
        arrivals = torch.zeros(case.rows, dtype=torch.int32, device=device)
        attend = attention_over(case, device, kept * case.block_size, by_block=True)

        def call(i: InputSet, low: Tensor, high: Tensor) -> Tensor:
            ids, counts = launch_score_boxes(i.q, low, high, arrivals, kept=kept, block_size=case.block_size)
            return attend(i, ids, counts)

        calls: list[Call] = []
        masks: list[Tensor | None] = []
        for i in sets:
            blocks = i.k.view(case.B, case.HKV, case.n_blocks, case.block_size, case.D)
            low, high = blocks.amin(3), blocks.amax(3)
            ids, _ = launch_score_boxes(i.q, low, high, arrivals, kept=kept, block_size=case.block_size)
            masks.append(tokens_of(case, ids.view(case.B, case.HKV, kept)))
            calls.append(partial(call, i, low, high))
        return Job(calls, masks, low.nbytes + high.nbytes + case.kv_bytes(kept * case.block_size))

    return make


# As many tokens attended as our level 1 keeps: Quest in its own right
provider("quest_block_budget", "total", needs="triton")(_quest("block_budget"))
# As many tokens attended as our level 2 keeps: equal work for the attention
provider("quest_token_budget", "total", needs="triton")(_quest("token_budget"))
