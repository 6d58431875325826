from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flex_tls.evaluate.bootstrap import grouped_interval, mean_interval, ratio_interval

values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


@given(values)
def test_an_interval_lies_inside_the_range_of_its_values(found: list[float]) -> None:
    interval = mean_interval(found, n_resamples=200)
    slack = 1e-9 * (1 + max(map(abs, found)))
    assert min(found) - slack <= interval.low <= interval.high <= max(found) + slack
    assert interval.mean == pytest.approx(sum(found) / len(found), abs=1e-9)


@given(values, st.floats(0.1, 10), st.floats(-100, 100))
def test_an_interval_moves_and_stretches_with_its_values(found: list[float], factor: float, offset: float) -> None:
    interval = mean_interval(found, n_resamples=200)
    moved = mean_interval([factor * x + offset for x in found], n_resamples=200)
    assert moved.low == pytest.approx(factor * interval.low + offset, abs=1e-6)
    assert moved.high == pytest.approx(factor * interval.high + offset, abs=1e-6)


@given(values)
def test_more_confidence_is_no_narrower(found: list[float]) -> None:
    narrow = mean_interval(found, confidence=0.5, n_resamples=200)
    wide = mean_interval(found, confidence=0.99, n_resamples=200)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@given(values)
def test_an_interval_is_the_same_in_every_call(found: list[float]) -> None:
    assert mean_interval(found, n_resamples=200) == mean_interval(found, n_resamples=200)


def test_equal_values_leave_no_doubt() -> None:
    interval = mean_interval([0.25] * 5)
    assert interval.low == interval.mean == interval.high == 0.25


def test_one_value_has_no_interval() -> None:
    interval = mean_interval([3.0])
    assert interval.mean == 3.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    draws = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    intervals = [mean_interval(row, n_resamples=1000) for row in draws.tolist()]
    share = sum(i.low <= 0 <= i.high for i in intervals) / len(intervals)
    # 40 values: the percentile bootstrap is a little too sure of itself; five standard deviations of 300 draws
    assert 0.87 < share < 0.99


@pytest.mark.parametrize(
    ("found", "confidence", "message"),
    [([], 0.95, "values: expected at least 1"), ([1.0], 1.0, "confidence: expected a share between 0 and 1, got 1.0")],
)
def test_what_makes_no_sense_is_refused(found: list[float], confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_interval(found, confidence=confidence)


def test_a_ratio_of_equal_pairs_has_no_spread() -> None:
    found = ratio_interval([1.0, 5.0, 3.0], [2.0, 10.0, 6.0])
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    spread = ratio_interval([1.0, 5.0, 3.0], [4.0, 4.0, 4.0])
    assert spread.low < spread.mean == 0.75 < spread.high
    with pytest.raises(ValueError, match="to: expected 3 values, one for each of the others, got 2"):
        ratio_interval([1.0, 5.0, 3.0], [4.0, 4.0])


@given(values)
def test_one_group_is_a_plain_mean(found: list[float]) -> None:
    grouped, plain = grouped_interval([found], n_resamples=200), mean_interval(found, n_resamples=200)
    assert grouped.mean == pytest.approx(plain.mean, abs=1e-9)
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high), abs=1e-9)


def test_groups_count_alike_and_vary_within_themselves() -> None:
    interval = grouped_interval([[1.0] * 3, [0.0, 1.0] * 20])
    assert interval.mean == 0.75
    # The first group cannot vary: half of the second one's spread is left
    alone = mean_interval([0.0, 1.0] * 20)
    assert interval.high - interval.low == pytest.approx((alone.high - alone.low) / 2, rel=0.2)
    assert math.isnan(grouped_interval([[1.0], [0.0]]).low)
    with pytest.raises(ValueError, match=r"none empty, got sizes \[1, 0\]"):
        grouped_interval([[1.0], []])
