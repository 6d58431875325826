"""Double Sparsity (arXiv 2408.07092): tokens alone, the best of the whole cache by a few channels of their keys.

A token's label is its key in the D / 8 heaviest channels of its KV head, 4 bits each, affine per channel; the paper
takes D / 16 to D / 8 channels and 4 bits. The heaviest channels are those of the largest mean of |q_d k_d|, here of the
case's own keys and queries and made before the timing; the paper calibrates them offline. The heads of a group agree
by the maximum of their scores (the paper has one KV head for each query head). Scores use queries in 8 bits and integer
dot products, as ours do. No token is kept for its place.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import InputSet
from .attend import attention_over
from .registry import Call, Job, provider

BITS = 4
PER_WORD = 32 // BITS


class Labels(NamedTuple):
    """codes int32 [B, HKV, W, S], lowest bits first; to_query one-hot [B, HKV, D, C], low and step [B, HKV, C]."""

    codes: Tensor
    to_query: Tensor
    low: Tensor
    step: Tensor


def make_labels(q: Tensor, k: Tensor) -> Labels:
    """Labels of keys k [B, HKV, S, D] in the channels that are heaviest with queries q [B, HQ, 1, D].

    Row by row, to spare memory: labels are made of several copies.
    """
    rows = [_make_labels(q[row : row + 1], k[row : row + 1]) for row in range(k.shape[0])]
    return Labels(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def _make_labels(q: Tensor, k: Tensor) -> Labels:
    b, hkv, s, d = k.shape
    channels = max(PER_WORD, d // 8)
    asked = q.view(b, hkv, -1, d).float().abs().mean(2)
    heaviest = (asked * k.abs().mean(2, dtype=torch.float32)).topk(channels).indices.sort().values
    labels = k.gather(3, heaviest[:, :, None].expand(-1, -1, s, -1)).float()
    low, high = labels.amin(2), labels.amax(2)
    step = ((high - low) / (2**BITS - 1)).clamp_min(torch.finfo(torch.float32).tiny * 2**24)
    codes = ((labels - low[:, :, None]) / step[:, :, None]).round().to(torch.int32)
    shift = torch.arange(0, 32, BITS, dtype=torch.int32, device=k.device)
    words = (codes.view(b, hkv, s, -1, PER_WORD) << shift).sum(-1, dtype=torch.int32)
    to_query = torch.zeros(b, hkv, d, channels, device=k.device).scatter_(2, heaviest[:, :, None], 1.0)
    return Labels(words.transpose(2, 3).contiguous(), to_query, low, step)


@provider("double_sparsity", "total", needs="triton")
def double_sparsity(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """``token_budget`` tokens attended, as many as our level 2 keeps."""
    from ..kernels.ask import launch_ask
    from ..kernels.rank_labels import launch_rank_labels

    device = sets[0].q.device
    arrivals = torch.zeros(case.rows, dtype=torch.int32, device=device)
    attend = attention_over(case, device, case.token_budget, by_block=False)

    def select(i: InputSet, labels: Labels) -> tuple[Tensor, Tensor]:
        bits = (BITS,) * labels.codes.shape[2]
        asked, base, unit = launch_ask(
            i.q, i.index.seq_lens, labels.to_query, labels.low, labels.step, bits=bits, filter_dims=labels.low.shape[2]
        )
        return launch_rank_labels(
            labels.codes, i.index.seq_lens, asked, base, unit, arrivals, bits=bits, kept=case.token_budget
        )

    def call(i: InputSet, labels: Labels) -> Tensor:
        return attend(i, *select(i, labels))

    calls: list[Call] = []
    masks: list[Tensor | None] = []
    for i in sets:
        labels = make_labels(i.q, i.k)
        ids, _ = select(i, labels)
        mask = torch.zeros(case.B, case.HKV, case.S, dtype=torch.bool, device=device)
        masks.append(mask.scatter(2, ids.view(case.B, case.HKV, -1).long(), True))
        calls.append(partial(call, i, labels))
    return Job(calls, masks, labels.codes.nbytes + case.kv_bytes(case.token_budget))
