from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import attend
from flex_tls.bound import missed_mass_bound

from ..cases import Case, cases, make

BOXES = ("quest", "box")
SMALL = tls.TLSConfig(block_size=16, block_budget=48, token_budget=24, sink_tokens=0, recent_tokens=1, index="quest")


def missed(case: Case, tokens: tls.TokenSelection, visible: Tensor, scale: float) -> Tensor:
    """True share of full attention's weight outside of the selection, in float64: [B, HQ, T]."""
    b, hq, t, d = case.q.shape
    hkv, s = case.k.shape[1], case.k.shape[2]
    q = case.q.double().view(b, hkv, hq // hkv, t, d)
    scores = (q @ case.k.double()[:, :, None].transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    return (p * ~tokens.mask[..., :s][:, :, None]).sum(-1).view(b, hq, t)


@given(cases(kinds=BOXES), st.sampled_from((0.01, 0.25, 5.0)), st.booleans())
@example(make(SMALL, lens=[200], s=200, d=64, seed=1), 100.0, False)
def test_the_missed_mass_never_exceeds_its_bound(case: Case, scale: float, windowed: bool) -> None:
    window = 40

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx - kv_idx < window

    index, mod = case.index(), mask_mod if windowed else None
    found = attend(
        case.q, torch.nn.functional.pad(case.k, (0, 0, 0, index.capacity_tokens - case.k.shape[2])),
        torch.nn.functional.pad(case.v, (0, 0, 0, index.capacity_tokens - case.k.shape[2])), index, case.cfg,
        mask_mod=mod, scale=scale, backend="reference", return_bound=True,
    )  # fmt: skip
    assert found.bound is not None
    assert found.tokens is not None
    place = torch.arange(case.k.shape[2])
    query = found.tokens.positions[:, None, None, :, None]
    visible = (place <= query) & ((query - place < window) | (not windowed))
    truth = missed(case, found.tokens, visible, scale)
    assert bool((truth <= found.bound.double() + 1e-6).all())
    assert bool(((found.bound >= 0) & (found.bound <= 1)).all())


@given(cases(kinds=BOXES))
def test_nothing_is_missed_where_everything_is_kept(case: Case) -> None:
    index = case.index()
    positions = case.seq_lens[:, None] - case.q.shape[2] + torch.arange(case.q.shape[2])
    everything = torch.arange(index.n_blocks * case.cfg.block_size) <= positions[:, None, :, None]
    tokens = tls.TokenSelection.from_mask(
        everything.expand(-1, case.k.shape[1], -1, -1), positions, case.q.shape[1] // case.k.shape[1]
    )
    lse = torch.zeros(case.q.shape[:3])
    assert bool((missed_mass_bound(case.q, index, tokens, lse) == 0).all())


def test_a_block_of_equal_keys_is_bounded_exactly() -> None:
    case = make(SMALL, lens=[160], s=160, hkv=1, group=2)
    case.k.copy_(case.k[:, :, ::16].repeat_interleave(16, 2))
    found = attend(case.q, case.k, case.v, case.index(), case.cfg, backend="reference", return_bound=True)
    assert found.bound is not None
    assert found.tokens is not None
    truth = missed(case, found.tokens, torch.ones(160, dtype=torch.bool), 1 / 4)
    torch.testing.assert_close(found.bound.double(), truth, rtol=1e-4, atol=0)
    assert bool((truth > 0.1).all())


@pytest.mark.parametrize("with_lse", [False, True])
def test_the_bound_comes_last(with_lse: bool) -> None:
    case = make(SMALL, lens=[160, 90], s=160)
    index = case.index()
    call = (case.q, case.k, case.v, index, case.cfg)
    found = tls.two_level_attention(*call, backend="reference", return_lse=with_lse, return_bound=True)
    plain, lse = tls.two_level_attention(*call, backend="reference", return_lse=True)
    assert torch.equal(found[0], plain)
    assert len(found) == (3 if with_lse else 2)
    assert found[-1].shape == lse.shape
    if with_lse:
        assert torch.equal(found[1], lse)


def test_what_has_no_bound_says_why() -> None:
    case = make(tls.TLSConfig(block_size=16, block_budget=64, token_budget=None, sink_tokens=0, recent_tokens=1),
                lens=[100], s=100)  # fmt: skip
    call = (case.q, case.k, case.v, case.index(), case.cfg)
    with pytest.raises(ValueError, match=r"index: expected kind 'quest' or 'box', .*got 'lowrank'"):
        tls.two_level_attention(*call, backend="reference", return_bound=True)
    with pytest.raises(ValueError, match="return_bound: expected no score_mod"):
        tls.two_level_attention(*call, backend="reference", return_bound=True, score_mod=lambda s, b, h, q, k: s + 1)
