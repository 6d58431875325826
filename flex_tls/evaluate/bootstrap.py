"""Confidence intervals by resampling whole documents or samples, which are independent; tokens of one text are not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    return _ratio_interval(tuple(values), tuple(to), confidence, n_resamples, seed)


# A report asks for the same lines in every section
@functools.lru_cache(maxsize=16384)
def _ratio_interval(
    values: tuple[float, ...], to: tuple[float, ...], confidence: float, n_resamples: int, seed: int
) -> Interval:
    sample = torch.tensor([values, to], dtype=torch.float64)
    over, under = sample.mean(1)
    mean = float(over / under)
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    over, under = sample[:, _drawn(len(values), n_resamples, seed)].mean(-1)
    return _percentiles(mean, over / under, confidence)


@functools.lru_cache(maxsize=16)
def _drawn(n: int, n_resamples: int, seed: int) -> Tensor:
    """Places drawn with replacement, int64 [n_resamples, n]."""
    return torch.randint(n, (n_resamples, n), generator=torch.Generator().manual_seed(seed))


def grouped_interval(
    groups: Sequence[Sequence[float]], *, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of the means of ``groups``, which count alike; samples are drawn again within each group."""
    if not groups or not all(groups):
        raise ValueError(f"groups: expected at least 1, none empty, got sizes {[len(group) for group in groups]}")
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.tensor(group, dtype=torch.float64) for group in groups]
    mean = float(torch.stack([sample.mean() for sample in samples]).mean())
    if max(map(len, groups)) == 1:
        return Interval(mean, float("nan"), float("nan"))
    drawn = [x[torch.randint(len(x), (n_resamples, len(x)), generator=generator)].mean(-1) for x in samples]
    return _percentiles(mean, torch.stack(drawn).mean(0), confidence)


def _percentiles(mean: float, drawn: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = (float(drawn.quantile(q)) for q in (tail, 1 - tail))
    return Interval(mean, low, high)
