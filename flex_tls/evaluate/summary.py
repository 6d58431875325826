"""Rows of many documents or samples as one line a method, each figure with its 95% bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import TLSConfig
from .bootstrap import Interval, grouped_interval, mean_interval, ratio_interval
from .methods import kept_tokens
from .rows import AnswerRow, AttentionRow, PplRow, Row, config_key

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class PplSummary:
    """One method over documents.

    Attributes:
        model: what was asked.
        method: its name.
        config: its configuration; None for dense.
        context_tokens: before the first scored token.
        score_tokens: scored in all documents together.
        n_documents: that were scored.
        kept_tokens: that a KV head attends to; the whole context for dense.
        kl: KL(dense || method) per token.
        perplexity: of the method.
        perplexity_ratio: to dense attention.
        agreement: top-1, with dense attention.
        index_share, read_share: bytes held and read, as in :class:`.methods.Cost`.
    """

    model: str
    method: str
    config: dict[str, Any] | None
    context_tokens: int
    score_tokens: int
    n_documents: int
    kept_tokens: int
    kl: Interval
    perplexity: float
    perplexity_ratio: Interval
    agreement: Interval
    index_share: float
    read_share: float

    @property
    def span(self) -> tuple[int, int]:
        """Tokens before the first scored one, and scored tokens of each document: what goes together has one span."""
        return self.context_tokens, self.score_tokens // self.n_documents


@dataclass(frozen=True)
class RetrievalSummary:
    """One method over the samples of one task.

    Attributes:
        kept_tokens: that a KV head attends to; the whole prompt for dense.
        score: share of the references found.
        loss: dense attention's score less this one, sample by sample; None without dense attention.
    """

    model: str
    task: str
    length_tokens: int
    depth: float | None
    method: str
    config: dict[str, Any] | None
    kept_tokens: int
    n_samples: int
    score: Interval
    loss: Interval | None


@dataclass(frozen=True)
class LossSummary:
    """One method over the tasks of one length, needles at random places or at chosen depths.

    Attributes:
        index_share, read_share: of the keys' and values' bytes, means over samples.
        tasks: those that dense attention and the method answered.
        n_samples: of all tasks together.
        dense: dense attention's score on these samples, mean of the tasks.
        score: the method's.
        loss: dense attention's score less the method's, mean of the tasks, which count alike.
    """

    model: str
    dtype: str
    length_tokens: int
    method: str
    config: dict[str, Any]
    kept_tokens: int
    index_share: float
    read_share: float
    tasks: tuple[str, ...]
    n_samples: int
    dense: Interval
    score: Interval
    loss: Interval


@dataclass(frozen=True)
class AttentionSummary:
    """One method over documents: means over sparse layers, query heads and tokens, with intervals over documents.

    Attributes:
        mass_blocks, mass_tokens, heavy_blocks, heavy_tokens, locality, missed_bound: as in :class:`.probe.Catch`; the
            last is None for an index without boxes.
        worst_layer: the one whose kept blocks hold the smallest share of the heavy tokens; ``worst_heavy_blocks``: that
            share, mean over documents.
    """

    model: str
    method: str
    config: dict[str, Any] | None
    context_tokens: int
    n_documents: int
    mass_blocks: Interval
    mass_tokens: Interval
    heavy_blocks: Interval
    heavy_tokens: Interval
    locality: Interval
    missed_bound: Interval | None
    worst_layer: int
    worst_heavy_blocks: float


def summarise_ppl(rows: Sequence[Row]) -> list[PplSummary]:
    """A line for each model, method, configuration and length, in the order of first appearance."""
    found = [row for row in rows if isinstance(row, PplRow)]
    groups = _grouped(
        found, lambda r: (r.model, r.dtype, r.method, config_key(r.config), r.context_tokens, r.score_tokens)
    )
    return [_ppl(group) for group in groups]


def summarise_retrieval(rows: Sequence[Row]) -> list[RetrievalSummary]:
    """A line for each model, task, length, depth and method, in the order of first appearance."""
    found = [row for row in rows if isinstance(row, AnswerRow)]
    dense = {(row.model, row.dtype, row.digest): row.score for row in found if row.config is None}
    groups = _grouped(
        found, lambda r: (r.model, r.dtype, r.task, r.length_tokens, r.depth, r.method, config_key(r.config))
    )
    lines = []
    for group in groups:
        first = group[0]
        pairs = [(dense.get((row.model, row.dtype, row.digest)), row.score) for row in group]
        losses = [full - score for full, score in pairs if full is not None]
        lines.append(
            RetrievalSummary(
                first.model,
                first.task,
                first.length_tokens,
                first.depth,
                first.method,
                first.config,
                _kept(first.config, first.length_tokens),
                len(group),
                mean_interval([row.score for row in group]),
                mean_interval(losses) if losses else None,
            )
        )
    return lines


def summarise_losses(
    rows: Sequence[Row], tasks: Collection[str] | None = None, *, at_depths: bool = False
) -> list[LossSummary]:
    """A line for each model, length and sparse method of retrieval, over ``tasks`` or all; by length.

    ``at_depths``: of needles at chosen depths, all depths together, instead of those at random places.
    """
    found = [
        row
        for row in rows
        if isinstance(row, AnswerRow)
        and row.eval == "retrieval"
        and (row.depth is not None) == at_depths
        and row.task in (tasks or [row.task])
    ]
    dense = {(row.model, row.dtype, row.digest): row.score for row in found if row.config is None}
    paired = [row for row in found if row.config is not None and (row.model, row.dtype, row.digest) in dense]
    lines = []
    for group in _grouped(paired, lambda r: (r.model, r.dtype, r.length_tokens, r.method, _budgets(r))):
        first = group[0]
        assert first.config is not None
        by_task = sorted(_grouped(group, lambda r: r.task), key=lambda task: task[0].task)
        full = [[dense[row.model, row.dtype, row.digest] for row in task] for task in by_task]
        lost = [[x - row.score for x, row in zip(*pair, strict=True)] for pair in zip(full, by_task, strict=True)]
        lines.append(
            LossSummary(
                first.model,
                first.dtype,
                first.length_tokens,
                first.method,
                first.config,
                _kept(first.config, first.length_tokens),
                sum(row.index_share for row in group) / len(group),
                sum(row.read_share for row in group) / len(group),
                tuple(task[0].task for task in by_task),
                len(group),
                grouped_interval(full),
                grouped_interval([[row.score for row in task] for task in by_task]),
                grouped_interval(lost),
            )
        )
    return sorted(lines, key=lambda line: line.length_tokens)


def _budgets(row: AnswerRow) -> tuple[int, int]:
    """Blocks and tokens kept; blocks beyond the prompt differ with the room that a task's answer needs."""
    assert row.config is not None
    return min(row.config["block_budget"], row.length_tokens), _kept(row.config, row.length_tokens)


def kl_ratio(rows: Sequence[Row], of: PplSummary, to: PplSummary) -> Interval:
    """KL of one line over that of another, over the documents that both have; the interval resamples them together."""
    over, under = ({row.digest: row.kl for row in rows_of(rows, line)} for line in (of, to))
    both = [digest for digest in over if digest in under]
    if not both:
        raise ValueError(f"rows: expected a document with both {of.method} and {to.method}, got none")
    return ratio_interval([over[x] for x in both], [under[x] for x in both])


def rows_of(rows: Sequence[Row], line: PplSummary) -> list[PplRow]:
    """Those that a line sums up."""
    wanted = (line.model, line.method, line.config, line.span)
    return [
        row
        for row in rows
        if isinstance(row, PplRow)
        and (row.model, row.method, row.config, (row.context_tokens, row.score_tokens)) == wanted
    ]


def summarise_attention(rows: Sequence[Row]) -> list[AttentionSummary]:
    """A line for each model, method, configuration and length, in the order of first appearance."""
    found = [row for row in rows if isinstance(row, AttentionRow)]
    groups = _grouped(found, lambda r: (r.model, r.dtype, r.method, config_key(r.config), r.context_tokens))
    return [_attention(group) for group in groups]


def _attention(rows: Sequence[AttentionRow]) -> AttentionSummary:
    first = rows[0]
    per_layer = mean_over_documents([row.heavy_blocks for row in rows]).mean(1)
    worst = int(per_layer.argmin())

    def interval(field: str) -> Interval:
        return mean_interval([float(torch.tensor(getattr(row, field)).mean()) for row in rows])

    return AttentionSummary(
        first.model,
        first.method,
        first.config,
        first.context_tokens,
        len(rows),
        interval("mass_blocks"),
        interval("mass_tokens"),
        interval("heavy_blocks"),
        interval("heavy_tokens"),
        interval("locality"),
        interval("missed_bound") if first.missed_bound else None,
        first.layers[worst],
        float(per_layer[worst]),
    )


def mean_over_documents(values: Sequence[list[list[float]]]) -> Tensor:
    """Mean [L, HQ] of equally large tables, one a document."""
    return torch.tensor(values).mean(0)


def _ppl(rows: Sequence[PplRow]) -> PplSummary:
    first = rows[0]
    nll = [row.nll for row in rows]
    return PplSummary(
        model=first.model,
        method=first.method,
        config=first.config,
        context_tokens=first.context_tokens,
        score_tokens=first.score_tokens * len(rows),
        n_documents=len(rows),
        kept_tokens=_kept(first.config, first.context_tokens),
        kl=mean_interval([row.kl for row in rows]),
        perplexity=math.exp(sum(nll) / len(nll)),
        # Documents score equally many tokens: the mean of their differences is that of all tokens
        perplexity_ratio=_exp(mean_interval([row.nll - row.nll_dense for row in rows])),
        agreement=mean_interval([row.agreement for row in rows]),
        index_share=first.index_share,
        read_share=first.read_share,
    )


def _kept(config: dict[str, Any] | None, length_tokens: int) -> int:
    return length_tokens if config is None else kept_tokens(TLSConfig(**config))


def _exp(interval: Interval) -> Interval:
    return Interval(math.exp(interval.mean), math.exp(interval.low), math.exp(interval.high))


def _grouped(rows: Sequence[AnyRow], key: Callable[[AnyRow], Hashable]) -> list[list[AnyRow]]:
    groups: dict[Hashable, list[AnyRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())
