"""Rules that share a budget out among the KV heads of a layer or of the model, or among queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from torch import Tensor

from flex_tls import TLSConfig, selection
from flex_tls.index import KVIndex
from flex_tls.selection import BlockSelection, reduce_group

BUDGETS = tuple(
    f"{level}:{by}:{within}:{when}"
    for level in ("blocks", "tokens")
    for by in ("share", "value")
    for within in ("layer", "model")
    for when in ("prompt", "query")
)
# The KV heads of a layer alike: what a budget for each layer gives
BY_LAYER = ("blocks:share:layers:prompt", "blocks:value:layers:prompt")


@dataclass(frozen=True)
class Rule:
    """How a budget is shared out, at an equal total.

    Attributes:
        level: whose budget, level 1's in blocks or level 2's in tokens.
        by: up to where the best are kept: until they hold a "share" of the estimated attention, or down to a "value" of
            it. Tokens' shares are of what sinks and recent window leave.
        within: where totals are equal and one threshold holds, each "layer" or the whole "model"; "layers" is the model
            too, with one count for all KV heads of a layer.
        when: what the threshold decides: counts of each KV head, their means over the prompt's last queries ("prompt");
            or each "query"'s count, so that totals are equal on average, if decoding resembles these queries.
        most: times the uniform budget that a head or a query gets at most.
    """

    level: Literal["blocks", "tokens"]
    by: Literal["share", "value"]
    within: Literal["layer", "layers", "model"]
    when: Literal["prompt", "query"]
    most: int = 4

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``"blocks:share:model:query"``, and ``":x2"`` behind it for ``most``."""
        rule, _, most = text.partition(":x")
        known = (*BUDGETS, *BY_LAYER)
        if rule not in known or not (most or "4").isdigit():
            raise ValueError(f"rule: expected one of {', '.join(known)}, with :x2 if wanted, got {text!r}")
        level, by, within, when = cast(tuple[Any, Any, Any, Any], rule.split(":"))
        return cls(level, by, within, when, int(most or 4))


def share_out(weights: Tensor, total: int, least: int, most: int) -> Tensor:
    """Int64 of ``weights``' shape [H]: proportional to them where ``least`` and ``most`` leave it, ``total`` in sum."""
    n = weights.numel()
    if not n * least <= total <= n * most:
        raise ValueError(f"total: expected {n * least} to {n * most}, {n} times {least} to {most}, got {total}")
    weights = weights.double().clamp_min(1e-9)
    low, high = 0.0, most / float(weights.min())
    for _ in range(100):
        factor = (low + high) / 2
        low, high = (factor, high) if float((weights * factor).clamp(least, most).sum()) < total else (low, factor)
    exact = (weights * high).clamp(least, most)
    whole = exact.floor().long()
    # What rounding down took goes to the largest remainders
    order = (exact - whole).sort(descending=True, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def needs(rank: Tensor, mass: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """(thresholds above which each place is kept, ascending, of ranks in order; that order): [..., N].

    rank [..., N]: +inf where something is always kept, -inf where never. mass [..., N]: its estimated attention.
    """
    best, order = rank.sort(dim=-1, descending=True, stable=True)
    mass = mass.gather(-1, order)
    if by == "value":
        need = -mass
    else:
        need = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(best.isfinite(), need, -best), order


def kept_counts(need: Tensor, threshold: float, least: int, most: int) -> Tensor:
    """Int64 [...]: places of need [..., N] that a threshold keeps."""
    return (need < threshold).sum(-1).clamp(least, most)


def threshold_for(need: Tensor, mean: float, least: int, most: int) -> float:
    """The least threshold that keeps ``mean`` places or more on average."""
    finite = need[need.isfinite()]
    low, high = float(finite.min()), float(finite.max()) + 1e-6
    for _ in range(60):
        middle = (low + high) / 2
        enough = float(kept_counts(need, middle, least, most).double().mean()) >= mean
        low, high = (low, middle) if enough else (middle, high)
    return high


class Sharing:
    """A rule at work on the layers of one prompt, in place of ``keep_blocks`` and ``keep_best``.

    Args:
        rule: what is shared out, and how.
        cfg: the uniform budgets.
        indices: of the sparse layers.
        queries: [B, HQ, T, D] of each, the last that it has seen.
    """

    def __init__(self, rule: Rule, cfg: TLSConfig, indices: Sequence[KVIndex], queries: Sequence[Tensor]) -> None:
        self.rule = rule
        self._blocks, self._best = selection.keep_blocks, selection.keep_best
        self._layer = 0
        self._layers = {id(each): i for i, each in enumerate(indices)}
        assert cfg.token_budget is not None
        if rule.level == "blocks":
            # Level 2 finds its budget in every head, be the newest block all but empty
            self.budget = cfg.kept_blocks
            self.least = max(cfg.forced_blocks, -(-cfg.token_budget // cfg.block_size) + 1)
            self.most = min(rule.most * self.budget, indices[0].n_blocks)
        else:
            self.budget, self.least = cfg.token_budget, cfg.sink_tokens + cfg.recent_tokens
            self.most = min(rule.most * self.budget, cfg.kept_blocks * cfg.block_size)
        self._noted: list[Tensor] = []
        self._is_ready = False
        with self.patched():
            for each, q in zip(indices, queries, strict=True):
                selection.select(q, each, cfg, None, None, None)
        # Layer by layer: L, B, HKV, T, N
        need = torch.stack(self._noted)
        groups = list(need[:, None]) if rule.within == "layer" else [need]
        limits = [threshold_for(x, self.budget, self.least, self.most) for x in groups]
        self.thresholds = limits * (len(need) // len(limits))
        means = [
            kept_counts(x, limit, self.least, self.most).double().mean((1, 3))
            for x, limit in zip(groups, limits, strict=True)
        ]
        if rule.within == "layers":
            means = [x.mean(1, keepdim=True) for x in means]
        shared = [share_out(x.flatten(), x.numel() * self.budget, self.least, self.most).view_as(x) for x in means]
        # Places of every layer's KV heads, L times HKV
        self.counts = torch.cat(shared).expand(-1, need.shape[2])
        self._is_ready = True

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Selections go by the rule inside."""
        with (
            patch.object(selection, "keep_blocks", self.keep_blocks),
            patch.object(selection, "keep_best", self.keep_best),
        ):
            yield

    def keep_blocks(self, scores: Tensor, index: KVIndex, cfg: TLSConfig) -> BlockSelection:
        """As :func:`flex_tls.selection.keep_blocks`."""
        self._layer = self._layers[id(index)]
        if self.rule.level == "tokens":
            return self._blocks(scores, index, cfg)
        group, n = scores.shape[2], scores.shape[4]
        kept = self._keep(selection.block_ranks(scores, index, cfg), reduce_group(scores, cfg).clamp_min(0.0))
        counts = kept.sum(-1)
        indices = torch.where(kept, torch.arange(n, device=scores.device), n).sort(-1).values[..., : int(counts.max())]
        return BlockSelection(indices.int(), counts.int(), n, cfg.block_size, group, index.capacity_tokens)

    def keep_best(self, rank: Tensor, k: int) -> Tensor:
        """As :func:`flex_tls.selection.keep_best`."""
        if self.rule.level == "blocks":
            return self._best(rank, k)
        return self._keep(rank, torch.where(rank.isfinite(), rank, 0.0))

    def _keep(self, rank: Tensor, mass: Tensor) -> Tensor:
        """Bool [B, HKV, T, N] of rank and mass as in :func:`needs`; while it is measured, by the uniform budget."""
        need, order = needs(rank, mass, self.rule.by)
        place = torch.arange(rank.shape[-1], device=rank.device)
        if not self._is_ready:
            self._noted.append(need)
            kept = place < self.budget
        elif self.rule.when == "prompt":
            kept = place < self.counts[self._layer, :, None, None]
        else:
            kept = place < kept_counts(need, self.thresholds[self._layer], self.least, self.most)[..., None]
        return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, order, kept & (need < torch.inf))
