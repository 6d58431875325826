"""Ours: ``two_level_attention`` as a user calls it, scores, both selections and attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

import flex_tls as tls
from flex_tls.attention import Backend, attend

from ..cases import Case
from ..inputs import InputSet, build_index
from .registry import Call, Job, Make, provider


def _total(backend: Backend, **options: Any) -> Make:
    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        cfg = case.config(**options)
        calls: list[Call] = []
        masks: list[Tensor | None] = []
        for i in sets:
            index = build_index(i.k, cfg) if "label_bits" in options else i.index
            tokens = attend(i.q, i.k, i.v, index, cfg, backend=backend).tokens
            assert tokens is not None
            masks.append(tokens.mask[:, :, 0])
            calls.append(partial(tls.two_level_attention, i.q, i.k, i.v, index, cfg, backend=backend))
        n_channels = cfg.label_channels
        share = len(cfg.label_words(cfg.filter_dims or n_channels)) / len(cfg.label_words(n_channels))
        index_bytes = share * index.bytes_per_token * case.rows * case.S
        return Job(calls, masks, index_bytes + case.kv_bytes(cfg.token_budget or cfg.block_budget))

    return make


provider("flex_total", "total")(_total("flex"))
provider("triton_total", "total", needs="triton")(_total("triton"))
# Half of each label at level 1: half of its bytes
provider("triton_filter16", "total", needs="triton")(_total("triton", filter_dims=16))
# 24 channels in half of the bytes; and 56 in all of them, of which level 1 reads those 24
provider("triton_mixed", "total", needs="triton")(_total("triton", label_bits=(4, 2)))
provider("triton_mixed_filter24", "total", needs="triton")(_total("triton", label_bits=(4, 2, 2, 2), filter_dims=24))
# Level 1 alone: every token of the kept blocks
provider("triton_blocks_only", "total", needs="triton")(_total("triton", token_budget=None))
