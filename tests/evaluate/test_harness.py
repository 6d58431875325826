"""lm-evaluation-harness with sparse decoding, next to its own dense model; not in [test], it is too heavy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import flex_tls as tls

from ..integrations.models import FULL, SPARSE, VOCAB, make, tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from flex_tls.evaluate.harness import TLSLM

MAX_LENGTH = 120


def words() -> Any:
    made = tokenizer()
    # What the model hardly ever says
    made.pad_token = made.eos_token = "q"
    return made


def harness(cfg: tls.TLSConfig | None, **options: Any) -> Any:
    """The adapter, or for None the harness's own model."""
    given = {"tokenizer": words(), "max_length": MAX_LENGTH, "device": "cpu", **options}
    if cfg is None:
        return HFLM(make(), **given)
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return TLSLM(make(), tls_backend="reference", **settings, **given)


def text(n: int, seed: int) -> str:
    ids = torch.randint(0, 26, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(chr(ord("a") + i) for i in ids)


def requests(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


QUESTIONS = [
    (text(90, 0), text(5, 1)), (text(90, 0), text(20, 2)), (text(30, 3), "b"), ("", text(9, 4)),
    (text(150, 5), text(10, 6)),
]  # fmt: skip
GENERATE = {"until": [text(1, 7) * 3], "max_gen_toks": 12, "do_sample": False}


def test_budgets_over_the_whole_context_score_as_the_harness_does() -> None:
    asked = requests("loglikelihood", *QUESTIONS)
    want, got = (harness(cfg).loglikelihood(asked, disable_tqdm=True) for cfg in (None, FULL))
    assert [x[0] for x in got] == pytest.approx([x[0] for x in want], rel=1e-4)
    assert [x[1] for x in got] == [x[1] for x in want]


def test_an_answer_that_the_model_would_give_is_greedy() -> None:
    model = harness(SPARSE)
    context = model.tok_encode(text(80, 8))
    answer = model._model_generate(torch.tensor([context]), len(context) + 6, [])[0, len(context) :].tolist()
    other = [*answer[:5], (answer[5] + 1) % VOCAB]
    found = model._loglikelihood_tokens([(None, context, answer), (None, context, other)], disable_tqdm=True)
    assert [x[1] for x in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_whole_texts_score_as_the_harness_does() -> None:
    asked = requests("loglikelihood_rolling", (text(70, 9),), (text(200, 10),))
    want, got = (harness(cfg).loglikelihood_rolling(asked, disable_tqdm=True) for cfg in (None, FULL))
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generated_texts_are_the_harness_s(batch_size: int) -> None:
    contexts = [text(60, 11), text(41, 12), text(50, 13)]
    (free,) = harness(None).generate_until(requests("generate_until", (contexts[0], GENERATE)), True)
    assert len(free) > 6
    # One that stops a text on its way
    until = {**GENERATE, "until": [free[3:6]]}
    asked = requests("generate_until", *((c, kwargs) for c in contexts for kwargs in (GENERATE, until)))
    want, got = (harness(cfg, batch_size=batch_size).generate_until(asked, True) for cfg in (None, FULL))
    assert got == want
    assert len(got[1]) < len(got[0])


def test_small_budgets_decode_sparsely_and_contexts_are_read_densely() -> None:
    model = harness(SPARSE)
    asked = requests("loglikelihood", *QUESTIONS[:2])
    got = model.loglikelihood(asked, disable_tqdm=True)
    for (score, _), (context, answer) in zip(got, QUESTIONS[:2], strict=True):
        ids = model.tok_encode(context + answer)
        cache = tls.TLSCache(model.config, SPARSE, max_len=120, backend="reference")
        n, log_p = len(model.tok_encode(context)), 0.0
        tls.enable(model.model)
        with torch.no_grad():
            model.model(torch.tensor([ids[: n - 1]]), past_key_values=cache)
            for i in range(n - 1, len(ids) - 1):
                logits = model.model(torch.tensor([[ids[i]]]), past_key_values=cache).logits[0, -1]
                log_p += float(logits.log_softmax(-1)[ids[i + 1]])
        tls.disable(model.model)
        assert score == pytest.approx(log_p, rel=1e-3)
    dense = harness(None).loglikelihood(asked, disable_tqdm=True)
    assert abs(got[1][0] - dense[1][0]) > 1e-2
    asked = requests("generate_until", *((text(90, i), GENERATE) for i in range(3)))
    sparse, full = (harness(cfg).generate_until(asked, True) for cfg in (SPARSE, None))
    assert sparse != full


def test_the_command_knows_the_model() -> None:
    assert get_model("flex_tls") is TLSLM


def test_options_of_generation_that_there_are_not_are_refused() -> None:
    asked = requests("generate_until", (text(20, 0), {**GENERATE, "num_beams": 2}))
    with pytest.raises(ValueError, match=r"gen_kwargs: expected some of min_p, .*got num_beams"):
        harness(FULL).generate_until(asked, True)
