"""Attention of a chunk over its past, in pieces, is the masked attention of both together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flex_tls import TLSConfig
from flex_tls.dense import chunk_attention, dense_attention
from tests.cases import Case, assert_as_exact, make


def masked(case: Case, dtype: torch.dtype) -> torch.Tensor:
    q, k, v = (x.to(dtype) for x in (case.q, case.k, case.v))
    return dense_attention(q, k, v, case.seq_lens, scale=0.3)


def check(case: Case, lens: list[int]) -> None:
    got = chunk_attention(case.q, case.k, case.v, lens, scale=0.3)
    low, truth = masked(case, case.q.dtype), masked(case, torch.float64)
    for row, n in enumerate(lens):
        pad = max(case.q.shape[2] - n, 0)
        assert not got[row, :, :pad].any()
        if n:
            assert_as_exact(*(x[row, :, pad:] for x in (got, low, truth)))


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=3) | st.integers(1, 90).map(lambda n: [n, n]),
    st.sampled_from((1, 2, 17, 33, 63, 64, 65)), st.sampled_from((1, 3, 4)), st.sampled_from((8, 16, 24)),
    st.integers(0, 2**16),
)  # fmt: skip
@example([64, 64], 64, 3, 16, 0)
@example([65, 65], 64, 3, 16, 0)
@example([0, 90], 33, 1, 8, 0)
def test_pieces_are_the_masked_whole(lens: list[int], t: int, group: int, d: int, seed: int) -> None:
    case = make(TLSConfig(), lens=lens, s=91, t=t, group=group, d=d, seed=seed)
    case.k[:, :, max(lens) :] = torch.nan
    case.v[:, :, max(lens) :] = torch.nan
    got = chunk_attention(case.q, case.k, case.v, lens, scale=0.3)
    assert got.isfinite().all()
    case.k.nan_to_num_()
    case.v.nan_to_num_()
    check(case, lens)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lens", [[700, 700], [700, 300, 20]])
def test_pieces_are_the_masked_whole_by_every_kernel(kernel: SDPBackend, dtype: torch.dtype, lens: list[int]) -> None:
    case = make(TLSConfig(), lens=lens, s=701, t=257, group=4, d=64, dtype=dtype, device="cuda")
    with sdpa_kernel([kernel, SDPBackend.MATH]):
        check(case, lens)
