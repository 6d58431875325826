"""transformers' automatic compilation: ``model.generate`` takes the compiled step."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import flex_tls as tls
from flex_tls.step import DecodeStep
from tests.integrations.models import SPARSE, make, prompts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of a compiled step on the CPU, whether it was sparse; on CUDA, those before its graph."""
    found = []
    run = DecodeStep.__call__

    def counted(step: DecodeStep, *args: Any) -> Tensor:
        found.append(step.sparse)
        return run(step, *args)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    return found


def enabled(device: str = "cpu") -> Any:
    model = make("qwen3").to(device)
    tls.enable(model)
    return model


def generate(model: Any, cache: tls.TLSCache, *, compiled: bool = True, n: int = 4, **inputs: Any) -> Any:
    # By itself transformers compiles on CUDA alone
    compile_config = CompileConfig()
    compile_config._compile_all_devices = True
    return model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=n, disable_compile=not compiled,
        compile_config=compile_config if compiled else None,
    )  # fmt: skip


def cache_for(model: Any, batch_size: int, cfg: tls.TLSConfig = SPARSE, **options: Any) -> tls.TLSCache:
    return tls.TLSCache(model.config, cfg, batch_size=batch_size, max_len=160, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("lens", "n"), [((90,), 3), ((30, 9), 5)])
def test_model_generate_takes_the_compiled_step(lens: tuple[int, ...], n: int, device: str, calls: list[bool]) -> None:
    """The second case, which is padded, begins dense and passes the budgets."""
    model = enabled(device)
    inputs = {name: x.to(device) for name, x in prompts(*lens).items()}
    eager, compiled = cache_for(model, len(lens), backend="reference"), cache_for(model, len(lens))
    want = generate(model, eager, compiled=False, n=n, **inputs)
    assert not calls
    got = generate(model, compiled, n=n, **inputs)
    assert torch.equal(got, want)
    assert set(calls) == ({True} if lens == (90,) else {False, True})
    assert len(calls) == n - 1 or device == "cuda"
    assert compiled.seq_lens == eager.seq_lens
    for ours, theirs in zip(compiled.tls_layers, eager.tls_layers, strict=True):
        if ours.index is not None and theirs.index is not None:
            assert ours.index.seq_lens.tolist() == theirs.index.seq_lens.tolist()
    # A turn later, and after tokens were taken back: the same buffers, the same step
    before = len(calls)
    for cache in (eager, compiled):
        cache.crop(-1)
    more = torch.cat([got[:, :-1], inputs["input_ids"][:, :5]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, inputs["attention_mask"].shape[1] :])], 1)
    again = [
        generate(model, cache, compiled=cache is compiled, n=2, input_ids=more, attention_mask=mask)
        for cache in (eager, compiled)
    ]
    assert torch.equal(*again)
    assert len(calls) > before


def test_what_a_step_does_not_give_the_model_gives(calls: list[bool]) -> None:
    model, inputs = enabled(), prompts(90)
    found = generate(model, cache_for(model, 1), n=3, output_hidden_states=True, return_dict_in_generate=True, **inputs)
    assert len(found.hidden_states) == 3
    assert not calls
    scored = generate(model, cache_for(model, 1), n=3, output_logits=True, return_dict_in_generate=True, **inputs)
    eager = generate(model, cache_for(model, 1), n=3, output_logits=True, return_dict_in_generate=True,
                     compiled=False, **inputs)  # fmt: skip
    assert len(calls) == 2
    # Kept from step to step, though a step overwrites its own
    torch.testing.assert_close(torch.stack(scored.logits), torch.stack(eager.logits), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_compiled_runs_as_before(calls: list[bool]) -> None:
    inputs = prompts(90)
    model = enabled()
    other = dataclasses.replace(SPARSE, index="box")
    for options in ({"backend": "reference"}, {"cfg": other}, {"audit_every": 4, "on_drift": "widen"}):
        want = generate(model, cache_for(model, 1, **options), compiled=False, **inputs)
        assert torch.equal(generate(model, cache_for(model, 1, **options), **inputs), want)
        allocated = cache_for(model, 1, dtype=torch.float32, device="cpu", **options)
        assert not allocated.is_compileable
    assert cache_for(model, 1, dtype=torch.float32, device="cpu").is_compileable
    assert not calls


@pytest.mark.parametrize("device", DEVICES)
def test_an_audited_cache_is_compiled_and_audited(device: str) -> None:
    model = enabled(device)
    inputs = {name: x.to(device) for name, x in prompts(90).items()}
    eager = cache_for(model, 1, backend="reference", audit_every=2)
    compiled = cache_for(model, 1, audit_every=2)
    want = generate(model, eager, compiled=False, n=5, **inputs)
    assert torch.equal(generate(model, compiled, n=5, **inputs), want)
    found, theirs = (cache.stats().audit.audits for cache in (compiled, eager))
    assert [(x.step, x.layer) for x in found] == [(x.step, x.layer) for x in theirs] != []
    torch.testing.assert_close([x.mass for x in found], [x.mass for x in theirs], rtol=1e-3, atol=1e-3)


def test_other_positions_are_the_model_s_own(calls: list[bool]) -> None:
    model, inputs = enabled(), prompts(90)
    positions = torch.arange(90)[None] * 3
    want, got = (
        generate(model, cache_for(model, 1), compiled=compiled, n=3, position_ids=positions, **inputs)
        for compiled in (False, True)
    )
    assert torch.equal(got, want)
    assert not calls


@pytest.mark.parametrize("lens", [(1,), (60, 0)], ids=["one token in chunks", "a row without tokens"])
def test_a_row_without_tokens_begins_by_the_model_s_own_forward(lens: tuple[int, ...], calls: list[bool]) -> None:
    model = enabled()
    inputs = {name: x[:, -max(lens) :] for name, x in prompts(*lens).items()}
    want, got = (
        generate(
            model, cache_for(model, len(lens), backend="auto" if compiled else "reference"), compiled=compiled, n=4,
            prefill_chunk_size=None if len(lens) > 1 else 8, **inputs,
        )
        for compiled in (False, True)
    )  # fmt: skip
    assert torch.equal(got, want)
    # transformers counts the positions of a row of padding from elsewhere: it stays with the model's own forward
    assert bool(calls) == (len(lens) == 1)


def test_a_copied_cache_compiles_its_own_steps() -> None:
    model, inputs = enabled(), prompts(40)
    cache = cache_for(model, 1)
    generate(model, cache, n=2, **inputs)
    assert cache.compiled_steps
    assert not copy.deepcopy(cache).compiled_steps


def test_an_enabled_model_is_freed_and_copied_as_any_other() -> None:
    model = enabled()
    twin = copy.deepcopy(model)
    assert twin.get_compiled_call(None).model is twin
    seen = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()


def test_the_decoder_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one that generates .* got Qwen3Model; enable the whole model"):
        tls.enable(make("qwen3").base_model)


def test_a_full_cache_says_so() -> None:
    model, inputs = enabled(), prompts(90)
    cache = tls.TLSCache(model.config, SPARSE, max_len=92)
    with pytest.raises(ValueError, match="max_len: expected room for 93 tokens"):
        generate(model, cache, **inputs)


@pytest.mark.parametrize("policy", ["exact", "async"])
@pytest.mark.parametrize("device", DEVICES)
def test_offloaded_caches_are_compiled_too(policy: Any, device: str, calls: list[bool]) -> None:
    model = enabled(device)
    inputs = {name: x.to(device) for name, x in prompts(90).items()}

    def cache() -> tls.TLSCache:
        return cache_for(model, 1, offload=tls.OffloadConfig(policy=policy))

    want = generate(model, cache(), compiled=False, **inputs)
    offloaded = cache()
    assert torch.equal(generate(model, offloaded, **inputs), want)
    assert calls
    offloaded.close()


def test_disable_gives_the_model_its_own_compilation_back() -> None:
    model = make("qwen3")
    own = {name: getattr(model, name, None) for name in ("get_compiled_call", "create_masks_for_generate")}
    tls.enable(model)
    assert isinstance(model.get_compiled_call(None), tls.integrations.automatic.CompiledForward)
    tls.disable(model)
    assert {name: getattr(model, name, None) for name in own} == own
