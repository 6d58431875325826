"""What is explained is what runs."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

import flex_tls as tls
from flex_tls import attention, cache_layer, device, explanation, fused
from tests.integrations.models import SPARSE, make, prompts

WINDOWED = "qwen2, some windows"


def cache_for(model: Any, **options: Any) -> tls.TLSCache:
    return tls.TLSCache(model.config, SPARSE, **{"max_len": 160, **options})


@pytest.mark.parametrize("family", ["qwen3", WINDOWED])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("length", [20, 36, 90])
def test_the_attention_that_runs_is_the_one_explained(
    family: str, backend: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(family)
    cache = cache_for(model, backend=backend)
    ran: list[str] = []

    def sdpa(*args: Any, **kwargs: Any) -> Any:
        ran.append("sdpa")
        return dense(*args, **kwargs)

    def resolved(*args: Any) -> Any:
        # Chosen as ever, but computed by the oracle: nothing is compiled here
        ran.append(resolve(*args))
        return "reference"

    tls.enable(model)
    with torch.no_grad():
        model(**prompts(length), past_key_values=cache)
        explained = tls.explain(model, cache)
        dense, resolve = cache_layer.dense_attention, attention.resolve_backend
        monkeypatch.setattr(cache_layer, "dense_attention", sdpa)
        monkeypatch.setattr(attention, "resolve_backend", resolved)
        model(prompts(1)["input_ids"], past_key_values=cache)
    assert explained.context_tokens == length + 1
    assert [plan.backend for plan in explained.plans for _ in plan.layers] == ran
    assert [layer for plan in explained.plans for layer in plan.layers] == [0, 1, 2]


def test_the_text_says_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "why_not_here", lambda device: None)
    model = make(WINDOWED)
    text = str(tls.explain(model, cache_for(model), context_tokens=36))
    assert "compiled: the compiled step has no sliding windows" in text
    assert "0       full       -             36      -        sdpa" in text
    assert "dense_layers=1: this layer stays dense" in text
    assert "36 tokens in sight, the budgets hold 32" in text
    assert "not triton" not in text
    model = make("qwen3")
    monkeypatch.setattr(explanation, "why_not_compiled", lambda cache, device: None)
    explained = tls.explain(model, cache_for(model))
    assert [plan.layers for plan in explained.plans] == [(0,), (1, 2)]
    index = f"{explained.index_nbytes / 2e6:.2f} MB"
    assert f"1-2     two-level  48            32      {index}" in str(explained)
    assert "compiled: one graph a step, by tls.generate and model.generate" in str(explained)
    assert (explained.kv_nbytes, explained.index_nbytes) == (3 * 2 * 2 * 160 * 16 * 4, cache_for(model).index_nbytes)


@pytest.mark.parametrize("index", ["lowrank", "box"])
def test_each_layer_s_index_bytes_and_block_budget_are_what_it_has(index: Any) -> None:
    model = make("llama")
    cfg = dataclasses.replace(SPARSE, index=index, block_shares=(1.0, 1.0, 2.0))
    cache = tls.TLSCache(model.config, cfg, max_len=160, dtype=torch.float32, device="cpu")
    plans = tls.explain(model, cache).plans
    assert [(plan.layers, plan.block_budget) for plan in plans] == [((0,), None), ((1,), 48), ((2,), 96)]
    held = [0 if layer.index is None else layer.index.nbytes for layer in cache.tls_layers]
    assert held[1] > 0
    assert [plan.index_nbytes for plan in plans] == held


def test_a_backend_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INSTALLED", False)
    model = make("llama")
    explained = tls.explain(model, cache_for(model, backend="triton"))
    assert [plan.backend for plan in explained.plans] == ["sdpa", None]
    assert "triton is not installed" in explained.plans[1].why
    assert explained.why_not_compiled == "triton is not installed; pip install triton"


@pytest.mark.parametrize(
    ("device", "transfer", "path"),
    [
        ("cuda", "kernel", "one kernel reads the pinned host memory (transfer='kernel')"),
        ("cuda", "copy", "a copy a block, for which each step waits (transfer='copy')"),
        ("cpu", "copy", "copies by the host, as always on a CPU"),
    ],
)
def test_how_blocks_travel_is_said(device: str, transfer: Any, path: str) -> None:
    model = make("llama")
    explained = tls.explain(model, cache_for(model, offload=tls.OffloadConfig(policy="corrected", transfer=transfer)))
    text = str(replace(explained, device=torch.device(device)))
    assert f"offload: policy 'corrected'; blocks travel by {path}" in text.splitlines()
    assert "offload" not in tls.explain(model, cache_for(model)).facts


def test_kernels_that_are_named_exist() -> None:
    ours = (explanation.FUSED, *explanation.OFFLOAD, explanation.APPEND, explanation.ATTEND_ALL)
    for name in {*ours, explanation.STAMP, explanation.ATTEND_ARRIVED}:
        assert importlib.util.find_spec(f"flex_tls.kernels.{name}") is not None, name


def test_errors_say_what_to_do() -> None:
    cache = cache_for(make("llama"))
    with pytest.raises(ValueError, match="cache: expected one made for this qwen3"):
        tls.explain(make("qwen3"), cache)
    with pytest.raises(ValueError, match=r"context_tokens: expected 1 to 160, the cache's max_len, got 161"):
        tls.explain(make("llama"), cache, context_tokens=161)


@pytest.mark.parametrize(("policy", "last"), [("async", "two_level"), ("exact", "attend_arrived")])
def test_what_a_step_over_a_pool_runs(policy: Any, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(explanation, "why_not_compiled", lambda *_: None)
    model = make("qwen3")
    cache = cache_for(model, offload=tls.OffloadConfig(policy=policy))
    kernels = [plan.kernels for plan in tls.explain(model, cache, context_tokens=90).plans if plan.sparse]
    assert kernels
    for each in kernels:
        assert each[:4] == ("append", "two_level", "plan_residency", "fetch_blocks")
        assert each[-1] == last
