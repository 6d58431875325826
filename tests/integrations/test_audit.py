from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flex_tls as tls
from flex_tls.attention import attend
from flex_tls.audit import Auditor, AuditStats, OnDrift, compare
from flex_tls.record import Recorder

from ..cases import Case, cases
from .models import FULL, SPARSE, VOCAB, make, prompts


def decoded(
    cfg: tls.TLSConfig, n_steps: int, every: int, on_drift: OnDrift = "report", least_mass: float = 0.9
) -> tuple[AuditStats, torch.Tensor, Recorder]:
    """Statistics, logits [B, T, V] and record of ``n_steps`` steps after 100 tokens of two rows."""
    model = make()
    tls.enable(model)
    ids = torch.randint(2, VOCAB, (2, 100 + n_steps), generator=torch.Generator().manual_seed(0))
    cache = tls.TLSCache(
        model.config, cfg, batch_size=2, max_len=200, backend="reference",
        audit_every=every, on_drift=on_drift, least_mass=least_mass,
    )  # fmt: skip
    with torch.no_grad():
        model(ids[:, :100], past_key_values=cache)
        cache.recorder = recorder = Recorder()
        logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(100, 100 + n_steps)]
    audit = cache.stats().audit
    assert audit is not None
    return audit, torch.cat(logits, dim=1), recorder


@given(cases(kinds=("lowrank", "quest", "oracle")))
def test_an_audit_is_what_its_definition_says(case: Case) -> None:
    index = case.index()
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, index.capacity_tokens - x.shape[2])) for x in (case.k, case.v))
    tokens = attend(case.q, k, v, index, case.cfg, backend="reference").tokens
    assert tokens is not None
    mass, kl, recall = compare(case.q, k, tokens, case.cfg, scale=0.25).tolist()
    masses, recalls = [], []
    group = case.q.shape[1] // case.k.shape[1]
    for b, length in enumerate(case.seq_lens.tolist()):
        for t in range(case.q.shape[2]):
            n = length - case.q.shape[2] + t + 1
            for h in range(case.k.shape[1]):
                heads = case.q[b, h * group : (h + 1) * group, t].double()
                p = (heads @ case.k[b, h, :n].double().T * 0.25).softmax(-1)
                kept = tokens.mask[b, h, t, :n]
                masses += p[:, kept].sum(-1).tolist()
                if case.cfg.group_reduce == "softmax_mean":
                    k_best = min(case.cfg.token_budget or case.cfg.block_budget, n)
                    # Ranks have 16 bits, rounded down; ties go to the lower place (docs/design.md, section 8)
                    rank = (p.mean(0).float().view(torch.int32) & -65536).view(torch.float32)
                    best = rank.sort(descending=True, stable=True).indices[:k_best]
                    recalls.append(float(kept[best].sum()) / min(k_best, int(kept.sum())))
    assert mass == pytest.approx(sum(masses) / len(masses), abs=1e-4)
    assert kl == pytest.approx(-sum(map(math.log, masses)) / len(masses), abs=1e-4)
    if recalls:
        assert recall == pytest.approx(sum(recalls) / len(recalls), abs=1e-4)


@given(st.integers(1, 5), st.integers(0, 12))
def test_every_nth_step_compares_the_next_layer(every: int, n_steps: int) -> None:
    auditor = Auditor((1, 2), every)
    asked = []
    for step in range(n_steps):
        auditor.count_step()
        asked += [(step, auditor.due)] if auditor.due is not None else []
    assert asked == [(step, 1 + turn % 2) for turn, step in enumerate(range(0, n_steps, every))]


def test_an_audited_cache_decodes_as_without_and_agrees_with_a_recorder() -> None:
    stats, logits, recorder = decoded(SPARSE, 6, every=2)
    assert stats.n_steps == 6
    assert [(a.step, a.layer) for a in stats.audits] == [(0, 1), (2, 2), (4, 1)]
    assert stats.drifted == {1: "report", 2: "report"} or stats.mean_mass > 0.9
    mass = recorder.result().kept_mass
    for audit in stats.audits:
        assert audit.mass == pytest.approx(float(mass[audit.layer][audit.step]), abs=1e-5)
        assert audit.kl >= 0
        assert 0 < audit.recall <= 1
    assert stats.mean_mass == pytest.approx(sum(a.mass for a in stats.audits) / 3)
    again, same, _ = decoded(SPARSE, 6, every=100)
    assert torch.equal(logits, same)
    assert len(again.audits) == 1


def test_drift_widens_a_layer_again_and_again() -> None:
    stats, _, recorder = decoded(SPARSE, 9, every=2, on_drift="widen", least_mass=1.0)
    assert stats.drifted == {1: "widen", 2: "widen"}
    # Layer 1 was found wanting at step 0; step 2, that of the next comparison, takes note of it
    kept = [
        [int((ids[0] < recorder.result().n_blocks).sum()) for ids in recorder.result().blocks[layer]]
        for layer in (1, 2)
    ]
    assert kept[0][:6] == [6, 6, 12, 12, 12, 12]
    assert kept[1][:5] == [6, 6, 6, 6, 12]


def test_drift_makes_a_layer_dense() -> None:
    dense = dataclasses.replace(SPARSE, dense_layers=2)
    stats, logits, recorder = decoded(SPARSE, 4, every=1, on_drift="dense", least_mass=1.0)
    assert stats.drifted == {1: "dense", 2: "dense"}
    # Each from the step on that follows its comparison
    assert [len(recorder.result().kept_mass[layer]) for layer in (1, 2)] == [1, 2]
    assert torch.isfinite(logits).all()
    assert decoded(dense, 1, every=1)[0].audits[0].layer == 2


def test_a_cache_without_audits_has_no_statistics_of_them() -> None:
    stats = tls.TLSCache(make().config, SPARSE, max_len=100).stats()
    assert (stats, stats.audit) == ({}, None)


def test_a_context_that_the_budgets_hold_needs_no_audit() -> None:
    stats, _, _ = decoded(FULL, 3, every=1)
    assert (stats.n_steps, stats.audits, stats.drifted) == (3, (), {})
    assert math.isnan(stats.mean_mass)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, steps that are traced whole and not compiled: what is compiled, other tests run."""
    if not torch.cuda.is_available():
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, options=None, **kwargs: compile_(f, backend="eager", **kwargs))


def generated(
    device: str, lens: tuple[int, ...], every: int | None, n: int, compiled: bool = True
) -> tuple[torch.Tensor, tls.TLSCache]:
    """Tokens of ``n`` steps and of the prompt's logits."""
    model, inputs = make("qwen3").to(device), {name: x.to(device) for name, x in prompts(*lens).items()}
    cache = tls.TLSCache(
        model.config, SPARSE, batch_size=len(lens), max_len=max(lens) + 20, audit_every=every,
        backend="reference" if device == "cpu" and not compiled else "auto",
    )  # fmt: skip
    out = tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=n + 1,
        compiled=compiled,
    )  # fmt: skip
    return out, cache


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("device", "lens"), [("cpu", (40,)), pytest.param("cuda", (90, 41, 7), marks=pytest.mark.cuda)]
)
def test_compiled_generation_is_audited_as_eager_generation_and_gives_the_same_tokens(
    device: str, lens: tuple[int, ...]
) -> None:
    # Interpreted kernels are slow: there the eager loop, which generates the same, stands for the compiled one
    plain, unaudited = generated(device, lens, None, 4, compiled=device == "cuda")
    out, cache = generated(device, lens, 2, 4)
    assert torch.equal(out, plain)
    assert cache.seq_lens == unaudited.seq_lens == [n + 4 for n in lens]
    for layer, other in zip(cache.tls_layers[1:], unaudited.tls_layers[1:], strict=True):
        torch.testing.assert_close(layer.buffers()[0], other.buffers()[0], rtol=1e-4, atol=1e-4)
        assert layer.index is not None
        assert layer.index.seq_lens.tolist() == cache.seq_lens
    found, want = cache.stats().audit, generated(device, lens, 2, 4, compiled=False)[1].stats().audit
    assert found is not None
    assert want is not None
    assert found.n_steps == want.n_steps == 4
    assert [(a.step, a.layer) for a in found.audits] == [(0, 1), (2, 2)]
    for one, other in zip(found.audits, want.audits, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=1e-3)
        assert 0 < one.mass < 1


@pytest.mark.usefixtures("traced")
def test_steps_that_the_budgets_hold_whole_are_counted_and_not_audited() -> None:
    stats = generated("cpu", (30,), 2, 5)[1].stats().audit
    assert stats is not None
    # Step i makes 31 + i tokens, and the budget is 32
    assert (stats.n_steps, [a.step for a in stats.audits]) == (5, [2, 4])


def test_the_compiled_loop_refuses_to_change_budgets() -> None:
    model = make()
    cache = tls.TLSCache(model.config, SPARSE, max_len=120, audit_every=4, on_drift="widen")
    with pytest.raises(ValueError, match=r"compiled: the compiled step keeps its budgets, on_drift='report', got 'w"):
        tls.generate(model, torch.ones(1, 8, dtype=torch.int64), cache=cache, max_new_tokens=2, compiled=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audit_every": 0}, "audit_every: expected at least 1 step, got 0"),
        ({"audit_every": 1, "on_drift": "panic"}, "on_drift: expected one of report, widen, dense, got 'panic'"),
        ({"audit_every": 1, "least_mass": 2.0}, "least_mass: expected a share between 0 and 1, got 2.0"),
    ],
)
def test_what_cannot_be_audited_says_why(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tls.TLSCache(make().config, SPARSE, max_len=100, **options)  # type: ignore[arg-type]
