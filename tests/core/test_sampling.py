from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flex_tls import Sampling

UNIT = st.floats(0.05, 1.0)


def scores(seed: int, b: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, 4], logits [B, V], and which tokens occur in the ids, bool [B, V]."""
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, v, generator=gen) * 3
    ids = torch.randint(0, v, (b, 4), generator=gen)
    return ids, logits, torch.zeros(b, v, dtype=torch.bool).scatter(1, ids, True)


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 60), st.floats(0.2, 3), st.none() | st.integers(1, 80),
    st.none() | UNIT, st.none() | UNIT, st.sampled_from((1.0, 0.7, 1.3)),
)  # fmt: skip
def test_filters_are_transformers(
    seed: int, b: int, v: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
    penalty: float,
) -> None:  # fmt: skip
    ids, logits, seen = scores(seed, b, v)
    oracle = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        oracle.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        oracle.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        oracle.append(MinPLogitsWarper(min_p))
    got = Sampling(temperature, top_k, top_p, min_p, penalty).filtered(logits, seen)
    assert torch.equal(got, oracle(ids, logits.clone()))


@pytest.mark.parametrize(
    ("sampling", "processor"),
    [
        (Sampling(temperature=0.7), TemperatureLogitsWarper(0.7)),
        (Sampling(temperature=1.0, top_k=5), TopKLogitsWarper(5)),
        (Sampling(temperature=1.0, top_p=0.6), TopPLogitsWarper(0.6)),
        (Sampling(temperature=1.0, min_p=0.2), MinPLogitsWarper(0.2)),
        (Sampling(repetition_penalty=1.4), RepetitionPenaltyLogitsProcessor(1.4)),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "repetition_penalty"],
)
@given(st.integers(0, 10**6))
def test_each_setting_alone_is_its_processor(sampling: Sampling, processor: Any, seed: int) -> None:
    ids, logits, seen = scores(seed, 2, 40)
    got = sampling.filtered(logits, seen)
    assert torch.equal(got, processor(ids, logits.clone()))
    assert not torch.equal(got, logits)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20000, 4)
    sampling = Sampling(temperature=1.0)
    drawn = sampling.draw(logits, generator=torch.Generator().manual_seed(0))
    again = sampling.draw(logits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (share - torch.tensor([0.5, 0.25, 0.125, 0.125])).abs().max() < 0.02
    assert (sampling.draw(torch.tensor([[0.0, 1.0], [3.0, -torch.inf]]).repeat(50, 1))[1::2] == 0).all()


def test_greedy_takes_the_best_and_a_penalty_counts() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert Sampling().draw(logits, seen).item() == 0
    assert Sampling(repetition_penalty=1.5).draw(logits, seen).item() == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"temperature": -1.0}, "temperature: expected at least 0"),
        ({"temperature": float("nan")}, "temperature: expected at least 0"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, "top_p: expected a probability"),
        ({"min_p": 1.5}, "min_p: expected a probability"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0"),
    ],
)
def test_values_out_of_range(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sampling(**arguments)  # type: ignore[arg-type]
