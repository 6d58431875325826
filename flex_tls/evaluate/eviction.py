"""H2O's eviction as a baseline: what was attended to least so far is dropped for good, and never comes back.

For comparison alone: keys and values stay in the cache's buffers, and a mask says which tokens are gone.
Source: H2O, arXiv 2306.14048.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..cache import TLSCache
from ..cache_layer import Shared, TLSLayer
from ..config import TLSConfig
from ..dense import MASK_ELEMENTS
from ..selection import keep_best


class EvictionLayer(TLSLayer):  # type: ignore[no-untyped-call,unused-ignore]
    """One layer that keeps, per row and KV head, ``token_budget`` tokens: the newest and those of the largest weight.

    A token's weight is the sum of its softmax weights under all queries since it came, query heads of a group together:
    over the whole prompt, then token by token. The newest ``recent_tokens`` stay whatever their weight.

    Attributes:
        weight: float32 [B, HKV, S].
        alive: bool [B, HKV, S].
    """

    def __init__(self, shared: Shared, layer_idx: int, cfg: TLSConfig) -> None:
        super().__init__(shared, layer_idx)
        self._budgets = cfg

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """As :meth:`TLSLayer.attend`; a chunk's queries evict one after the other, as if they had come one by one."""
        step = self._step
        out = super().attend(q, scale)
        assert step is not None
        if self._budgets.is_dense(self.layer_idx):
            return out
        keys, values = (x[:, :, : step.longest].float() for x in self.buffers())
        if step.is_fresh:
            self.weight = _column_sums(q, keys, scale)
            self.alive = torch.ones_like(self.weight, dtype=torch.bool)
            self._evict()
            return out
        grown = self.weight.new_zeros(*keys.shape[:2], step.longest)
        grown[..., : self.weight.shape[-1]] = self.weight[..., : step.longest]
        alive = torch.ones_like(grown, dtype=torch.bool)
        alive[..., : self.alive.shape[-1]] = self.alive[..., : step.longest]
        b, h, _, d = keys.shape
        outs = []
        for token in range(step.n_new):
            seen = step.lens_before[0] + token + 1
            self.weight, self.alive = grown[..., :seen], alive[..., :seen]
            asked = q[:, :, token].float().view(b, h, -1, d)
            scores = asked @ keys[:, :, :seen].transpose(-1, -2) * scale
            p = scores.masked_fill(~self.alive[:, :, None], -torch.inf).softmax(-1)
            outs.append((p @ values[:, :, :seen]).reshape(b, -1, 1, d))
            self.weight += p.sum(2)
            self._evict()
        self.weight, self.alive = grown, alive
        return torch.cat(outs, dim=2).to(out.dtype)

    def _evict(self) -> None:
        """Keep the budget's tokens of those alive; in place."""
        n, budget = self.alive.shape[-1], self._budgets.token_budget
        if budget is None or n <= budget:
            return
        newest = torch.arange(n, device=self.alive.device) >= n - self._budgets.recent_tokens
        rank = torch.where(newest, torch.inf, self.weight).masked_fill(~self.alive, -torch.inf)
        self.alive &= keep_best(rank, budget)


def evicting_cache(model_config: Any, cfg: TLSConfig, batch_size: int, max_len: int) -> TLSCache:
    """A cache whose layers evict but for ``dense_layers``; for rows of equal length.

    Raises:
        ValueError: a model with sliding windows, which evict on their own.
    """
    cache = TLSCache(model_config, TLSConfig(dense_layers=10**6), batch_size=batch_size, max_len=max_len)
    if any(layer.window is not None for layer in cache.tls_layers):
        raise ValueError("h2o: expected full attention in every layer, got a model with sliding windows; leave it out")
    cache.layers = [EvictionLayer(layer.shared, layer.layer_idx, cfg) for layer in cache.tls_layers]
    return cache


def _column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax weights of causal queries, summed over the queries: q [B, HQ, S, D], k [B, HKV, S, D] -> [B, HKV, S]."""
    b, hq, s, d = q.shape
    hkv = k.shape[1]
    folded = q.float().view(b, hkv, hq // hkv, s, d)
    total = torch.zeros(b, hkv, s, device=q.device)
    slot = torch.arange(s, device=q.device)
    rows = max(1, MASK_ELEMENTS // (b * hq * s))
    for start in range(0, s, rows):
        end = min(start + rows, s)
        scores = folded[:, :, :, start:end] @ k[:, :, None, :end].transpose(-1, -2) * scale
        hidden = slot[:end] > slot[start:end, None]
        total[..., :end] += scores.masked_fill(hidden, -math.inf).softmax(-1).sum((2, 3))
    return total
