from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flex_tls as tls
from bench.tries.labels import MixedLabels, bytes_of, widths
from bench.tries.measure import BITS, make_tries
from bench.tries.rules import BUDGETS, BY_LAYER, Rule, Sharing, kept_counts, needs, share_out, threshold_for
from flex_tls import selection
from flex_tls.labels import TokenLabels, fit


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=90),
    least=st.integers(0, 20),
    more=st.integers(0, 60),
    share=st.floats(0, 1),
)
def test_shares_sum_to_the_total_within_their_limits_and_in_the_order_of_the_weights(
    weights: list[float], least: int, more: int, share: float
) -> None:
    most, n = least + more, len(weights)
    total = n * least + int(share * n * more)
    shares = share_out(torch.tensor(weights), total, least, most)
    assert int(shares.sum()) == total
    assert least <= int(shares.min())
    assert int(shares.max()) <= most
    order = torch.tensor(weights).argsort(stable=True)
    # Of equal exact shares one may get the last token and the other not
    assert bool((shares[order].diff() >= -1).all())


def test_equal_weights_share_equally() -> None:
    assert share_out(torch.ones(3), 72, 12, 96).tolist() == [24, 24, 24]
    assert share_out(torch.tensor([1.0, 2.0, 3.0]), 72, 12, 96).tolist() == [12, 24, 36]


def test_a_total_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 4 to 6, 2 times 2 to 3, got 7"):
        share_out(torch.ones(2), 7, 2, 3)


def test_widths_compared_with_each_other_take_equal_bytes() -> None:
    assert [bytes_of(widths(name)) for name in BITS] == [16] * 9 + [8] * 7
    # In whole words
    assert bytes_of(widths("1x2")) == 4
    assert bytes_of(widths("8x4+1x2")) == 8


def fitted(labels: TokenLabels, k: torch.Tensor, q: torch.Tensor) -> TokenLabels:
    labels.observe(q, torch.ones(1, q.shape[2], dtype=torch.bool))
    fit([labels], [lambda: [(k, torch.ones(1, k.shape[2], dtype=torch.bool))]])
    labels.write(k, torch.zeros(1, dtype=torch.int64))
    return labels


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equal_widths_score_as_the_packages_labels(bits: int) -> None:
    gen = torch.Generator().manual_seed(0)
    k, q = (torch.randn(1, h, 96, 16, generator=gen) for h in (2, 4))
    cpu = torch.device("cpu")
    ours = fitted(TokenLabels.empty(1, 2, 96, 16, dims=12, words=(bits,) * -(-12 * bits // 32), device=cpu), k, q)
    mixed = fitted(MixedLabels.of(widths(f"12x{bits}")).empty(1, 2, 96, 16, dims=1, words=(1,), device=cpu), k, q)
    torch.testing.assert_close(mixed.scores(q.view(1, 2, -1, 16)), ours.scores(q.view(1, 2, -1, 16)))


def test_codes_of_a_width_take_its_bits_and_more_bits_err_less() -> None:
    gen = torch.Generator().manual_seed(1)
    k, q = (torch.randn(1, h, 400, 16, generator=gen) for h in (1, 2))
    asked, errors = q.view(1, 1, -1, 16), []
    for name in ("4x8+12x4", "4x4+12x2"):
        labels = MixedLabels.of(widths(name)).empty(1, 1, 400, 16, dims=1, words=(1,), device=torch.device("cpu"))
        fitted(labels, k, q)
        for codes, part in zip(labels.codes.split([4, 12], dim=2), widths(name), strict=True):
            assert codes.min() == 0
            assert codes.max() == 2**part.bits - 1
            assert torch.equal(codes, codes.round())
        exact = asked @ (k - k.mean(2, keepdim=True)).transpose(-1, -2)
        errors.append(float((labels.scores(asked) - exact).square().mean()))
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("by", ["share", "value"])
def test_a_threshold_keeps_the_mean_that_it_was_asked_for_and_the_best_first(by: str) -> None:
    mass = torch.rand(6, 50, generator=torch.Generator().manual_seed(2)) ** 4
    rank = mass.clone()
    rank[:, 0], rank[:, -3:] = torch.inf, -torch.inf
    mass[:, -3:] = 0.0
    need, order = needs(rank, mass, by)
    assert torch.equal(order[:, 0], torch.zeros(6, dtype=torch.int64))
    assert bool((need.diff(dim=-1)[:, :-3] >= 0).all())
    assert bool((need[:, -3:] == torch.inf).all())
    limit = threshold_for(need, 12, 2, 47)
    assert float(kept_counts(need, limit, 2, 47).double().mean()) == pytest.approx(12, abs=1 / 6)


@pytest.mark.parametrize("name", [*BUDGETS, *BY_LAYER])
def test_a_rule_keeps_the_budget_of_the_queries_that_it_was_made_for(name: str) -> None:
    gen = torch.Generator().manual_seed(3)
    cfg = tls.TLSConfig(block_size=16, block_budget=192, token_budget=96, sink_tokens=16, recent_tokens=16)
    rule, layers = Rule.parse(name), []
    for sharpness in (1.0, 3.0):
        k, q = (torch.randn(1, h, 768, 16, generator=gen) for h in (2, 4))
        layers.append((tls.KVIndex.build(k, cfg, q=sharpness * q), sharpness * q[:, :, -16:]))
    sharing = Sharing(rule, cfg, *zip(*layers, strict=True))
    assert int(sharing.counts.sum()) == sharing.counts.numel() * sharing.budget
    if rule.within == "layer":
        assert bool((sharing.counts.sum(1) == 2 * sharing.budget).all())
    if rule.within == "layers":
        assert bool((sharing.counts == sharing.counts[:, :1]).all())
    with sharing.patched():
        found = [selection.select(q, index, cfg, None, None, None) for index, q in layers]
    counts = torch.stack([(blocks if rule.level == "blocks" else tokens).counts for blocks, tokens in found])
    assert float(counts.double().mean()) == pytest.approx(sharing.budget, rel=0.02)
    assert int(counts.min()) >= sharing.least
    assert int(counts.max()) <= sharing.most
    # Sinks and the recent window are kept whatever the rule
    for _, tokens in found:
        assert bool(tokens.mask[..., :16].all())
        assert bool(tokens.mask.gather(-1, tokens.positions[:, None, :, None].expand(-1, 2, -1, 1)).all())
    # The package is as it was
    again = selection.select(layers[0][1], layers[0][0], cfg, None, None, None)
    assert bool((again[0].counts == cfg.kept_blocks).all())


def test_ours_comes_first_and_an_unknown_rule_is_refused() -> None:
    cfg = tls.TLSConfig()
    assert [each.name for each in make_tries(["8x8+16x4", "blocks"], cfg)] == [
        "ours",
        "8x8+16x4",
        *BUDGETS[:8],
        *BY_LAYER,
    ]
    both = make_tries(["oracle/blocks:value:model:prompt:x2"], cfg)[1]
    assert both.cfg == replace(cfg, index="oracle")
    assert both.rule == Rule("blocks", "value", "model", "prompt", most=2)
    for unknown in ("blocks:share:head:query", "blocks:share:model:query:xx"):
        with pytest.raises(ValueError, match="rule: expected one of blocks:share"):
            make_tries([unknown], cfg)
