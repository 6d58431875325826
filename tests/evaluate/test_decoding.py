from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import flex_tls as tls
from flex_tls.evaluate.methods import DENSE, Method, make_method
from flex_tls.evaluate.perplexity import score_documents
from flex_tls.evaluate.prefilled import Prefilled
from flex_tls.record import Recorder

from ..integrations.models import FULL, SPARSE, VOCAB, make

KINDS = [
    SPARSE,
    dataclasses.replace(SPARSE, dense_layers=0, label_bits=4),
    dataclasses.replace(SPARSE, index="quest", token_budget=None),
    dataclasses.replace(SPARSE, index="oracle", block_size=32, block_budget=96),
]


def documents(b: int, s: int) -> Tensor:
    return torch.randint(2, VOCAB, (b, s), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def decoded_by_the_user(cfg: tls.TLSConfig, ids: Tensor, n_prompt: int) -> Tensor:
    """Logits [B, T, V] of a cache made for ``cfg``, with a prefill of its own."""
    model = make()
    cache = tls.TLSCache(model.config, cfg, batch_size=ids.shape[0], max_len=ids.shape[1], backend="reference")
    tls.enable(model)
    model(ids[:, :n_prompt], past_key_values=cache)
    steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(n_prompt, ids.shape[1])]
    return torch.cat(steps, dim=1)


def test_methods_decode_as_if_each_had_read_the_prompt_itself() -> None:
    ids, n_prompt = documents(2, 110), 100
    prompt = Prefilled(make(), ids[:, :n_prompt], 10, "reference")
    # Twice, in turn: what one method leaves behind must not reach the next
    for cfg in [*KINDS, *KINDS[::-1]]:
        with prompt.decoding(Method("", cfg)) as step:
            logits = torch.cat([step(ids[:, i : i + 1]) for i in range(n_prompt, ids.shape[1])], dim=1)
        expected = decoded_by_the_user(cfg, ids, n_prompt)
        # Buffers of another length are split otherwise by the matrix product
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dense_decoding_is_the_models_own() -> None:
    ids, n_prompt = documents(2, 60), 50
    model = make()
    prompt = Prefilled(model, ids[:, :n_prompt], 10, "reference")
    for _ in range(2):
        with prompt.decoding(Method(DENSE, None)) as step:
            logits = torch.cat([step(ids[:, i : i + 1]) for i in range(n_prompt, 60)], dim=1)
        torch.testing.assert_close(logits, model(ids).logits[:, n_prompt:], rtol=1e-4, atol=1e-4)


def test_the_model_is_given_back_whatever_happens() -> None:
    model = make()
    before = model.config._attn_implementation
    prompt = Prefilled(model, documents(1, 60), 10, "reference")
    with pytest.raises(KeyboardInterrupt), prompt.decoding(Method("", SPARSE), Recorder()):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before
    with prompt.decoding(Method("", SPARSE)) as step:
        step(documents(1, 1))


def test_budgets_that_hold_the_context_lose_nothing() -> None:
    methods = [Method(DENSE, None), Method("ours", FULL), Method("quest", dataclasses.replace(FULL, index="quest"))]
    for _, scores in score_documents(make(), documents(3, 90), 80, methods, backend="reference"):
        for score in scores:
            assert score.kl == pytest.approx(0, abs=1e-6)
            assert score.agreement == 1
            assert score.nll == pytest.approx(score.nll_dense, abs=1e-5)


def test_the_whole_context_selected_loses_nothing() -> None:
    # One token short of the context, so that the two-level path is taken; what falls out hardly matters here
    oracle = dataclasses.replace(FULL, index="oracle", token_budget=79, block_budget=96)
    ((_, (score,)),) = score_documents(make(), documents(1, 82), 80, [Method("oracle", oracle)], backend="reference")
    assert 0 < score.kl < 1e-3


@torch.no_grad()
def test_scores_are_what_the_definitions_say() -> None:
    model, ids = make(), documents(1, 100)
    methods = [Method(DENSE, None), Method("ours", SPARSE)]
    (_, (dense,)), (_, (score,)) = score_documents(model, ids, 90, methods, backend="reference")
    p = model(ids).logits[0, 89:99].double().log_softmax(-1)
    q = decoded_by_the_user(SPARSE, ids, 89)[0, :10].double().log_softmax(-1)
    target = ids[0, 90:]
    assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert score.kl > 1e-4
    assert score.nll == pytest.approx(-float(q[torch.arange(10), target].mean()), rel=1e-3)
    assert score.nll_dense == pytest.approx(-float(p[torch.arange(10), target].mean()), rel=1e-3)
    assert score.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert dense.top1 == p.argmax(-1).tolist()
    assert dense.log_p == pytest.approx(p[torch.arange(10), target].tolist(), rel=1e-4)
    assert dense.nll == pytest.approx(score.nll_dense)
    assert (score.top1, score.log_p) == (None, None)


@pytest.mark.parametrize("name", ["dense", "ours", "quest", "h2o", "quest_double_sparsity"])
def test_steps_of_several_tokens_score_as_one_by_one(name: str) -> None:
    ids, method = documents(2, 103), make_method(name, dataclasses.replace(SPARSE, sparse_query_tokens=16), 103)
    scored = [
        next(score_documents(make(), ids, 90, [method], backend="reference", step_tokens=n))[1] for n in (1, 5, 16)
    ]
    for one, *others in zip(*scored, strict=True):
        assert method.cfg is None or one.kl > 1e-4
        for other in others:
            assert other.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-9)
            assert other.nll == pytest.approx(one.nll, rel=1e-5)
            assert other.agreement == one.agreement


def test_longer_steps_than_a_method_is_sparse_for_are_refused() -> None:
    with pytest.raises(ValueError, match=f"step_tokens: expected 1 to {SPARSE.sparse_query_tokens}, longer"):
        next(score_documents(make(), documents(1, 100), 80, [Method("ours", SPARSE)], step_tokens=20))


def test_documents_side_by_side_score_as_one_by_one() -> None:
    ids, methods = documents(3, 100), [Method("ours", SPARSE)]
    ((_, together),) = score_documents(make(), ids, 90, methods, backend="reference")
    for row, score in zip(ids, together, strict=True):
        ((_, (alone,)),) = score_documents(make(), row[None], 90, methods, backend="reference")
        assert alone.kl == pytest.approx(score.kl, rel=1e-3)
        assert alone.nll == pytest.approx(score.nll, rel=1e-4)


@pytest.mark.parametrize("context", [1, 100])
def test_something_must_be_read_and_something_scored(context: int) -> None:
    with pytest.raises(ValueError, match="context_tokens: expected 2 to 99"):
        next(score_documents(make(), documents(1, 100), context, []))


@pytest.mark.cuda
@pytest.mark.parametrize("spec", ["dense", "ours", "ours:group_reduce=softmax_max", "ours:index=box", "oracle", "h2o"])
def test_on_a_gpu_each_method_finds_a_backend_that_can_run_it(spec: str) -> None:
    """Half an ablation was lost to a method that the fused kernels do not have."""
    prompt = Prefilled(make().cuda(), documents(2, 110)[:, :100].cuda(), 10)
    method = make_method(spec, SPARSE, 100)
    assert (prompt.backend_for(method) == "triton") == (spec in ("ours", "ours:group_reduce=softmax_max"))
    with prompt.decoding(method) as step:
        assert bool(step(documents(2, 1).cuda()).isfinite().all())
