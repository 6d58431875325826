"""Tokens checked several at a time are those decoded one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flex_tls as tls
from tests.integrations import offloaded
from tests.integrations.models import FULL, SPARSE, make, prompts


def repetitive(n: int = 97, *, ends_new: bool) -> torch.Tensor:
    """A prompt int64 [1, n] that repeats itself, so that drafts are found. ``ends_new``: but for its last token."""
    ids = prompts(30)["input_ids"].repeat(1, 4)[:, :n]
    if ends_new:
        ids[ids == 95] = 94
        ids[:, -1] = 95
    return ids


def cache_for(model: Any, cfg: tls.TLSConfig) -> tls.TLSCache:
    return tls.TLSCache(model.config, cfg, max_len=180, backend="reference")


def lengths_of_forwards(model: Any) -> list[int]:
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2, some windows"])
@pytest.mark.parametrize("cfg", [FULL, SPARSE], ids=["full", "sparse"])
def test_assisted_generation_gives_the_tokens_of_plain_greedy(family: str, cfg: tls.TLSConfig) -> None:
    """Sparse only where no drafts come with the prompt, which attends densely: see docs/design.md."""
    model = make(family)
    ids = repetitive(ends_new=cfg is SPARSE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 25, "do_sample": False}
    tls.enable(model)
    plain, assisted = cache_for(model, cfg), cache_for(model, cfg)
    want = model.generate(**inputs, past_key_values=plain)
    forwards = lengths_of_forwards(model)
    got = model.generate(**inputs, past_key_values=assisted, prompt_lookup_num_tokens=6)
    assert torch.equal(got, want)
    assert assisted.seq_lens == plain.seq_lens
    # Drafts were checked, and most of them dropped: random weights do not repeat what they read
    assert max(forwards[1:]) == 7


@pytest.mark.parametrize("sampling", [None, tls.Sampling(temperature=0.05, repetition_penalty=0.8)])
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(sampling: tls.Sampling | None) -> None:
    model, ids = make("qwen3"), repetitive(ends_new=False)
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 0, "compiled": False}
    plain, drafted = cache_for(model, SPARSE), cache_for(model, SPARSE)
    want = tls.generate(model, ids, cache=plain, **options)
    forwards = lengths_of_forwards(model)
    got = tls.generate(model, ids, cache=drafted, prompt_lookup_tokens=6, **options)
    assert torch.equal(got, want)
    assert drafted.seq_lens == plain.seq_lens
    assert len(forwards) < 40
    assert max(forwards[1:]) > 1
    # A stop token in the midst of accepted drafts ends the row there, and the cache with it
    stop = int(want[0, 97 + 20])
    for cache in (plain, drafted):
        cache.reset()
    options |= {"stop_token_ids": stop}
    want = tls.generate(model, ids, cache=plain, **options)
    assert torch.equal(tls.generate(model, ids, cache=drafted, prompt_lookup_tokens=6, **options), want)
    assert drafted.seq_lens == plain.seq_lens == [want.shape[1] - 1]


def test_drafts_do_not_pass_the_last_token() -> None:
    """As many tokens as asked for, in a cache that holds no more."""
    model, ids = make("qwen3"), repetitive(ends_new=False)
    outs = []
    for n in range(1, 13):
        cache = tls.TLSCache(model.config, SPARSE, max_len=97 + n, backend="reference")
        outs.append(tls.generate(model, ids, cache=cache, max_new_tokens=n, compiled=False, prompt_lookup_tokens=6)[0])
    for n, out in enumerate(outs, 1):
        assert torch.equal(out, outs[-1][: 97 + n])
        assert out.shape == (97 + n,)


# Six slots: what seven query tokens select together does not fit
POOL = {"gpu_blocks": 6}


def decoded(model: Any, cache: tls.TLSCache, way: str, n: int = 25) -> tuple[torch.Tensor, list[int]]:
    """(tokens after ``n`` are decoded greedily, lengths of the forwards): "plain", "lookup" or "assisted"."""
    ids = repetitive(ends_new=True)
    forwards = lengths_of_forwards(model)
    if way == "assisted":
        tls.enable(model)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
            past_key_values=cache, prompt_lookup_num_tokens=6,
        )  # fmt: skip
    else:
        drafts = 6 if way == "lookup" else 0
        out = tls.generate(model, ids, cache=cache, max_new_tokens=n, compiled=False, prompt_lookup_tokens=drafts)
    return out, forwards


def check_engines(cache: tls.TLSCache) -> None:
    """Every token that was kept has reached the host, and no other counts."""
    n = cache.seq_lens[0]
    assert cache.offloaded_layers
    for layer in cache.offloaded_layers:
        engine = layer.opened()
        engine.join()
        engine.check_integrity()
        assert bool(engine.store.keys[0, :, :n].abs().sum(-1).gt(0).all())
        assert layer.index is not None
        assert layer.index.seq_lens.tolist() == [n]


@pytest.mark.usefixtures("no_block_is_in_two_places")
@pytest.mark.parametrize("way", ["lookup", "assisted"])
@pytest.mark.parametrize("cfg", [FULL, SPARSE], ids=["full", "sparse"])
def test_exact_offload_speculates_the_tokens_of_plain_decoding(cfg: tls.TLSConfig, way: str) -> None:
    """Chunks of several tokens, most of them cropped, over the smallest pool."""
    offload = tls.OffloadConfig(policy="exact", **(POOL if cfg is SPARSE else {}))
    model = make("qwen3")
    plain, drafted = (offloaded.cache_for(model, x, cfg=cfg) for x in (None, offload))
    want, _ = decoded(model, plain, "plain")
    got, forwards = decoded(model, drafted, way)
    assert torch.equal(got, want)
    assert drafted.seq_lens == plain.seq_lens
    assert max(forwards[1:]) == 7
    assert sum(forwards[1:]) > 25, "no draft was dropped"
    check_engines(drafted)


@pytest.mark.usefixtures("no_block_is_in_two_places")
@pytest.mark.parametrize("way", ["lookup", "assisted"])
@pytest.mark.parametrize("policy", ["async", "corrected"])
def test_offload_that_leaves_blocks_out_speculates_as_many_tokens(policy: Any, way: str) -> None:
    """Which tokens depends on what has arrived."""
    model = make("qwen3")
    cache = offloaded.cache_for(model, tls.OffloadConfig(policy=policy, **POOL))
    out, forwards = decoded(model, cache, way)
    assert out.shape == (1, 97 + 25)
    assert cache.seq_lens == [97 + 24]
    assert max(forwards[1:]) == 7
    check_engines(cache)


def test_errors_say_what_to_do() -> None:
    model, ids = make("llama"), repetitive(ends_new=False)
    cache = cache_for(model, SPARSE)
    for n in (-1, 16):
        with pytest.raises(ValueError, match=f"prompt_lookup_tokens: expected 0 to 15, .* got {n}"):
            tls.generate(model, ids, cache=cache, max_new_tokens=4, prompt_lookup_tokens=n)
    with pytest.raises(ValueError, match="compiled: prompt lookup is not compiled; pass compiled=False"):
        tls.generate(model, ids, cache=cache, max_new_tokens=4, prompt_lookup_tokens=4, compiled=True)
    two = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=180)
    with pytest.raises(ValueError, match="prompt_lookup_tokens: expected a cache of one row, got batch_size=2"):
        tls.generate(model, ids.repeat(2, 1), cache=two, max_new_tokens=4, prompt_lookup_tokens=4)
