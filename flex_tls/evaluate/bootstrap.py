"""Confidence intervals by resampling whole documents or samples, which are independent; tokens of one text are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval, ``low <= mean <= high`` up to skew of the resamples."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of ``values``, one a document, and the percentiles of the means of resamples; the same in every call.

    One value says nothing of its spread: its interval has no ends (NaN).

    Source: B. Efron, Bootstrap Methods: Another Look at the Jackknife, 1979.
    """
    return ratio_interval(values, [1.0] * len(values), confidence=confidence, n_resamples=n_resamples, seed=seed)


def ratio_interval(
    values: Sequence[float],
    to: Sequence[float],
    *,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values`` over the mean of ``to``, pair by pair of one document each, and its percentiles."""
    if not values:
        raise ValueError("values: expected at least 1, got none")
    if len(values) != len(to):
        raise ValueError(f"to: expected {len(values)} values, one for each of the others, got {len(to)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    sample = torch.tensor([values, to], dtype=torch.float64)
    over, under = sample.mean(1)
    mean = float(over / under)
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (n_resamples, len(values)), generator=generator)
    over, under = sample[:, drawn].mean(-1)
    tail = (1 - confidence) / 2
    low, high = (float((over / under).quantile(q)) for q in (tail, 1 - tail))
    return Interval(mean, low, high)
