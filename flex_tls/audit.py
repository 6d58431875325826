"""The drift monitor: every so many steps one layer's true attention is computed and compared with what was selected.

A projection fitted on a prompt, and budgets chosen for it, may suit a long answer less and less. The audit says so, and
can act: widen the layer's budgets, or let it attend densely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .config import TLSConfig
from .device import to_host
from .mods import MaskMod, exact_scores
from .selection import TokenSelection, keep_best, reduce_group

OnDrift = Literal["report", "widen", "dense"]

# A block budget beyond any context
UNLIMITED = 2**40


class Audit(NamedTuple):
    """One layer at one decode step, means over rows, query heads and query tokens.

    Attributes:
        step: decode steps before it.
        layer: that was compared.
        mass: share of full attention's weight on the selected tokens.
        kl: KL(attention to the selection || full attention), in nats: minus the logarithm of that share.
        recall: share of the equally many tokens of the highest exact scores that were selected, per KV head.
    """

    step: int
    layer: int
    mass: float
    kl: float
    recall: float


class AuditStats(NamedTuple):
    """What the audits found so far; means are NaN before the first.

    Attributes:
        n_steps: decode steps.
        audits: every comparison, in order.
        mean_mass, mean_kl, mean_recall: over the audits.
        drifted: layers whose kept mass fell below the bound, with the action taken.
    """

    n_steps: int
    audits: tuple[Audit, ...]
    mean_mass: float
    mean_kl: float
    mean_recall: float
    drifted: dict[int, OnDrift]


class Auditor:
    """Compares one sparse layer every ``every`` decode steps, layer after layer.

    What a comparison finds is on its way to the host until the step of the next one, so that nothing waits for it; the
    action on it is taken then, and holds for the rest of the cache's life. A compiled step keeps its budgets: with
    :func:`flex_tls.generate` the actions need ``compiled=False``.

    Args:
        layers: those that are sparse.
        every: steps between two comparisons.
        on_drift: what happens to a layer whose kept mass is below ``least_mass``: nothing but the report, budgets
            doubled (each time), or dense attention.
        least_mass: bound on the kept mass, a share.
    """

    def __init__(
        self, layers: Sequence[int], every: int, on_drift: OnDrift = "report", least_mass: float = 0.9
    ) -> None:
        if every < 1:
            raise ValueError(f"audit_every: expected at least 1 step, got {every}")
        if on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift: expected one of {', '.join(get_args(OnDrift))}, got {on_drift!r}")
        if not 0 <= least_mass <= 1:
            raise ValueError(f"least_mass: expected a share between 0 and 1, got {least_mass}")
        self.every = every
        self.on_drift: OnDrift = on_drift
        self.least_mass = least_mass
        self._layers = tuple(layers)
        self._n_steps = 0
        # Step, layer, what was found, and the event that says when it has come to the host
        self._pending: tuple[int, int, Tensor, Any] | None = None
        self._audits: list[Audit] = []
        self._factor: dict[int, int] = {}
        self._drifted: dict[int, OnDrift] = {}

    def count_step(self) -> None:
        """Note that a decode step begins. Called by the cache."""
        if self._n_steps % self.every == 0:
            self._settle()
        self._n_steps += 1

    @property
    def due(self) -> int | None:
        """The layer that is compared in this step, if its context is long enough to be sparse; None for none."""
        turn, rest = divmod(self._n_steps - 1, self.every)
        return self._layers[turn % len(self._layers)] if rest == 0 and self._layers else None

    def config(self, layer: int, cfg: TLSConfig) -> TLSConfig:
        """The layer's configuration, its budgets as wide as drift has made them; dense are budgets for any context."""
        action = self._drifted.get(layer, "report")
        if action == "report":
            return cfg
        if action == "dense":
            return replace(cfg, block_budget=UNLIMITED, token_budget=None)
        factor = self._factor[layer]
        tokens = None if cfg.token_budget is None else factor * cfg.token_budget
        return replace(cfg, block_budget=factor * cfg.block_budget, token_budget=tokens)

    def add(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        tokens: TokenSelection,
        cfg: TLSConfig,
        *,
        scale: float,
        mask_mod: MaskMod | None = None,
    ) -> None:
        """Compare. q [B, HQ, T, D], k [B, HKV, S, D]; reads all keys."""
        found = compare(q, k, tokens, cfg, scale=scale, mask_mod=mask_mod)
        self._pending = (self._n_steps - 1, layer, *to_host(found))

    def stats(self) -> AuditStats:
        """Everything found so far; waits for the last comparison."""
        self._settle()
        n = len(self._audits)
        means = [sum(x) / n for x in zip(*((a.mass, a.kl, a.recall) for a in self._audits), strict=True)]
        mass, kl, recall = means or [math.nan] * 3
        return AuditStats(self._n_steps, tuple(self._audits), mass, kl, recall, dict(self._drifted))

    def _settle(self) -> None:
        if self._pending is None:
            return
        step, layer, found, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        audit = Audit(step, layer, *found.tolist())
        self._audits.append(audit)
        if audit.mass < self.least_mass:
            self._drifted[layer] = self.on_drift
            if self.on_drift == "widen":
                self._factor[layer] = 2 * self._factor.get(layer, 1)


def compare(
    q: Tensor, k: Tensor, tokens: TokenSelection, cfg: TLSConfig, *, scale: float, mask_mod: MaskMod | None = None
) -> Tensor:
    """(kept mass, KL, recall) of a selection, as in :class:`Audit`: float32 [3]. Arguments of :meth:`Auditor.add`."""
    s = k.shape[2]
    scores = exact_scores(q, k, tokens.positions, scale=scale, mask_mod=mask_mod)
    kept = tokens.mask[..., :s]
    missed = scores.masked_fill(~kept[:, :, None], -torch.inf).logsumexp(-1) - scores.logsumexp(-1)
    # -inf minus -inf is NaN, where a padding query sees nothing and misses nothing
    missed = missed.nan_to_num(nan=0.0).clamp_max(0.0)
    rank = reduce_group(scores, cfg)
    counts = kept.sum(-1)
    best = keep_best(rank, min(int(cfg.token_budget or cfg.block_budget), s))
    recall = (best & kept).sum(-1) / torch.minimum(best.sum(-1), counts).clamp_min(1)
    return torch.stack([missed.exp().mean(), -missed.mean(), recall.mean()])
