"""Tokens checked several at a time are those decoded one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flex_tls as tls
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
