"""Ours: ``two_level_attention`` as a user calls it, scores, both selections and attention; and parts of it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import Backend, attend
from flex_tls.fused import labels_of, launch, options_of
from flex_tls.fused_pool import choose_blocks
from flex_tls.mods import MaskMod

from ..cases import Case
from ..inputs import InputSet, build_index
from .attend import attention_over
from .registry import Call, Job, Make, Needs, provider

if TYPE_CHECKING:
    from flex_tls.kernels.two_level import Work


def _total(backend: Backend, mask_mod: MaskMod | None = None, **options: Any) -> Make:
    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        cfg = case.config(**options)
        call: dict[str, Any] = {"mask_mod": mask_mod, "backend": backend}
        calls: list[Call] = []
        masks: list[Tensor | None] = []
        for i in sets:
            index = build_index(i.k, cfg) if options.keys() & {"index", "label_bits"} else i.index
            tokens = attend(i.q, i.k, i.v, index, cfg, **call).tokens
            assert tokens is not None
            masks.append(tokens.mask[:, :, 0])
            calls.append(partial(tls.two_level_attention, i.q, i.k, i.v, index, cfg, **call))
        n_channels = cfg.label_channels
        share = len(cfg.label_words(cfg.filter_dims or n_channels)) / len(cfg.label_words(n_channels))
        index_bytes = share * index.bytes_per_token * case.rows * case.S
        return Job(calls, masks, index_bytes + case.kv_bytes(cfg.token_budget or cfg.block_budget))

    return make


def two_windows(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A mask as users write them: a prefix of 4,096 tokens, and the newest half of the context."""
    return (kv_idx < 4096) | (2 * kv_idx > q_idx)


provider("flex_total", "total")(_total("flex"))
provider("triton_total", "total", needs="triton")(_total("triton"))
# Half of each label at level 1: half of its bytes
provider("triton_filter16", "total", needs="triton")(_total("triton", filter_dims=16))
# 48 channels in the bytes of 32
provider("triton_wide", "total", needs="triton")(_total("triton", label_bits=(4, 4, 2, 2)))
# 24 channels in half of the bytes; and 56 in all of them, of which level 1 reads those 24
provider("triton_mixed", "total", needs="triton")(_total("triton", label_bits=(4, 2)))
provider("triton_mixed_filter24", "total", needs="triton")(_total("triton", label_bits=(4, 2, 2, 2), filter_dims=24))
# The heads of a group agree by the largest softmax instead of the mean
provider("triton_softmax_max", "total", needs="triton")(_total("triton", group_reduce="softmax_max"))
# Level 1 alone: every token of the kept blocks
provider("triton_blocks_only", "total", needs="triton")(_total("triton", token_budget=None))
# What level 1 may score by instead of labels, which level 2 then reads alone or for its softmax; and a mask
_sides: tuple[tuple[Backend, Needs], ...] = (("flex", "torch"), ("triton", "triton"))
for _backend, _needs in _sides:
    for _kind in ("box", "mean"):
        provider(f"{_backend}_{_kind}", "total", needs=_needs)(_total(_backend, index=_kind))
    provider(f"{_backend}_masked", "total", needs=_needs)(_total(_backend, two_windows))


@provider("triton_given_blocks", "level 2 and attention", needs="triton")
def triton_given_blocks(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """The same kernel from level 2 on, inside the blocks that level 1 chose before: the rest is level 1's."""
    from flex_tls.kernels.two_level import Work

    cfg, scale = case.config(), 1 / math.sqrt(case.D)
    calls: list[Call] = []
    masks: list[Tensor | None] = []

    def call(i: InputSet, given: Work) -> tuple[Tensor, Work]:
        out, _, work = launch(
            i.q, i.k, i.v, i.index.seq_lens, *labels_of(i.index), token_budget=cfg.token_budget, given=given,
            **options_of(i.index, cfg, scale),
        )  # fmt: skip
        return out, work

    for i in sets:
        given = Work.given(*choose_blocks(i.q, i.index, cfg, scale, i.index.seq_lens))
        ids = call(i, given)[1].ids.view(case.B, case.HKV, -1).long()
        masks.append(torch.zeros(case.B, case.HKV, case.S, dtype=torch.bool, device=i.q.device).scatter(2, ids, True))
        calls.append(lambda i=i, given=given: call(i, given)[0])
    labels = i.index.bytes_per_token * case.rows * case.block_budget
    return Job(calls, masks, labels + case.kv_bytes(case.token_budget))


@provider("triton_given_tokens", "attention", needs="triton")
def triton_given_tokens(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Our attention kernel over given random tokens: with tiles and programs of its own."""
    attend = attention_over(case, sets[0].q.device, case.token_budget, by_block=False)
    calls: list[Call] = []
    for i in sets:
        ids = i.tokens.indices(case.token_budget).reshape(case.rows, -1).contiguous()
        calls.append(partial(attend, i, ids, torch.full_like(ids[:, 0], case.token_budget)))
    return Job(calls, [i.tokens.mask[:, :, 0] for i in sets], case.kv_bytes(case.token_budget))
