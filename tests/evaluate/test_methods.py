from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flex_tls as tls
from flex_tls.evaluate.methods import DENSE, METHODS, cost, kept_tokens, make_method

BASE = tls.TLSConfig(block_size=16, block_budget=96, token_budget=64, sink_tokens=16, recent_tokens=16)
EQUAL = [
    "ours", "tokens", "quest_labels", "double_sparsity", "quest_double_sparsity", "window", "oracle", "oracle_tokens",
    "blocks", "quest", "oracle_blocks",
]  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_methods_attend_to_equally_many_tokens(name: str) -> None:
    method = make_method(name, BASE, 400)
    assert method.cfg is not None
    assert kept_tokens(method.cfg) == 64
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 400, 32)
    index = tls.KVIndex.build(k, method.cfg)
    blocks = tls.select_blocks(q, index, method.cfg)
    tokens = tls.select_tokens(q, index, blocks, method.cfg)
    assert tokens.counts.unique().tolist() == [64]


def test_quest_may_also_have_the_block_budget() -> None:
    cfg = make_method("quest_wide", BASE, 400).cfg
    assert cfg is not None
    assert kept_tokens(cfg) == 96


def test_the_window_is_sinks_and_newest_tokens_alone() -> None:
    cfg = make_method("window", BASE, 400).cfg
    assert cfg is not None
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 400, 32)
    index = tls.KVIndex.build(k, cfg)
    mask = tls.select_tokens(q, index, tls.select_blocks(q, index, cfg), cfg).mask[..., :400]
    kept = torch.zeros(400, dtype=torch.bool)
    kept[:16] = kept[400 - 48 :] = True
    assert bool((mask == kept).all())


def test_the_token_oracle_keeps_the_highest_scores() -> None:
    cfg = make_method("oracle_tokens", BASE, 400).cfg
    assert cfg is not None
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 400, 32)
    index = tls.KVIndex.build(k, cfg)
    mask = tls.select_tokens(q, index, tls.select_blocks(q, index, cfg), cfg).mask[0, 0, 0, :400]
    scores = (k[0, 0] @ q[0, 0, 0]).clone()
    scores[:16] = scores[-16:] = torch.inf
    assert set(mask.nonzero().flatten().tolist()) == set(scores.topk(64).indices.tolist())


@given(
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([16, 32, 64]),
    st.integers(4, 64),
    st.integers(0, 64),
    st.booleans(),
)
def test_every_method_can_be_made_from_any_budgets(
    name: str, block_size: int, n_blocks: int, extra: int, two_levels: bool
) -> None:
    budget = n_blocks * block_size
    tokens = min(2 * block_size + extra, budget) if two_levels else None
    cfg = tls.TLSConfig(
        block_size=block_size,
        block_budget=budget,
        token_budget=tokens,
        sink_tokens=block_size,
        recent_tokens=block_size,
    )
    method = make_method(name, cfg, 2 * budget)
    assert method.cfg is not None
    assert method.cfg.dense_layers == cfg.dense_layers


@pytest.mark.parametrize("head_dim", [64, 128])
def test_costs_are_those_of_the_buffers(head_dim: int) -> None:
    k = torch.zeros(1, 1, 4096, head_dim, dtype=torch.bfloat16)
    for name in ("ours", "tokens", "ours:label_dims=24:label_bits=2", "quest", "quest_labels", "quest_double_sparsity"):
        method = make_method(name, BASE, 4096)
        assert method.cfg is not None
        index = tls.KVIndex.build(k, method.cfg)
        codes = index.labels.codes
        labels = 0 if name == "quest" else codes.numel() * 4
        # One block more than needed takes the keys that are ignored
        blocks = 0 if index.summary is None else sum(x[:, :, 1:].numel() * 2 for x in index.summary.tensors.values())
        assert cost(method, head_dim, 4096).index_share == pytest.approx((labels + blocks) / (2 * k.numel() * 2))


def test_a_step_reads_the_index_and_what_it_keeps() -> None:
    cfg = tls.TLSConfig(block_size=16, block_budget=1024, token_budget=512, sink_tokens=16, recent_tokens=16)
    # Of 4 * 64 bytes a token: labels of 16 bytes, of all tokens at level 1 and of 1,024 at level 2
    ours = 16 / 256 * (1 + 1 / 4) + 1 / 8
    assert cost(make_method("ours", cfg, 4096), 64, 4096).read_share == pytest.approx(ours)
    half = cost(make_method("ours:filter_dims=16", cfg, 4096), 64, 4096).read_share
    assert half == pytest.approx(8 / 256 + 16 / 256 / 4 + 1 / 8)
    quest = cost(make_method("quest", cfg, 4096), 64, 4096).read_share
    assert quest == pytest.approx(256 / 16 / 256 + 1 / 8)
    for name in ("window", "h2o"):
        assert cost(make_method(name, cfg, 4096), 64, 4096) == (0.0, 1 / 8)
    assert cost(make_method(DENSE, cfg, 4096), 64, 4096) == (0.0, 1.0)


def test_settings_change_the_method() -> None:
    cfg = make_method("ours:label_dims=16:filter_dims=None:block_reduce=logsumexp:box_radius=0.5", BASE, 400).cfg
    assert cfg is not None
    assert (cfg.label_dims, cfg.filter_dims, cfg.block_reduce, cfg.box_radius) == (16, None, "logsumexp", 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_made_for_the_blocks_that_they_name(name: str) -> None:
    small, large = (
        tls.TLSConfig(block_size=size, block_budget=1024, token_budget=512, sink_tokens=32, recent_tokens=32)
        for size in (16, 32)
    )
    assert make_method(f"{name}:block_size=32", small, 4000).cfg == make_method(name, large, 4000).cfg


def test_values_may_be_multiples_and_layers() -> None:
    cfg = make_method("ours:block_budget=x2:token_budget=x1/2:dense_layers=8+0", BASE, 400).cfg
    assert cfg is not None
    assert (cfg.block_budget, cfg.token_budget, cfg.dense_layers) == (192, 32, (0, 8))


def test_dense_has_no_configuration() -> None:
    assert make_method(DENSE, BASE, 400).config is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv", "method: expected one of dense, ours, .*, got 'snapkv'"),
        ("ours:labels=3", "method: expected settings FIELD=VALUE .*, got 'labels=3'"),
        ("ours:label_dims", "got 'label_dims'"),
        ("ours:label_bits=3", "label_bits: expected one of 2, 4, 8, got 3"),
    ],
)
def test_what_cannot_be_made_says_why(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(spec, BASE, 400)
