"""Attention over the whole cache."""

from __future__ import annotations

from functools import partial

import torch
from flex_tls.masks import block_mask, fold_groups
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..cases import Case
from ..inputs import InputSet, selection
from .attend import attention_over_all
from .flex import flex_calls
from .registry import Job, Make, provider


def _sdpa(backend: SDPBackend, folded: bool) -> Make:
    """One of torch's kernels, with the query group folded into rows or left to ``enable_gqa``."""

    def call(inputs: InputSet) -> Tensor:
        q, k, v = inputs.q, inputs.k, inputs.v
        with sdpa_kernel(backend):
            if folded:
                return scaled_dot_product_attention(fold_groups(q, k.shape[1]), k, v)
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def make(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
        return Job([partial(call, i) for i in sets], [None] * len(sets), case.kv_bytes(case.S))

    return make


# One H100, torch 2.11, B=1, 96k tokens: cuDNN 1085 us folded, 137 as it comes; flash 146 either way
provider("sdpa_cudnn", "attention", needs="cuda")(_sdpa(SDPBackend.CUDNN_ATTENTION, folded=True))
provider("sdpa_cudnn_gqa", "attention", needs="cuda")(_sdpa(SDPBackend.CUDNN_ATTENTION, folded=False))
provider("sdpa_flash", "attention")(_sdpa(SDPBackend.FLASH_ATTENTION, folded=True))
provider("sdpa_flash_gqa", "attention", needs="cuda")(_sdpa(SDPBackend.FLASH_ATTENTION, folded=False))


@provider("flex_dense", "attention", splits=True)
def flex_dense(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Every block of the cache, listed as partial: FlexAttention's best dense decode."""
    every = torch.arange(case.n_blocks, device=sets[0].q.device).expand(case.B, case.HKV, -1)
    mask = block_mask(selection(case, every))
    return Job(flex_calls(case, sets, [mask] * len(sets), split_kv), [None] * len(sets), case.kv_bytes(case.S))


@provider("triton_dense", "attention", needs="triton")
def triton_dense(case: Case, sets: list[InputSet], split_kv: int | None) -> Job:
    """Our attention kernel without a list: the compiled loop's dense layers."""
    attend = attention_over_all(case, sets[0].q.device)
    return Job([partial(attend, i) for i in sets], [None] * len(sets), case.kv_bytes(case.S))
