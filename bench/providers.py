"""What the operator bench compares: one function a provider, registered by name.

A provider turns a case's input sets into calls to be timed. Baselines are written as well as we can write them: dense
kernels get their best form, every FlexAttention one the folded queries and partial block lists of docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from flex_tls.masks import block_mask, fold_groups, token_score_mod
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flex_tls as tls
from flex_tls.attention import Backend, attend
from flex_tls.flex import kernel_options

from .cases import Case, InputSet, selection

Call = Callable[[], Tensor]


class Job(NamedTuple):
    """Calls to time, one for each input set; each returns out [B, HKV, G, D] or [B, HQ, 1, D], as it comes."""

    calls: list[Call]
    # Bool [B, HKV, S] per input set: the tokens that the call attends to; None: all of them
    masks: list[Tensor | None]
    # Fewest bytes that one call of the task has to read
    must_read_bytes: float


Make = Callable[[Case, list[InputSet], "int | None"], Job]


@dataclass(frozen=True)
class Provider:
    """A row of the registry."""

    name: str
    stage: str
    make: Make
    cuda_only: bool
    # Whether the number of splits over the selection can be chosen from outside
    splits: bool


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, stage: str, *, cuda_only: bool = False, splits: bool = False) -> Callable[[Make], Make]:
    """Register a provider under ``name``."""

    def register(make: Make) -> Make:
        PROVIDERS[name] = Provider(name, stage, make, cuda_only, splits)
        return make

    return register


def _sdpa(backend: SDPBackend, folded: bool) -> Make:
    """Dense attention by one of torch's kernels, with the query group folded into rows or left to ``enable_gqa``."""

    def call(inputs: InputSet) -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        with sdpa_kernel(backend):
            if folded:
                return scaled_dot_product_attention(fold_groups(q, k.shape[1]), k, v)
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        return Job([partial(call, i) for i in sets], [None] * len(sets), case.kv_bytes(case.S))

    return make


provider("sdpa_cudnn", "attention", cuda_only=True)(_sdpa(SDPBackend.CUDNN_ATTENTION, folded=True))
provider("sdpa_cudnn_gqa", "attention", cuda_only=True)(_sdpa(SDPBackend.CUDNN_ATTENTION, folded=False))
provider("sdpa_flash", "attention")(_sdpa(SDPBackend.FLASH_ATTENTION, folded=True))
provider("sdpa_flash_gqa", "attention", cuda_only=True)(_sdpa(SDPBackend.FLASH_ATTENTION, folded=False))


@provider("flex_dense", "attention", splits=True)
def flex_dense(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Every block of the cache, listed as partial: FlexAttention's best dense decode."""
    every = torch.arange(case.n_blocks, device=sets[0].q.device).expand(case.B, case.HKV, -1)
    mask = block_mask(selection(case, every))
    return Job(_flex(case, sets, [mask] * len(sets), split_kv), [None] * len(sets), case.kv_bytes(case.S))


@provider("sliding_window", "attention", splits=True)
def sliding_window(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Sinks and the newest tokens, as many blocks as the block budget pays for (StreamingLLM, arXiv 2309.17453)."""
    n, kept = case.n_blocks, case.kept_blocks
    number = torch.arange(n, device=sets[0].q.device)
    window = torch.cat([number[:1], number[n - kept + 1 :]]).expand(case.B, case.HKV, -1)
    blocks = selection(case, window)
    calls = _flex(case, sets, [block_mask(blocks)] * len(sets), split_kv)
    return Job(calls, [_tokens_of(blocks)] * len(sets), case.kv_bytes(kept * case.block_size))


@provider("flex_given_selection", "attention", splits=True)
def flex_given_selection(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Attention alone, over every token of the given blocks."""
    calls = _flex(case, sets, [block_mask(i.blocks) for i in sets], split_kv)
    return Job(calls, [_tokens_of(i.blocks) for i in sets], case.kv_bytes(case.kept_blocks * case.block_size))


@provider("flex_given_tokens", "attention", splits=True)
def flex_given_tokens(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Attention alone, over the given tokens of the given blocks: the second level as a ``score_mod`` gather."""
    calls = _flex(case, sets, [block_mask(i.blocks) for i in sets], split_kv, use_tokens=True)
    return Job(calls, [i.tokens.mask[:, :, 0] for i in sets], case.kv_bytes(case.token_budget))


def _total(backend: Backend, **options: Any) -> Make:
    """``two_level_attention`` as a user calls it: scores, both selections, attention."""

    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        budgets = {"block_size": case.block_size, "block_budget": case.block_budget, "token_budget": case.token_budget}
        cfg = tls.TLSConfig(**{**budgets, **options})
        calls: list[Call] = []
        masks: list[Tensor | None] = []
        for i in sets:
            index = tls.KVIndex.build(i.k, cfg)
            tokens = attend(i.q, i.k, i.v, index, cfg, backend=backend).tokens
            assert tokens is not None
            masks.append(tokens.mask[:, :, 0])
            calls.append(partial(tls.two_level_attention, i.q, i.k, i.v, index, cfg, backend=backend))
        share = 1.0 if cfg.filter_dims is None else cfg.filter_dims / cfg.label_dims
        index_bytes = share * index.bytes_per_token * case.B * case.HKV * case.S
        return Job(calls, masks, index_bytes + case.kv_bytes(cfg.token_budget or cfg.block_budget))

    return make


provider("flex_total", "total")(_total("flex"))
provider("triton_total", "total", cuda_only=True)(_total("triton"))
# Half of each label at level 1: half of its bytes
provider("triton_filter16", "total", cuda_only=True)(_total("triton", filter_dims=16))
# Level 1 alone: every token of the kept blocks
provider("triton_blocks_only", "total", cuda_only=True)(_total("triton", token_budget=None))


def _flex(
    case: Case, sets: list[InputSet], masks: list[BlockMask], split_kv: int | None, use_tokens: bool = False
) -> list[Call]:
    """Compiled FlexAttention over ``masks``, with the sets' token selections as ``score_mod`` where asked for."""
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


def _tokens_of(blocks: tls.BlockSelection) -> Tensor:
    """Bool [B, HKV, S]: every token of the blocks."""
    return blocks.kept()[:, :, 0].repeat_interleave(blocks.block_size, -1)
