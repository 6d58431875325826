"""Eight bits: how near they are, and that a second time changes nothing."""

from __future__ import annotations

import pytest
import torch
from flex_tls.offload.int8 import dequantised, quantised
from hypothesis import given
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(0, 2**16), st.sampled_from(DTYPES), st.integers(-46, 37), st.sampled_from((1, 5, 128)))
def test_what_was_rounded_once_stays_as_it_is(seed: int, dtype: torch.dtype, power: int, d: int) -> None:
    """At every magnitude, down to numbers that are not normal; each value within half a scale."""
    exact = torch.randn(200, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**power
    x = exact.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    codes, scales = quantised(x)
    once = dequantised(codes, scales, dtype)
    again = quantised(once)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(dequantised(*again, dtype), once)
    assert int(codes.abs().max()) <= 127
    error = (codes.double() * scales.double()[:, None] - x.double()).abs()
    assert bool((error <= 0.50001 * scales.double()[:, None]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_extremes(dtype: torch.dtype) -> None:
    least, most = torch.finfo(dtype).tiny, min(torch.finfo(dtype).max, 127 * 2.0**100)
    x = torch.tensor([[0.0, 0.0], [most, -most], [least, -least], [1.0, -127.0]], dtype=dtype)
    assert torch.equal(dequantised(*quantised(x), dtype), x)
    # Memory that nothing was written to
    assert not dequantised(torch.zeros(3, 2, dtype=torch.int8), torch.zeros(3), dtype).any()
