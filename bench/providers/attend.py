"""Our attention kernel, over everything or over lists of blocks or tokens, for the baselines written in Triton."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case
from ..inputs import InputSet


def attention_over_all(case: Case, device: torch.device) -> Callable[[InputSet], Tensor]:
    """``attend(inputs) -> out`` [B, HQ, 1, D] over every token: what our compiled loop takes for its dense layers."""
    from flex_tls.static import attend_all

    arrivals = torch.zeros(case.rows, dtype=torch.int32, device=device)

    def attend(i: InputSet) -> Tensor:
        out: Tensor = attend_all(i.q, i.k, i.v, i.index.seq_lens, arrivals, 1 / math.sqrt(case.D))
        return out

    return attend


def attention_over(
    case: Case, device: torch.device, n_tokens: int, *, by_block: bool
) -> Callable[[InputSet, Tensor, Tensor], Tensor]:
    """``attend(inputs, ids, counts) -> out`` [B, HQ, 1, D] over up to ``n_tokens`` tokens a KV head.

    ids int32 [R, K] are blocks or tokens, the first counts int32 [R] of them valid; R = B * HKV. One workspace serves
    every call: calls follow one another on a stream.
    """
    from flex_tls.kernels.attend import launch_attend
    from flex_tls.kernels.tiles import INTERPRETED, n_processors, rule

    arrivals = torch.zeros(case.rows, dtype=torch.int32, device=device)
    tiles = INTERPRETED
    if device.type == "cuda":
        # Nobody waits for anybody here: two programs a processor, whatever the rows
        processors = n_processors(device)
        programs = -(-2 * processors // case.rows)
        tiles = rule(processors, head_bytes=case.D * case.dtype.itemsize, rows=case.rows)
        tiles = tiles._replace(programs=programs, attend_tile=128 if case.D <= 128 else 64, warps=4)

    def attend(inputs: InputSet, ids: Tensor, counts: Tensor) -> Tensor:
        out, _ = launch_attend(
            inputs.q, inputs.k, inputs.v, inputs.index.seq_lens, ids, counts, arrivals,
            by_block=by_block, block_size=case.block_size, scale=1 / math.sqrt(case.D), tiles=tiles,
        )  # fmt: skip
        return out

    return attend
