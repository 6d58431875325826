"""A model's cache with its keys and values in host memory, against the cache that holds them on the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flex_tls.offload import memory
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import BackendUnavailable
from tests.integrations.models import FAMILIES, SPARSE, make, prompts
from tests.integrations.offloaded import cache_for, plain_cache_for

pytestmark = pytest.mark.usefixtures("no_block_is_in_two_places")

EXACT = tls.OffloadConfig(policy="exact")
MINIMUM = tls.OffloadConfig(policy="exact", gpu_blocks=6)
INT8 = dataclasses.replace(MINIMUM, store_dtype="int8")
FULL_ATTENTION = [family for family in FAMILIES if family != "mistral, window"]


def generate(model: Any, cache: tls.TLSCache, inputs: dict[str, Tensor], n: int = 12) -> Tensor:
    return tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=n,
        compiled=False,
    )  # fmt: skip


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


@pytest.mark.parametrize(
    ("change", "needed", "what"),
    [
        (copy.deepcopy, "53,248", "a copy of the cache"),
        (lambda cache: cache.batch_repeat_interleave(2), "159,744", "a batch of 2 rows"),
    ],
    ids=["copy", "more rows"],
)
def test_more_rows_than_the_host_can_hold_are_refused_and_the_cache_goes_on(
    change: Callable[[tls.TLSCache], Any], needed: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    tls.enable(model)
    logits = []
    for refused in (False, True):
        cache = cache_for(model, EXACT)
        with torch.no_grad():
            model(**prompts(90), past_key_values=cache)
            if refused:
                with monkeypatch.context() as patch:
                    for module in ("offload.engine", "offloaded_layer"):
                        patch.setattr(f"flex_tls.{module}.host_bytes_available", lambda: 50_000)
                    with pytest.raises(
                        MemoryError, match=f"offload: {needed} bytes of host memory needed for {what}, 50,000 available"
                    ):
                        change(cache)
            logits.append(model(torch.tensor([[5]]), past_key_values=cache).logits)
    assert torch.equal(*logits)


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
    with pytest.raises(ValueError, match=r"sparse_from_tokens: expected 0 with offload, got 500; dense attention"):
        cache_for(model, EXACT, cfg=dataclasses.replace(SPARSE, sparse_from_tokens=500))
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


@pytest.mark.parametrize(("store_dtype", "gpu_bytes", "n_slots"), [("model", 70_000, 8), ("int8", 30_000, 11)])
def test_slots_are_as_many_as_their_bytes_allow(store_dtype: Any, gpu_bytes: int, n_slots: int) -> None:
    cache = cache_for(make("llama"), tls.OffloadConfig(gpu_bytes=gpu_bytes, store_dtype=store_dtype))
    pools = [layer.opened().pool for layer in cache.offloaded_layers]
    assert [pool.n_slots for pool in pools] == [n_slots] * 2
    held = sum(part.nbytes for pool in pools for part in pool.parts)
    assert held <= gpu_bytes < held / n_slots * (n_slots + 1)


def test_pools_balanced_by_what_a_cache_missed_hold_as_much_and_serve_the_next() -> None:
    model = make("llama")
    cache = cache_for(model, dataclasses.replace(EXACT, gpu_blocks=(6, 9)))
    with pytest.raises(ValueError, match="balanced_gpu_blocks: expected a cache with offload that has decoded, got"):
        cache.balanced_gpu_blocks()
    want = generate(model, cache, prompts(90))
    sizes = cache.balanced_gpu_blocks()
    assert sum(sizes) == 6 + 9
    assert min(sizes) >= 6
    again = cache_for(model, dataclasses.replace(EXACT, gpu_blocks=sizes))
    assert torch.equal(generate(model, again, prompts(90)), want)


def test_a_cache_without_offload_has_no_pools_to_balance() -> None:
    with pytest.raises(ValueError, match="expected a cache with offload"):
        cache_for(make("llama"), None).balanced_gpu_blocks()
