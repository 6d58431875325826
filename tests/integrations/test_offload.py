"""A model's cache with its keys and values in host memory, against the cache that holds them on the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flex_tls.offload import memory
from flex_tls.offload.int8 import dequantised, quantised
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

import flex_tls as tls
from flex_tls.attention import BackendUnavailable
from flex_tls.reference import attention_reference
from flex_tls.selection import BlockSelection, label_block_scores, select_blocks, token_scores, tokens_from_scores
from tests.cases import assert_as_exact
from tests.integrations.models import FAMILIES, SPARSE, make, prompts
from tests.offload.machine import listed

EXACT = tls.OffloadConfig(policy="exact")
MINIMUM = tls.OffloadConfig(policy="exact", gpu_blocks=6)
INT8 = dataclasses.replace(MINIMUM, store_dtype="int8")
STORE_DTYPES = st.sampled_from(("model", "int8"))
FULL_ATTENTION = [family for family in FAMILIES if family != "mistral, window"]


def cache_for(model: Any, offload: tls.OffloadConfig | None, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    arguments = {"max_len": 200, "backend": "reference", **kwargs}
    cache = tls.TLSCache(
        model.config, arguments.pop("cfg", SPARSE), batch_size=batch_size, offload=offload, dtype=torch.float32,
        device="cpu", **arguments,
    )  # fmt: skip
    for layer in cache.offloaded_layers:
        # Slots that nothing was written to must never be read
        layer.opened().pool.slots.fill_(torch.nan)
    return cache


def plain_cache_for(model: Any, offload: tls.OffloadConfig, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    """What ``offload`` must equal where it waits: no offload, over the keys and values that its store gives back."""
    cache = cache_for(model, None, batch_size, **kwargs)
    for layer in cache.tls_layers:
        if not cache.cfg.is_dense(layer.layer_idx) and layer.window is None:

            def write(k: Tensor, v: Tensor, step: Any, write: Any = layer._write) -> tuple[Tensor, Tensor]:
                held: tuple[Tensor, Tensor] = write(as_held(k, offload), as_held(v, offload), step)
                return held

            layer._write = write  # type: ignore[method-assign]
    return cache


def as_held(x: Tensor, offload: tls.OffloadConfig) -> Tensor:
    """Keys or values as the store gives them back."""
    return dequantised(*quantised(x), x.dtype) if offload.store_dtype == "int8" else x


def generate(model: Any, cache: tls.TLSCache, inputs: dict[str, Tensor], n: int = 12) -> Tensor:
    return tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=n,
        compiled=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_block_is_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine of every test is checked after every step."""
    from flex_tls.offload import LayerOffload

    step = LayerOffload.step

    def checked(self: LayerOffload, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = step(self, *args, **kwargs)
        self.check_integrity()
        return result

    monkeypatch.setattr(LayerOffload, "step", checked)


@pytest.mark.parametrize("offload", [EXACT, MINIMUM, INT8], ids=["default pool", "smallest pool", "int8"])
@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_exact_generates_what_the_cache_without_offload_does(family: str, offload: tls.OffloadConfig) -> None:
    """Left-padded rows, then another turn; the first row passes the budgets long before the last."""
    model, inputs = make(family), prompts(90, 41, 7)
    caches = [plain_cache_for(model, offload, 3), cache_for(model, offload, 3)]
    want, got = (generate(model, cache, inputs) for cache in caches)
    assert torch.equal(got, want)
    assert caches[0].seq_lens == caches[1].seq_lens
    more = torch.cat([want, prompts(30, 30, 30)["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, more.shape[1] - 90, dtype=torch.int64)], 1)
    turn = {"input_ids": more, "attention_mask": mask}
    want, got = (generate(model, cache, turn) for cache in caches)
    assert torch.equal(got, want)
    for layer in caches[1].offloaded_layers:
        assert layer.window is None
        assert 0 < layer.opened().stats().hit_rate <= 1


@pytest.mark.parametrize(
    "offload", [tls.OffloadConfig(), EXACT, tls.OffloadConfig(store_dtype="int8")], ids=["async", "exact", "int8"]
)
def test_a_context_that_the_budgets_hold_gives_equal_logits(offload: tls.OffloadConfig) -> None:
    model, inputs = make("qwen3"), prompts(20, 9)
    steps = prompts(9, 9)["input_ids"]
    logits = []
    for cache in (plain_cache_for(model, offload, 2), cache_for(model, offload, 2)):
        tls.enable(model)
        with torch.no_grad():
            out = [model(**inputs, past_key_values=cache).logits[:, -1]]
            for i in range(8):
                position = torch.tensor(cache.seq_lens)[:, None]
                out.append(model(steps[:, i : i + 1], position_ids=position, past_key_values=cache).logits[:, -1])
        logits.append(torch.stack(out))
    assert max(cache.seq_lens) <= SPARSE.dense_up_to_tokens
    assert torch.equal(*logits)


@pytest.mark.parametrize("offload", [EXACT, INT8], ids=["model", "int8"])
@pytest.mark.parametrize("extra", [{"num_beams": 2}, {"prefill_chunk_size": 32}], ids=["beams", "chunks"])
def test_transformers_generate_with_beams_and_in_chunks(extra: dict[str, int], offload: tls.OffloadConfig) -> None:
    model, inputs = make("llama"), prompts(80, 30)
    tls.enable(model)
    rows = 2 * extra.get("num_beams", 1)
    want, got = (
        model.generate(**inputs, do_sample=False, max_new_tokens=10, past_key_values=cache, **extra)
        for cache in (plain_cache_for(model, offload, rows), cache_for(model, offload, rows))
    )
    assert torch.equal(got, want)


def test_a_chunk_of_several_queries_equals_the_cache_without_offload() -> None:
    """Speculative decoding's shape: the smallest pool serves one query token at a time."""
    model, inputs, chunk = make("llama"), prompts(90, 64), prompts(5, 5)["input_ids"]
    tls.enable(model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.int64)], 1)
    results = []
    for offload in (None, MINIMUM):
        cache = cache_for(model, offload, 2)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            position = torch.tensor(cache.seq_lens)[:, None] + torch.arange(5)
            out = [model(chunk, attention_mask=mask, position_ids=position, past_key_values=cache).logits]
            # Three of them are rejected
            cache.crop(-3)
            out.append(model(chunk[:, :2], position_ids=position[:, 2:4], past_key_values=cache).logits)
        results.append(torch.cat(out, 1))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("offload", [EXACT, INT8], ids=["model", "int8"])
def test_a_batch_that_changes_its_size(offload: tls.OffloadConfig) -> None:
    model, inputs = make("llama"), prompts(90, 64)
    tls.enable(model)
    token = torch.tensor([[5], [6], [7]])
    results = []
    for cache in (plain_cache_for(model, offload, 2), cache_for(model, offload, 2)):
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            model(token[:2], past_key_values=cache, position_ids=torch.tensor([[90], [64]]))
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            position = torch.tensor(cache.seq_lens)[:, None]
            results.append(model(token, position_ids=position, past_key_values=cache).logits)
            cache.batch_select_indices(torch.tensor([True, False, True]))
            results.append(model(token[:2], position_ids=position[::2] + 1, past_key_values=cache).logits)
    assert torch.equal(results[2], results[0])
    assert torch.equal(results[3], results[1])


def test_a_copied_cache_goes_its_own_way() -> None:
    model, inputs = make("llama"), prompts(90)
    tls.enable(model)
    cache = cache_for(model, tls.OffloadConfig())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        tokens = [model(torch.tensor([[5]]), past_key_values=cache).logits]
        other = copy.deepcopy(cache)
        first = model(torch.tensor([[6]]), past_key_values=cache).logits
        model(torch.tensor([[9]]), past_key_values=cache)
        second = model(torch.tensor([[6]]), past_key_values=other).logits
    assert torch.equal(first, second)
    assert (cache.seq_lens, other.seq_lens) == ([93], [92])
    assert len(tokens) == 1


def test_an_interrupted_forward_leaves_the_cache_as_it_was() -> None:
    model, inputs = make(), prompts(90, 64)
    tls.enable(model)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        cache = cache_for(model, MINIMUM, 2)
        with torch.no_grad():
            for n, ids in enumerate((inputs["input_ids"], *torch.full((4, 2, 1), 5))):
                mask = torch.cat([inputs["attention_mask"], torch.ones(2, n, dtype=torch.int64)], 1)
                arguments = {"attention_mask": mask, "past_key_values": cache}
                if n:
                    arguments["position_ids"] = torch.tensor([[89 + n], [63 + n]])
                if interrupted and n in (1, 3):
                    handle = model.base_model.layers[2].register_forward_pre_hook(stop)
                    with pytest.raises(KeyboardInterrupt):
                        model(ids, **arguments)
                    handle.remove()
                logits = model(ids, **arguments).logits[:, -1]
        results.append(logits)
    torch.testing.assert_close(results[1], results[0])
    for layer in cache.offloaded_layers:
        layer.opened().check_integrity()


def test_an_interrupted_generation_goes_on() -> None:
    model, inputs = make("qwen3"), prompts(90)

    class Stops:
        def put(self, value: Tensor) -> None:
            self.left = getattr(self, "left", 4) - 1
            if not self.left:
                raise KeyboardInterrupt

    want = generate(model, cache_for(model, EXACT), inputs)
    cache = cache_for(model, EXACT)
    with pytest.raises(KeyboardInterrupt):
        tls.generate(
            model, inputs["input_ids"], cache=cache, max_new_tokens=12, compiled=False, streamer=Stops()
        )  # fmt: skip
    n = cache.get_seq_length()
    assert 90 < n < 101
    rest = tls.generate(model, want[:, : n + 1], cache=cache, max_new_tokens=101 - n, compiled=False)
    assert torch.equal(rest, want)


def test_a_prompt_longer_than_the_store_changes_nothing() -> None:
    model = make("llama")
    tls.enable(model)
    cache = cache_for(model, EXACT, max_len=60)
    with pytest.raises(ValueError, match=r"max_len: expected room for 90 tokens .*, got max_len=60"):
        model(**prompts(90), past_key_values=cache)
    assert cache.get_seq_length() == 0
    want = cache_for(model, None, max_len=60)
    assert torch.equal(generate(model, cache, prompts(40)), generate(model, want, prompts(40)))


# One layer, fed by hand -------------------------------------------------------------------------------------------


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
        sparse_query_tokens=4, group_reduce=draw(st.sampled_from(("softmax_mean", "max"))),
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


# What goes wrong --------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=r"gpu_blocks: expected at least 6 blocks, .* selects \(3 blocks\).*got 5"):
        cache_for(model, tls.OffloadConfig(gpu_blocks=5))
    with pytest.raises(ValueError, match="expected 2 numbers, one for each offloaded layer, got 3"):
        cache_for(model, tls.OffloadConfig(gpu_blocks=(6, 6, 6)))
    with pytest.raises(ValueError, match=r"gpu_bytes: expected at least 49,152 bytes.*got 2 blocks"):
        cache_for(model, tls.OffloadConfig(gpu_bytes=20000))
    with pytest.raises(ValueError, match=r"gpu_fraction: expected at least 0\.4615, .*got 3 blocks"):
        cache_for(model, tls.OffloadConfig(gpu_fraction=0.3))
    with pytest.raises(
        ValueError, match=r"offload: expected a layer with full attention besides dense_layers=1, got none"
    ):
        cache_for(make("mistral, window"), EXACT)
    with pytest.raises(BackendUnavailable, match="read no pool of block slots"):
        cache_for(model, EXACT, backend="triton")
    copies = cache_for(model, tls.OffloadConfig(transfer="copy"), backend="auto")
    with pytest.raises(
        ValueError, match=r"moves blocks by a kernel, transfer='kernel', got 'copy'; pass compiled=False"
    ):
        tls.generate(model, prompts(30)["input_ids"], cache=copies, max_new_tokens=2, compiled=True)
    monkeypatch.setattr("flex_tls.offloaded_layer.host_bytes_available", lambda: 1000)
    with pytest.raises(
        MemoryError,
        match=r"offload: 106,496 bytes of host memory needed for .* 1 x 208 tokens in 2 layers, 1,000 avail",
    ):
        cache_for(model, EXACT)


def test_a_refused_allocation_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    cache = tls.TLSCache(model.config, SPARSE, max_len=200, offload=EXACT, backend="reference")
    tls.enable(model)
    with monkeypatch.context() as patch:
        patch.setattr("flex_tls.offloaded_layer.host_bytes_available", lambda: 1000)
        with pytest.raises(MemoryError), torch.no_grad():
            model(**prompts(90), past_key_values=cache)
    assert not any(layer.is_initialized for layer in cache.tls_layers)
    assert cache.get_seq_length() == 0
    plain = cache_for(model, None)
    assert torch.equal(generate(model, cache, prompts(90)), generate(model, plain, prompts(90)))


def test_a_closed_cache_holds_nothing_and_can_be_used_again() -> None:
    model = make("llama")
    cache = cache_for(model, tls.OffloadConfig())
    outs = []
    for _ in range(2):
        outs.append(generate(model, cache, prompts(90)))
        cache.close()
        assert not any(layer.is_initialized for layer in cache.tls_layers)
        assert cache.stats() == {}
    assert torch.equal(*outs)


def test_different_layers_may_have_different_pools() -> None:
    model = make("llama")
    cache = cache_for(model, dataclasses.replace(EXACT, gpu_blocks=(6, 9)))
    assert [layer.opened().pool.n_slots for layer in cache.offloaded_layers] == [6, 9]
    assert torch.equal(generate(model, cache, prompts(90)), generate(model, cache_for(model, None), prompts(90)))
    assert memory.host_bytes_available() is None or memory.host_bytes_available() > 0
