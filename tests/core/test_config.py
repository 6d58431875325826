from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flex_tls as tls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 48}, r"block_size: expected one of 16, 32, 64, 128, got 48"),
        ({"block_size": 32.0}, r"block_size: expected an integer, got 32\.0"),
        ({"block_budget": "8192"}, r"block_budget: expected an integer, got '8192'"),
        ({"block_budget": None}, r"block_budget: expected an integer, got None"),
        ({"token_budget": 1024.0}, r"token_budget: expected an integer, got 1024\.0"),
        ({"filter_dims": 8.0}, r"filter_dims: expected an integer, got 8\.0"),
        ({"label_bits": 4.0}, r"label_bits: expected one of 2, 4, 8, got 4\.0"),
        ({"index": "magic"}, r"index: expected one of 'lowrank'.*got 'magic'"),
        ({"label_bits": 3}, r"label_bits: expected one of 2, 4, 8, got 3"),
        ({"label_bits": (4, 3)}, r"label_bits: expected one of 2, 4, 8, got 3"),
        ({"label_bits": ()}, r"label_bits: expected the bits of at least one word, got \(\)"),
        ({"label_bits": (4, 2), "filter_dims": 16}, r"filter_dims: expected one of 8, 24, .*got 16"),
        ({"label_dims": 0}, r"label_dims: expected an integer of at least 1, got 0"),
        ({"recent_tokens": 0}, r"recent_tokens: expected an integer of at least 1, got 0"),
        ({"sink_tokens": 1.5}, r"sink_tokens: expected an integer of at least 0, got 1.5"),
        ({"block_budget": 128}, r"block_budget: expected at least 144 tokens.*got 128; raise the budget"),
        ({"token_budget": 100}, r"token_budget: expected at least sink_tokens \+ recent_tokens = 128, got 100"),
        ({"token_budget": 9000}, r"token_budget: expected at most block_budget = 8192, got 9000"),
        ({"dense_layers": -1}, r"dense_layers: expected an integer of at least 0, got -1"),
        ({"dense_layers": (1, -2)}, r"dense_layers: expected a count or layer numbers from 0 on, got \(1, -2\)"),
        ({"block_shares": ()}, r"block_shares: expected a number above 0 for every layer, got \(\)"),
        ({"block_shares": (1.0, 0.0)}, r"block_shares: expected a number above 0 for every layer, got \(1.0, 0.0\)"),
        ({"block_shares": (1.0, float("nan"))}, r"block_shares: expected a number above 0 for every layer"),
        ({"filter_dims": 12}, r"filter_dims: expected one of 8, 16, 24, 32, .*got 12"),
        ({"filter_dims": 40}, r"filter_dims: expected one of 8, 16, 24, 32, .*got 40"),
        ({"box_radius": 2.0}, r"box_radius: expected a share between 0 and 1"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.TLSConfig(**fields)  # type: ignore[arg-type]


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tls.TLSConfig().block_size = 32  # type: ignore[misc]


def test_the_longest_context_that_loses_nothing() -> None:
    assert tls.TLSConfig().dense_up_to_tokens == 1024
    assert tls.TLSConfig(token_budget=None).dense_up_to_tokens == 8192
    assert tls.TLSConfig(sparse_from_tokens=30_000).dense_up_to_tokens == 29_999
    assert tls.TLSConfig(sparse_from_tokens=30_000).held_tokens == 1024


def test_importing_the_package_needs_torch_alone_and_patches_nothing() -> None:
    code = (
        "import sys, torch\n"
        "from torch.nn.functional import scaled_dot_product_attention as before\n"
        "import flex_tls, flex_tls.masks, flex_tls.offload\n"
        "assert torch.nn.functional.scaled_dot_product_attention is before\n"
        "loaded = {'transformers', 'triton', 'typer', 'rich', 'matplotlib', 'masks', 'offload'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dense_layers_are_the_first_ones_or_those_named() -> None:
    assert [i for i in range(5) if tls.TLSConfig(dense_layers=2).is_dense(i)] == [0, 1]
    named = tls.TLSConfig(dense_layers=(3, 0, 3))
    assert [i for i in range(5) if named.is_dense(i)] == [0, 3]
    # As JSON gives it back
    assert tls.TLSConfig(**{**dataclasses.asdict(named), "dense_layers": [0, 3]}) == named


@given(
    st.lists(st.floats(0.01, 4), min_size=1, max_size=9), st.integers(11, 90), st.sampled_from((None, 160, 170)),
    st.integers(0, 3),
)  # fmt: skip
def test_layers_keep_their_share_of_the_block_budget(
    shares: list[float], blocks: int, token_budget: int | None, dense_layers: int
) -> None:
    cfg = tls.TLSConfig(
        block_budget=16 * blocks, token_budget=token_budget, block_shares=tuple(shares), dense_layers=dense_layers
    )
    # As it comes back from JSON
    assert tls.TLSConfig(**{**dataclasses.asdict(cfg), "block_shares": list(shares)}) == cfg
    least = max(cfg.forced_blocks, -(-(token_budget or 0) // 16))
    layers = [cfg.for_layer(i) for i in range(len(shares))]
    for share, layer in zip(shares, layers, strict=True):
        assert layer.block_shares is None
        assert layer.kept_blocks == least or abs(layer.kept_blocks - share * blocks) <= 0.5
        assert layer.kept_blocks >= least
        assert layer == dataclasses.replace(cfg, block_budget=layer.block_budget, block_shares=None)
    # What every sparse layer holds
    assert cfg.held_tokens == min((x.held_tokens for x in layers[dense_layers:]), default=0)
    with pytest.raises(ValueError, match=f"layer: expected 0 to {len(shares) - 1}, the layers of block_shares, got"):
        cfg.for_layer(len(shares))


def test_without_shares_layers_are_alike() -> None:
    cfg = tls.TLSConfig()
    assert cfg.for_layer(17) is cfg
