"""Attention in pieces against attention in one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flex_tls.dense import dense_attention
from flex_tls.index import KeyChunks
from flex_tls.streamed import attention_with_lse, merge, streamed_attention
from tests.cases import Case, cases, error


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=3), st.integers(1, 25),
    st.sampled_from((1, 3, 4)), st.integers(0, 2**16),
)  # fmt: skip
def test_a_chunk_over_a_past_in_pieces_is_dense_attention(
    device: str, rows: list[tuple[int, int]], piece: int, group: int, seed: int
) -> None:
    starts, counts = [x for x, _ in rows], [n for _, n in rows]
    t, s, hkv, d = max(1, *counts), 80, 2, 16
    generator = torch.Generator().manual_seed(seed)
    q, keys, values = (
        torch.randn(len(rows), h, n, d, generator=generator).to(device)
        for h, n in ((hkv * group, t), (hkv, s), (hkv, s))
    )
    new = [torch.zeros(len(rows), hkv, t, d, device=device) for _ in range(2)]
    for b, (start, n) in enumerate(rows):
        for x, source in zip(new, (keys, values), strict=True):
            x[b, :, :n] = source[b, :, start : start + n]

    def past(row: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, n, piece):
            part = slice(first, min(first + piece, n))
            yield keys[row, :, part], values[row, :, part]

    out = streamed_attention(q, *new, starts, counts, past, scale=0.3)
    for b, (start, n) in enumerate(rows):
        assert not out[b, :, n:].any()
        if n:
            seq_lens = torch.tensor([start + n], device=device)
            whole = [x[b : b + 1, :, : start + n] for x in (keys, values)]
            low, truth = (
                dense_attention(q[b : b + 1, :, :n].to(dtype), *(x.to(dtype) for x in whole), seq_lens, scale=0.3)
                for dtype in (torch.float32, torch.float64)
            )
            # Each merge rounds once more
            budget = torch.finfo(torch.float32).eps * (1 + -(-start // piece))
            assert error(out[b : b + 1, :, :n], truth) <= 2 * error(low, truth) + budget


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**16))
def test_merging_parts_in_any_order_gives_the_whole(parts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 2, 3, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(1, 2, sum(parts), 8, generator=generator, dtype=torch.float64) for _ in range(2))
    want = attention_with_lse(q, k, v, scale=1.0, causal=False)
    pieces = list(zip(k.split(parts, 2), v.split(parts, 2), strict=True))
    for order in (pieces, pieces[::-1]):
        # A part that saw nothing weighs nothing
        got = torch.zeros_like(q), torch.full((1, 2, 3), -torch.inf, dtype=torch.float64)
        for piece in order:
            got = merge(*got, *attention_with_lse(q, *piece, scale=1.0, causal=False))
        torch.testing.assert_close(got, want)


@given(cases(kinds=("lowrank",), max_t=1), st.integers(1, 70))
def test_an_index_fitted_in_pieces_is_the_index_fitted_at_once(case: Case, piece: int) -> None:
    """Scores agree within a label's own resolution: eigenvectors may turn by rounding."""
    whole, pieces = case.index(), case.index()
    keys = KeyChunks(case.k.shape[2], lambda: case.k.split(piece, 2))
    pieces.fit(keys, case.seq_lens, case.q)
    labels = [index.labels for index in (whole, pieces)]
    for x in labels:
        x.codes.zero_()
    pieces.refit(keys)
    whole.refit(case.k)
    exact = case.q.float().view(*case.k.shape[:2], -1, case.k.shape[3]) @ case.k.float().transpose(-1, -2)
    slot = torch.arange(case.k.shape[2])
    valid = (slot < case.seq_lens[:, None])[:, None, None]
    errors = []
    for x in labels:
        off = (x.scores(case.q.view(*case.k.shape[:2], -1, case.k.shape[3]))[..., : case.k.shape[2]] - exact) * valid
        # One shift a query is free
        off = (off - off.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)) * valid
        errors.append(float(off.norm()))
    assert errors[1] <= 1.2 * errors[0] + 1e-3 * float((exact * valid).norm())
    assert pieces.fitted_tokens == whole.fitted_tokens
