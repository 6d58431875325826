"""What a compiled step runs on one layer's cache, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flex_tls as tls
from flex_tls.static import append_tokens, attend_all
from tests.cases import make as make_case
from tests.integrations.models import SPARSE


@given(st.integers(1, 5), st.lists(st.integers(1, 150), min_size=1, max_size=3), st.integers(1, 3))
def test_attend_all_is_dense_attention(group: int, lens: list[int], t: int) -> None:
    case = make_case(SPARSE, lens=[max(n, t) for n in lens], s=160, group=group, t=t)
    b, hkv = len(lens), 2
    out = attend_all(case.q, case.k, case.v, case.seq_lens, torch.zeros(b * hkv * t, dtype=torch.int32), 0.25)
    k, v = (x.repeat_interleave(group, 1).double() for x in (case.k, case.v))
    position = case.seq_lens[:, None] - t + torch.arange(t)
    mask = (torch.arange(160) <= position[..., None])[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(case.q.double(), k, v, attn_mask=mask, scale=0.25)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_attend_all_fits_every_head(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case(SPARSE, lens=[900, 65], s=960, group=4, d=head_dim, dtype=dtype, device="cuda")
    arrivals = torch.zeros(4, dtype=torch.int32, device="cuda")
    out = attend_all(case.q, case.k, case.v, case.seq_lens, arrivals, head_dim**-0.5)
    k, v = (x.repeat_interleave(4, 1).double() for x in (case.k, case.v))
    mask = (torch.arange(960, device="cuda") < case.seq_lens[:, None])[:, None, None]
    want = torch.nn.functional.scaled_dot_product_attention(case.q.double(), k, v, attn_mask=mask)
    assert float((out.double() - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert not arrivals.any()


@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), min_size=1, max_size=3), st.integers(1, 3),
       st.sampled_from((2, 4, 8, (4, 2), (8, 2, 4))), st.sampled_from((1, 7, 8, 16)))  # fmt: skip
def test_append_tokens_is_append(seed: int, start: list[int], t: int, bits: int | tuple[int, ...], dims: int) -> None:
    cfg = tls.TLSConfig(block_size=16, block_budget=48, token_budget=32, sink_tokens=4, recent_tokens=8,
                        label_dims=dims, label_bits=bits)  # fmt: skip
    case = make_case(cfg, lens=[64] * len(start), s=64, seed=seed)
    index = tls.KVIndex.build(case.k, cfg, capacity_tokens=64)
    labels = index.labels
    new = make_case(cfg, lens=[t] * len(start), s=t, seed=seed + 1)
    keys, values, codes = case.k.clone(), case.v.clone(), labels.codes.clone()
    append_tokens(new.k, new.v, torch.tensor(start), keys, values, codes, labels.to_code, labels.offset, labels.words)
    slot = torch.tensor(start)[:, None] + torch.arange(t)
    want_keys, want_values, want_codes = case.k.clone(), case.v.clone(), labels.codes.clone()
    where = slot[:, None, :, None].expand(new.k.shape)
    want_keys.scatter_(2, where, new.k)
    want_values.scatter_(2, where, new.v)
    code = labels.encode(new.k)
    want_codes.scatter_(3, slot[:, None, None].expand(code.shape), code)
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)
    # Sums run in another order: a channel on the edge of two codes may take either
    assert (codes != want_codes).float().mean() < 0.02
