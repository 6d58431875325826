"""Selections as masks: eager flex_attention, which ignores block lists, must agree; user mods see logical positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flex_tls.masks import block_mask, fold_groups, token_score_mod, unfold_groups
from hypothesis import given
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import flex_tls as tls
from flex_tls.attention import attend
from flex_tls.reference import attention_reference
from flex_tls.selection import select
from tests.cases import Case, assert_as_exact, cases, make

HEADS, SLOTS = 24, 600


def alibi_on(device: str) -> Callable[..., Tensor]:
    slopes = torch.linspace(0.01, 0.3, HEADS, device=device)

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx)

    return alibi


def same_document_on(device: str) -> Callable[..., Tensor]:
    document = torch.arange(SLOTS, device=device) // 70

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return document[q_idx] == document[kv_idx]

    return same_document


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def sliding_window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx < 90


MODS = ("alibi", "soft cap", "sliding window", "documents", "alibi in a window")


def mods_on(name: str, device: str = "cpu") -> tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]:
    """(score_mod, mask_mod); what a mod captures lies where the scores do."""
    return {
        "alibi": (alibi_on(device), None),
        "soft cap": (soft_cap, None),
        "sliding window": (None, sliding_window),
        "documents": (None, same_document_on(device)),
        "alibi in a window": (alibi_on(device), sliding_window),
    }[name]


def by_loops(case: Case, tokens: tls.TokenSelection, mods: str) -> Tensor:
    """Oracle with plain loops, scalar mods and softmax, float64."""
    score_mod, mask_mod = mods_on(mods)
    b, hq, t, d = case.q.shape
    group = hq // case.k.shape[1]
    out = torch.zeros(b, hq, t, d, dtype=torch.float64)
    for row in range(b):
        for head in range(hq):
            for query in range(t):
                position = int(case.seq_lens[row]) - t + query
                scores, values = [], []
                for slot in range(position + 1):
                    if not tokens.mask[row, head // group, query, slot]:
                        continue
                    at = tuple(torch.tensor(i) for i in (row, head, position, slot))
                    score = case.q[row, head, query].double() @ case.k[row, head // group, slot].double() * d**-0.5
                    if mask_mod is not None and not mask_mod(*at):
                        continue
                    scores.append(score if score_mod is None else score_mod(score, *at))
                    values.append(case.v[row, head // group, slot].double())
                if scores:
                    out[row, head, query] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@given(cases())
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_eager_flex_attention_with_our_masks_equals_the_reference(case: Case) -> None:
    index, hkv = case.index(), case.k.shape[1]
    blocks, tokens = select(case.q, index, case.cfg, None, None, None)
    out = flex_attention(
        fold_groups(case.q, hkv), case.k, case.v, score_mod=token_score_mod(tokens), block_mask=block_mask(blocks)
    )
    assert isinstance(out, Tensor)
    want = attention_reference(case.q, case.k, case.v, tokens, scale=case.q.shape[-1] ** -0.5)[0]
    torch.testing.assert_close(unfold_groups(out, blocks.group), want, rtol=1e-4, atol=1e-5)


@given(cases())
def test_the_block_mask_lists_exactly_the_selection(case: Case) -> None:
    index = case.index()
    blocks = tls.select_blocks(case.q, index, case.cfg)
    mask = block_mask(blocks)
    assert mask.full_kv_num_blocks is None
    for row in range(blocks.indices.shape[0]):
        for head in range(blocks.indices.shape[1]):
            wanted = {int(i) for i in blocks.indices[row, head].flatten() if i < blocks.n_blocks}
            count = int(mask.kv_num_blocks[row, head, 0])
            listed = mask.kv_indices[row, head, 0, :count].tolist()
            assert listed == sorted(wanted)


@given(cases())
def test_unfolding_undoes_folding(case: Case) -> None:
    hkv = case.k.shape[1]
    group = case.q.shape[1] // hkv
    folded = fold_groups(case.q, hkv)
    for head in range(case.q.shape[1]):
        for token in range(case.q.shape[2]):
            row = head % group * case.q.shape[2] + token
            assert torch.equal(folded[:, head // group, row], case.q[:, head, token])
    assert torch.equal(unfold_groups(folded, group), case.q)


@pytest.mark.parametrize("mods", MODS)
def test_user_mods_see_logical_heads_and_positions(mods: str) -> None:
    cfg = tls.TLSConfig(block_size=16, block_budget=80, token_budget=50, sink_tokens=8, recent_tokens=10, label_dims=8)
    case = make(cfg, lens=[130, 3, 65], s=150, hkv=2, group=3, t=2, d=8)
    score_mod, mask_mod = mods_on(mods)
    got = attend(case.q, case.k, case.v, case.index(), cfg, score_mod=score_mod, mask_mod=mask_mod, backend="reference")
    torch.testing.assert_close(got.out.double(), by_loops(case, got.tokens, mods), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("mods", ["alibi in a window", "soft cap", "documents"])
def test_user_mods_compose_with_compiled_flex(mods: str, device: str) -> None:
    cfg = tls.TLSConfig(block_size=32, block_budget=256, token_budget=100, sink_tokens=8, recent_tokens=10)
    case = make(cfg, lens=[500, 70], s=512, group=3, t=2, d=64, device=device)
    score_mod, mask_mod = mods_on(mods, device)
    index = case.index()
    got = attend(case.q, case.k, case.v, index, cfg, score_mod=score_mod, mask_mod=mask_mod, backend="flex")
    mod = {"score_mod": score_mod, "mask_mod": mask_mod, "scale": 0.125}
    low = attention_reference(case.q, case.k, case.v, got.tokens, **mod)[0]  # type: ignore[arg-type]
    truth = attention_reference(case.q.double(), case.k.double(), case.v.double(), got.tokens, **mod)[0]  # type: ignore[arg-type]
    assert_as_exact(got.out, low, truth)


def test_folding_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"q: expected HQ to be a multiple of HKV = 2, got 3"):
        fold_groups(torch.zeros(1, 3, 1, 8), 2)
    with pytest.raises(ValueError, match=r"x: expected rows \(G \* T\) to be a multiple of G = 2, got 3"):
        unfold_groups(torch.zeros(1, 1, 3, 8), 2)
