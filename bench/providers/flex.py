"""Compiled FlexAttention over block lists, for several providers."""

from __future__ import annotations

from functools import partial

import torch
from flex_tls.masks import fold_groups, token_score_mod
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import flex_tls as tls
from flex_tls.flex import kernel_options

from ..cases import Case
from ..inputs import InputSet
from .registry import Call


def flex_calls(
    case: Case, sets: list[InputSet], masks: list[BlockMask], split_kv: int | None, use_tokens: bool = False
) -> list[Call]:
    """Attention over ``masks``, with the sets' token selections as ``score_mod`` where asked for."""
    options = kernel_options(sets[0].q.device, case.group, case.B * case.HKV)
    if split_kv is not None:
        options["SPLIT_KV"] = split_kv

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, tokens: tls.TokenSelection) -> Tensor:
        score_mod = token_score_mod(tokens) if use_tokens else None
        return flex_attention(q, k, v, score_mod, mask, kernel_options=dict(options))  # type: ignore[call-overload,no-any-return]

    run = torch.compile(attention, fullgraph=True, dynamic=False)
    return [
        partial(run, fold_groups(i.q, case.HKV), i.k, i.v, mask, i.tokens) for i, mask in zip(sets, masks, strict=True)
    ]
