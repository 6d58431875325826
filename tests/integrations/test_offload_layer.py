"""One offloaded layer, fed by hand, against the layer that holds its keys and values on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

import flex_tls as tls
from flex_tls.reference import attention_reference
from flex_tls.selection import BlockSelection, label_block_scores, select_blocks, token_scores, tokens_from_scores
from tests.cases import assert_as_exact
from tests.integrations.offloaded import as_held, cache_for
from tests.offload.machine import listed

pytestmark = pytest.mark.usefixtures("no_block_is_in_two_places")

STORE_DTYPES = st.sampled_from(("model", "int8"))


def one_layer(offload: tls.OffloadConfig | None, cfg: tls.TLSConfig, b: int, hkv: int, group: int) -> tls.TLSCache:
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=hkv * group, num_key_value_heads=hkv, hidden_size=hkv * group * 16,
        vocab_size=8, intermediate_size=8,
    )  # fmt: skip
    return cache_for(type("Model", (), {"config": config}), offload, b, cfg=cfg, max_len=400)


def feed(cache: tls.TLSCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache.begin(None, q.shape[2], q.shape[0])
    cache.update(k, v, 0)
    return cache.tls_layers[0].attend(q, 0.25)


@st.composite
def streams(draw: st.DrawFn) -> tuple[tls.TLSConfig, tuple[int, int, int], list[int], int, int]:
    """(configuration, (B, HKV, G), tokens of each forward, slots more than the least, seed)."""
    size = draw(st.sampled_from((16, 32)))
    cfg = tls.TLSConfig(
        block_size=size, block_budget=size * draw(st.integers(3, 5)), token_budget=draw(st.sampled_from((40, None))),
        sink_tokens=draw(st.integers(0, 16)), recent_tokens=draw(st.integers(1, 16)), label_dims=8, dense_layers=0,
        sparse_query_tokens=4, group_reduce=draw(st.sampled_from(("softmax_mean", "softmax_max", "max"))),
    )  # fmt: skip
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from((1, 3))))
    tokens = [draw(st.integers(20, 200)), *draw(st.lists(st.sampled_from((1, 1, 1, 2, 4, 30)), max_size=8))]
    return cfg, shape, tokens, draw(st.integers(0, 4)), draw(st.integers(0, 2**16))


def inputs_of(
    shape: tuple[int, int, int], tokens: list[int], seed: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    b, hkv, group = shape
    generator = torch.Generator().manual_seed(seed)
    for t in tokens:
        q, k, v = (torch.randn(b, h, t, 16, generator=generator) for h in (hkv * group, hkv, hkv))
        yield q.to(dtype), k.to(dtype), v.to(dtype)


def pool(cfg: tls.TLSConfig, spare: int, **kwargs: Any) -> tls.OffloadConfig:
    from flex_tls.offload import open_blocks

    least = cfg.kept_blocks + open_blocks(cfg.sparse_query_tokens, cfg.block_size)
    return tls.OffloadConfig(gpu_blocks=least + spare, **kwargs)


@settings(max_examples=10)
@given(streams(), STORE_DTYPES)
def test_exact_equals_the_cache_without_offload(stream: Any, store_dtype: Any) -> None:
    """Bit for bit, but for chunks that the pool serves in pieces: matrix products round by their number of rows."""
    cfg, shape, tokens, spare, seed = stream
    config = pool(cfg, spare, policy="exact", store_dtype=store_dtype)
    plain, away = one_layer(None, cfg, *shape), one_layer(config, cfg, *shape)
    for q, k, v in inputs_of(shape, tokens, seed):
        got, want = feed(away, q, k, v), feed(plain, q, as_held(k, config), as_held(v, config))
        if q.shape[2] in (2, 4):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got, want)
    engine = away.offloaded_layers[0].opened()
    engine.synchronize()
    for host, device in zip(away.tls_layers[0].buffers(), plain.tls_layers[0].buffers(), strict=True):
        assert torch.equal(host[:, :, : sum(tokens)], device[:, :, : sum(tokens)])


@settings(max_examples=10)
@given(streams(), st.booleans(), STORE_DTYPES, st.data())
def test_transfers_at_any_moment_before_their_join_change_nothing(
    stream: Any, resident: bool, store_dtype: Any, data: Any
) -> None:
    cfg, shape, tokens, spare, seed = stream
    config = pool(cfg, spare, attend_resident=resident, store_dtype=store_dtype)
    late, early = one_layer(config, cfg, *shape), one_layer(config, cfg, *shape)
    for q, k, v in inputs_of(shape, tokens, seed):
        assert torch.equal(feed(early, q, k, v), feed(late, q, k, v))
        early.offloaded_layers[0].opened().transfers.run(data.draw(st.integers(0, 4)))  # type: ignore[attr-defined]


@settings(max_examples=10)
@given(streams(), st.booleans(), STORE_DTYPES)
def test_async_attends_to_what_its_definition_says(stream: Any, resident: bool, store_dtype: Any) -> None:
    """Its own definition in Python sets: what a step selects and the step before left on the device."""
    cfg, shape, tokens, spare, seed = stream
    # One query token a step: a chunk is as many steps as the pool asks for, which is another test's matter
    tokens = [tokens[0], *[1 if t < 30 else t for t in tokens[1:]]]
    config = pool(cfg, spare, attend_resident=resident, store_dtype=store_dtype)
    cache = one_layer(config, cfg, *shape)
    layer = cache.offloaded_layers[0]
    plain = one_layer(None, cfg, *shape)
    keys, values = [], []
    for q, k, v in inputs_of(shape, tokens, seed):
        keys.append(as_held(k, config))
        values.append(as_held(v, config))
        was_open = layer.index is not None and layer.opened().is_open
        before = layer.opened().pool.block_of_slot.clone()
        got = feed(cache, q, k, v)
        want = feed(plain, q, keys[-1], values[-1])
        n, index = sum(x.shape[2] for x in keys), layer.index
        if q.shape[2] > 4 or n <= cfg.dense_up_to_tokens or not was_open:
            # Dense, or the first step after a prompt, whose pool is the prompt's matter
            if q.shape[2] > 4 or n <= cfg.dense_up_to_tokens:
                assert torch.equal(got, want)
            continue
        chosen = select_blocks(q, index, cfg, scale=0.25)
        kept = torch.zeros(*chosen.indices.shape[:3], index.n_blocks, dtype=torch.bool)
        clocks = layer.opened().pool
        for b in range(shape[0]):
            for h in range(shape[1]):
                held = {s: x for s, x in enumerate(before[b, h].tolist()) if x >= 0}
                selected = listed(chosen.indices[b, h, 0], index.n_blocks)
                there = set(held.values())
                if resident:
                    gone = there - set(clocks.block_of_slot[b, h].tolist())
                    assert not gone & set(selected)
                    there = {x for x in there - gone if x <= (n - 1) // cfg.block_size}
                else:
                    there &= set(selected)
                kept[b, h, 0, list(there)] = True
        number = torch.arange(index.n_blocks, dtype=torch.int32)
        ids = torch.where(kept, number, index.n_blocks).sort(-1).values
        look = BlockSelection(ids, kept.sum(-1).int(), index.n_blocks, cfg.block_size, shape[2], index.capacity_tokens)
        scores = token_scores(q, index, None, None, 0.25)
        chosen_tokens = tokens_from_scores(index, cfg, look, scores, label_block_scores(scores, cfg))
        room = index.capacity_tokens - n
        whole = [torch.nn.functional.pad(torch.cat(x, 2), (0, 0, 0, room)) for x in (keys, values)]
        assert torch.equal(got, attention_reference(q, *whole, chosen_tokens, scale=0.25)[0])


@settings(max_examples=4)
@given(st.integers(0, 2**16), st.lists(st.sampled_from((1, 30)), min_size=4, max_size=8), STORE_DTYPES)
def test_exact_through_flex_is_as_exact_as_without_offload(seed: int, more: list[int], store_dtype: Any) -> None:
    """One compiled shape, many contents and slot permutations, the smallest pool."""
    cfg = tls.TLSConfig(
        block_size=16, block_budget=64, token_budget=40, sink_tokens=4, recent_tokens=8, label_dims=8, dense_layers=0,
        sparse_query_tokens=4,
    )  # fmt: skip
    shape, tokens = (2, 1, 3), [150, *more, 1]
    config = pool(cfg, 0, policy="exact", store_dtype=store_dtype)
    flex = one_layer(config, cfg, *shape)
    flex._shared.backend = "flex"
    low = one_layer(config, cfg, *shape)
    for q, k, v in inputs_of(shape, tokens, seed):
        got, reference = (feed(cache, q, k, v) for cache in (flex, low))
        assert_as_exact(got, reference, truth_of(low, q, reference))


def truth_of(cache: tls.TLSCache, q: Tensor, low: Tensor) -> Tensor:
    """The last forward's attention in float64, over the tokens that were selected."""
    layer = cache.offloaded_layers[0]
    n, index = max(cache.seq_lens), layer.index
    keys, values = (x[:, :, :n].double() for x in layer.buffers())
    if q.shape[2] > 4 or n <= cache.cfg.dense_up_to_tokens:
        position = n - q.shape[2] + torch.arange(q.shape[2])
        mask = torch.arange(n) <= position[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q.double(), keys, values, attn_mask=mask, scale=0.25, enable_gqa=True
        )
    blocks = select_blocks(q, index, cache.cfg, scale=0.25)
    scores = token_scores(q, index, None, None, 0.25)
    tokens = tokens_from_scores(index, cache.cfg, blocks, scores, label_block_scores(scores, cache.cfg))
    return attention_reference(q.double(), keys, values, tokens, scale=0.25)[0]
