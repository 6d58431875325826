"""The backends against one another, by the float64 measuring stick; and what every backend must hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls import attention, compiled, fused
from flex_tls.attention import attend, resolve_backend
from flex_tls.mods import exact_scores, query_positions
from flex_tls.reference import attention_reference
from tests.cases import KINDS, Case, assert_as_exact, cases, make

CFG = tls.TLSConfig(block_size=32, block_budget=256, token_budget=100, sink_tokens=16, recent_tokens=40)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def dense(case: Case, scale: float) -> Tensor:
    """sdpa over whole rows, float64, causal inside the chunk."""
    t, s = case.q.shape[2], case.k.shape[2]
    position = case.seq_lens[:, None] - t + torch.arange(t, device=case.q.device)
    mask = torch.arange(s, device=case.q.device) <= position[:, :, None]
    return F.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), attn_mask=mask[:, None], scale=scale, enable_gqa=True
    )


@given(cases(), st.sampled_from((None, 0.3)))
def test_budgets_that_cover_the_context_equal_sdpa(case: Case, scale: float | None) -> None:
    cfg = tls.TLSConfig(**{**case.cfg.__dict__, "block_budget": 512, "token_budget": None})
    index = tls.KVIndex.build(case.k, cfg, case.seq_lens, case.q)
    out = tls.two_level_attention(case.q, case.k, case.v, index, cfg, scale=scale, backend="reference")
    truth = dense(case, 1 / math.sqrt(case.q.shape[-1]) if scale is None else scale)
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)


@given(cases(), st.integers(0, 2**16))
def test_permuting_the_batch_permutes_the_result(case: Case, seed: int) -> None:
    order = torch.randperm(len(case.seq_lens), generator=torch.Generator().manual_seed(seed))
    index = case.index()
    out = tls.two_level_attention(case.q, case.k, case.v, index, case.cfg, backend="reference")
    index.reorder(order)
    moved = tls.two_level_attention(case.q[order], case.k[order], case.v[order], index, case.cfg, backend="reference")
    torch.testing.assert_close(moved, out[order], rtol=1e-5, atol=1e-6)


@given(cases())
def test_slots_past_a_row_are_never_read(case: Case) -> None:
    index = case.index()
    out, lse = tls.two_level_attention(case.q, case.k, case.v, index, case.cfg, backend="reference", return_lse=True)
    past = torch.arange(case.k.shape[2]) >= case.seq_lens[:, None]
    k, v = (x.masked_fill(past[:, None, :, None], torch.nan) for x in (case.k, case.v))
    poisoned, poisoned_lse = tls.two_level_attention(q=case.q, k=k, v=v, index=index, cfg=case.cfg,
                                                     backend="reference", return_lse=True)  # fmt: skip
    assert torch.equal(out, poisoned)
    assert torch.equal(lse, poisoned_lse)


@given(cases())
def test_the_lse_merges_two_halves(case: Case) -> None:
    """Attention over a selection equals the merge of attention over any split of it."""
    index = case.index()
    whole = attend(case.q, case.k, case.v, index, case.cfg, backend="reference", return_lse=True)
    half = torch.arange(whole.tokens.mask.shape[-1]) % 3 == 0
    parts = []
    for side in (half, ~half):
        tokens = tls.TokenSelection.from_mask(whole.tokens.mask & side, whole.tokens.positions, whole.tokens.group)
        parts.append(attention_reference(case.q, case.k, case.v, tokens, scale=case.q.shape[-1] ** -0.5))
    assert whole.lse is not None
    merged = sum(out * (lse - whole.lse).exp()[..., None] for out, lse in parts)
    torch.testing.assert_close(merged, whole.out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("group", "d", "t", "lens", "s", "kind"),
    [
        (1, 64, 1, [65], 130, "lowrank"),
        (3, 64, 1, [1, 1000, 63], 1000, "lowrank"),
        (4, 128, 3, [64, 515], 515, "quest"),
        (5, 80, 1, [300], 320, "box"),
        (7, 16, 2, [200, 2], 256, "mean"),
        (8, 256, 1, [257], 288, "oracle"),
    ],
)
def test_compiled_flex_equals_the_reference(
    device: str, group: int, d: int, t: int, lens: list[int], s: int, kind: str
) -> None:
    cfg = tls.TLSConfig(**{**CFG.__dict__, "index": kind})
    case = make(cfg, lens=lens, s=s, group=group, t=t, d=d, device=device)
    index = case.index()
    got = attend(case.q, case.k, case.v, index, cfg, backend="flex", return_lse=True)
    oracle = attend(case.q, case.k, case.v, index, cfg, backend="reference")
    assert torch.equal(got.blocks.indices, oracle.blocks.indices)
    assert torch.equal(got.tokens.mask, oracle.tokens.mask)
    scale = d**-0.5
    truth, lse = attention_reference(case.q.double(), case.k.double(), case.v.double(), got.tokens, scale=scale)
    assert_as_exact(got.out, attention_reference(case.q, case.k, case.v, got.tokens, scale=scale)[0], truth)
    assert got.lse is not None
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_flex_in_bfloat16_is_as_exact_as_plain_pytorch(device: str) -> None:
    case = make(CFG, lens=[700], s=704, group=4, d=64, dtype=torch.bfloat16, device=device)
    index = case.index()
    got = attend(case.q, case.k, case.v, index, CFG, backend="flex")
    wide = attention_reference(case.q.double(), case.k.double(), case.v.double(), got.tokens, scale=0.125)[0]
    low = F.scaled_dot_product_attention(
        case.q, case.k, case.v, attn_mask=got.tokens.mask[..., :704].repeat_interleave(4, 1), enable_gqa=True
    )
    assert_as_exact(got.out, low, wide)


def test_lengths_do_not_recompile() -> None:
    case = make(CFG, lens=[3], s=400, group=2, t=1, d=16)
    index = tls.KVIndex.build(case.k[:, :, :3], CFG, q=case.q, capacity_tokens=400)
    tls.two_level_attention(case.q, case.k, case.v, index, CFG)
    torch._dynamo.utils.counters.clear()
    for token in range(3, 40):
        index.append(case.k[:, :, token : token + 1])
        tls.two_level_attention(case.q, case.k, case.v, index, CFG)
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")


def test_the_op_traces_into_a_users_own_compiled_step() -> None:
    case = make(CFG, lens=[300], s=320, group=2, d=16)
    index = case.index()

    @torch.compile(fullgraph=True, dynamic=False)
    def step(q: Tensor) -> Tensor:
        return tls.two_level_attention(q * 2, case.k, case.v, index, CFG) + 1

    want = tls.two_level_attention(case.q * 2, case.k, case.v, index, CFG, backend="reference") + 1
    torch.testing.assert_close(step(case.q), want, rtol=1e-5, atol=1e-5)


def test_a_new_mod_in_every_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_MODS", len({key[-2:] for key in compiled._compiled}))
    case = make(CFG, lens=[300], s=320)
    with pytest.raises(RuntimeError, match=r"score_mod, mask_mod: \d+ distinct pairs were compiled already; define"):
        tls.two_level_attention(case.q, case.k, case.v, case.index(), CFG, score_mod=lambda s, b, h, q, k: s)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_without_anything_to_see_gets_zero(kind: str) -> None:
    """A row shorter than its chunk: the chunk's first tokens do not exist."""
    cfg = tls.TLSConfig(**{**CFG.__dict__, "index": kind})
    case = make(cfg, lens=[2, 60], s=64, t=4)
    out, lse = tls.two_level_attention(case.q, case.k, case.v, case.index(), cfg, backend="reference", return_lse=True)
    assert not out[0, :, :2].any()
    assert lse[0, :, :2].isneginf().all()
    assert lse[0, :, 2:].isfinite().all()


def test_errors_name_what_was_expected() -> None:
    case = make(CFG, lens=[100], s=128)
    q, k, v, index = case.q, case.k, case.v, case.index()
    for call, error, message in (
        (lambda: tls.two_level_attention(q, k[:, :, :64], v, index, CFG), ValueError, r"k: expected 128 for S.*got 64"),
        (lambda: tls.two_level_attention(q, k.repeat(1, 3, 1, 1), v, index, CFG), ValueError, r"k: expected 2 for HKV"),
        (lambda: tls.two_level_attention(q, k, v.double(), index, CFG), TypeError, r"v: expected dtype torch.float32"),
        (lambda: tls.two_level_attention(q[..., :8], k, v, index, CFG), ValueError, r"q: expected 16 for D.*got 8"),
        (lambda: tls.two_level_attention(q.tolist(), k, v, index, CFG), TypeError, r"q: expected a tensor"),
        (lambda: tls.two_level_attention(q, k.to("meta"), v, index, CFG), ValueError, r"k: expected device cpu"),
        (lambda: tls.two_level_attention(q, k, v, index, CFG, backend="fast"), ValueError, r"backend: expected one of"),
        (
            lambda: tls.two_level_attention(q, k, v, index, CFG, score_mod=lambda s, *_: s, backend="triton"),
            tls.BackendUnavailable,
            r"backend='triton' cannot run this: it takes no score_mod; use 'flex' or 'auto'",
        ),
        (
            lambda: tls.two_level_attention(q, k.mT.contiguous().mT, v, index, CFG, backend="triton"),
            tls.BackendUnavailable,
            r"it reads keys and values along a contiguous head dimension, got strides",
        ),
    ):
        with pytest.raises(error, match=message):
            call()  # type: ignore[no-untyped-call]


def test_auto_takes_flex_with_a_score_mod_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has the fused kernels: those take masks and every kind of index."""
    taken = []

    def resolve(backend: Any, device: torch.device, obstacle: str | None) -> str:
        taken.append(resolve_backend(backend, torch.device("cuda"), obstacle))
        return "reference"

    monkeypatch.setattr(fused, "why_not_here", lambda device: None)
    monkeypatch.setattr(attention, "resolve_backend", resolve)
    case = make(CFG, lens=[60], s=64)
    mods: tuple[dict[str, Any], ...] = ({}, {"mask_mod": lambda b, h, q, k: k >= 0}, {"score_mod": lambda s, *_: s})
    for chosen in mods:
        attend(case.q, case.k, case.v, case.index(), CFG, **chosen)
    assert taken == ["triton", "triton", "flex"]
    for kind in ("box", "quest", "mean", "oracle"):
        other = make(dataclasses.replace(CFG, index=kind), lens=[60], s=64)
        attend(other.q, other.k, other.v, other.index(), other.cfg)
    assert taken[3:] == ["triton"] * 4


@given(case=cases(), piece=st.integers(1, 300))
def test_exact_scores_are_the_products_of_queries_and_keys(case: Case, piece: int) -> None:
    t, s, d = case.q.shape[2], case.k.shape[2], case.q.shape[3]
    positions = query_positions(case.seq_lens, t)
    with mock.patch("flex_tls.mods.PIECE_TOKENS", piece):
        got = exact_scores(case.q, case.k, positions, scale=0.3)
    q = case.q.double().view(case.q.shape[0], case.k.shape[1], -1, t, d)
    want = 0.3 * torch.einsum("bhgtd,bhsd->bhgts", q, case.k.double())
    seen = torch.arange(s) <= positions[:, :, None]
    want = want.masked_fill(~seen[:, None, None], -torch.inf)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
