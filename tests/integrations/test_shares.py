"""Block budgets shared out among layers: every way through a cache keeps what its layer's share says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.record import Recorder
from flex_tls.shares import MOST, STEPS, share_out
from tests.integrations.models import SPARSE, make, prompts
from tests.integrations.offloaded import cache_for

# Two sparse layers, of 3 blocks, as sinks and recent window need whatever the share, and of 5
SHARED = dataclasses.replace(SPARSE, block_shares=(1.0, 0.5, 1.75))
EXACT = tls.OffloadConfig(policy="exact")


@pytest.fixture(autouse=True)
def plain_precision() -> None:
    torch.manual_seed(0)


class Kept(Recorder):
    """How many blocks each layer kept in its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, Tensor] = {}

    def add_sparse(self, layer: int, q: Tensor, k: Tensor, index: Any, blocks: Any, tokens: Any, **rest: Any) -> None:
        self.counts[layer] = blocks.counts


@torch.no_grad()
def generated(model: Any, cache: tls.TLSCache, inputs: Any) -> Tensor:
    with tls.integrations.huggingface.enabled(model):
        out: Tensor = model.generate(**inputs, past_key_values=cache, max_new_tokens=6, do_sample=False)
    return out


@pytest.mark.parametrize("offload", [None, EXACT], ids=["resident", "offloaded"])
def test_every_layer_keeps_its_own_number_of_blocks(offload: tls.OffloadConfig | None) -> None:
    model = make()
    cache = cache_for(model, offload, cfg=SHARED)
    cache.recorder = kept = Kept()
    generated(model, cache, prompts(90))
    assert {layer: set(counts.flatten().tolist()) for layer, counts in kept.counts.items()} == {1: {3}, 2: {5}}


def test_shares_of_one_change_nothing_and_others_do() -> None:
    model, inputs = make(), prompts(90)
    logits = []
    for cfg in (SPARSE, dataclasses.replace(SPARSE, block_shares=(1.0, 1.0, 1.0)), SHARED):
        cache = cache_for(model, None, cfg=cfg)
        with torch.no_grad(), tls.integrations.huggingface.enabled(model):
            model(**inputs, past_key_values=cache)
            logits.append(model(torch.tensor([[5]]), past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_offload_that_waits_equals_none_and_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, inputs = make(), prompts(90)
    want = generated(model, cache_for(model, None, cfg=SHARED), inputs)
    cache = cache_for(model, EXACT, cfg=SHARED)
    assert torch.equal(generated(model, cache, inputs), want)
    cache.save(tmp_path / "saved")
    loaded = tls.TLSCache.load(tmp_path / "saved", model.config, backend="reference")
    assert loaded.cfg == SHARED


def test_the_compiled_backend_keeps_the_same() -> None:
    model, inputs = make(), prompts(90)
    want = generated(model, cache_for(model, None, cfg=SHARED), inputs)
    assert torch.equal(generated(model, cache_for(model, None, cfg=SHARED, backend="flex"), inputs), want)


def test_what_belongs_to_another_model_or_to_no_layer_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="block_shares: expected 3 numbers, one a layer, got 2"):
        cache_for(model, None, cfg=dataclasses.replace(SPARSE, block_shares=(1.0, 1.0)))
    with pytest.raises(ValueError, match="gpu_blocks: expected at least"):
        cache_for(model, tls.OffloadConfig(gpu_blocks=5), cfg=SHARED)
    k, q = torch.randn(1, 2, 90, 16), torch.randn(1, 4, 1, 16)
    index = tls.KVIndex.build(k, SPARSE)
    with pytest.raises(ValueError, match="cfg: expected one layer's, got block_shares of 3 layers; pass cfg"):
        tls.select_blocks(q, index, SHARED)


@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 2**16))
def test_shares_are_steps_within_their_bounds_with_mean_one(n_layers: int, kept: int, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    mass = []
    for _ in range(n_layers):
        sharpness = 10 * torch.rand((), generator=gen)
        rank = (sharpness * torch.randn(1, 2, 3, 5 * kept, generator=gen)).softmax(-1)
        rank[..., :2] = torch.inf
        mass.append([rank, rank.flip(1)])
    shares = share_out(mass, kept)
    assert sum(shares) == n_layers
    assert all(1 / STEPS <= x <= MOST and x * STEPS == int(x * STEPS) for x in shares)
    assert share_out([mass[0]] * n_layers, kept) == [1.0] * n_layers


def test_the_layer_that_attends_to_more_gets_more() -> None:
    flat = torch.full((1, 1, 4, 100), 0.01)
    sharp = torch.cat([torch.full((1, 1, 4, 5), 0.1), torch.full((1, 1, 4, 95), 0.5 / 95)], -1)
    assert share_out([[sharp], [flat]], 20) == [0.25, 1.75]


@pytest.mark.parametrize("index", ["lowrank", "quest"])
def test_measured_shares_serve_the_model_that_they_are_of(index: Any) -> None:
    model, ids = make(), prompts(150)["input_ids"]
    cfg = dataclasses.replace(SPARSE, index=index)
    shares = tls.measure_block_shares(model, ids, cfg, last_tokens=20)
    assert len(shares) == 3
    assert shares[0] == 1
    assert sum(shares) == 3
    shared = dataclasses.replace(cfg, block_shares=(1.0, 0.5, 2.0))
    assert tls.measure_block_shares(model, ids, shared, last_tokens=20) == shares
    generated(model, cache_for(model, None, cfg=dataclasses.replace(cfg, block_shares=shares)), prompts(90))
    with pytest.raises(ValueError, match="input_ids: expected more than 52 tokens, what the budgets hold and at least"):
        tls.measure_block_shares(model, ids[:, :52], cfg, last_tokens=20)
