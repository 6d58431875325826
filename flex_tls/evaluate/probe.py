"""What a selection catches of full attention, layer by layer and head by head: mass, heavy tokens, and locality."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Backend
from ..bound import missed_mass_bound
from ..index import KVIndex
from ..mods import MaskMod, exact_scores
from ..record import Recorder
from ..selection import BlockSelection, TokenSelection
from ..summaries import MinMaxSummary
from .methods import Method
from .prefilled import Prefilled

# Heavy are the fewest tokens that make up this share of a query head's attention
HEAVY_MASS = 0.9


class Catch(NamedTuple):
    """Means over one document's query tokens.

    Attributes:
        layers: that were sparse, ascending.
        mass_blocks, mass_tokens: [layer][query head], share of full attention's weight on the kept blocks, and on the
            kept tokens.
        heavy_blocks, heavy_tokens: [layer][query head], share of the heavy tokens inside the kept blocks, and among
            the kept tokens.
        locality: [layer], share of a query's blocks that the query before it had selected too.
        missed_bound: [layer][query head], upper bound on the mass that is not on the kept tokens
            (:func:`flex_tls.bound.missed_mass_bound`); empty for an index without boxes.
    """

    layers: list[int]
    mass_blocks: list[list[float]]
    mass_tokens: list[list[float]]
    heavy_blocks: list[list[float]]
    heavy_tokens: list[list[float]]
    locality: list[float]
    missed_bound: list[list[float]]


class Probe(Recorder):
    """A recorder that keeps sums over query tokens, for every row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, Tensor] = {}
        self._bounds: dict[int, Tensor] = {}
        self._local: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    def add_sparse(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        index: KVIndex,
        blocks: BlockSelection,
        tokens: TokenSelection,
        *,
        n_tokens: int,
        scale: float,
        mask_mod: MaskMod | None = None,
    ) -> None:
        """As in :class:`Recorder`."""
        kept_blocks = blocks.kept()
        shares = caught(q, k, kept_blocks, blocks.block_size, tokens, scale=scale, mask_mod=mask_mod)
        self._sums[layer] = self._sums.get(layer, 0.0) + shares.sum(-1)
        if isinstance(index.summary, MinMaxSummary):
            lse = kept_lse(q, k, tokens, scale=scale, mask_mod=mask_mod)
            bound = missed_mass_bound(q, index, tokens, lse, scale=scale, mask_mod=mask_mod).sum(-1)
            self._bounds[layer] = self._bounds.get(layer, 0.0) + bound
        before = self._last.get(layer)
        chain = kept_blocks if before is None else torch.cat([before, kept_blocks], dim=2)
        both = (chain[:, :, 1:] & chain[:, :, :-1]).sum((1, 3)) / chain[:, :, 1:].sum((1, 3)).clamp_min(1)
        self._local[layer] = torch.cat([self._local.get(layer, both[:, :0]), both], dim=1)
        self._last[layer] = kept_blocks[:, :, -1:]
        self._counts[layer] = self._counts.get(layer, 0) + q.shape[2]

    def catches(self) -> list[Catch]:
        """One a row. Synchronises with the device."""
        layers = sorted(self._sums)
        if not layers:
            raise ValueError("probe: expected sparse steps, got none; lower the budgets or lengthen the context")
        shares = torch.stack([self._sums[i] / self._counts[i] for i in layers], dim=2).cpu()
        local = torch.stack([self._local[i].mean(1) for i in layers], dim=1).cpu()
        bounds = [self._bounds[i] / self._counts[i] for i in layers] if self._bounds else []
        bound = torch.stack(bounds, dim=1).cpu() if bounds else local[:, :0]
        rows = zip(*shares.unbind(), local, bound, strict=True)
        return [Catch(layers, *(_rounded(values) for values in row)) for row in rows]


def caught(
    q: Tensor,
    k: Tensor,
    kept_blocks: Tensor,
    block_size: int,
    tokens: TokenSelection,
    *,
    scale: float,
    mask_mod: MaskMod | None = None,
) -> Tensor:
    """(mass of blocks, of tokens, heavy tokens in blocks, among tokens): float32 [4, B, HQ, T], as in :class:`Catch`.

    q [B, HQ, T, D], k [B, HKV, S, D], kept_blocks bool [B, HKV, T, N]. A query that may look nowhere misses nothing.
    """
    s = k.shape[2]
    scores = exact_scores(q, k, tokens.positions, scale=scale, mask_mod=mask_mod)
    p = torch.where(scores.isneginf().all(-1, keepdim=True), 0.0, scores.softmax(-1))
    ordered, order = p.sort(dim=-1, descending=True)
    # Heavy until the share is reached, the token that reaches it included
    heavy = (ordered.cumsum(-1) - ordered < HEAVY_MASS) & (ordered > 0)
    shares = []
    for kept in (kept_blocks.repeat_interleave(block_size, -1)[..., :s], tokens.mask[..., :s]):
        kept = kept[:, :, None].expand(p.shape)
        shares.append(((p * kept).sum(-1), (heavy & kept.gather(-1, order)).sum(-1) / heavy.sum(-1)))
    (mass_blocks, heavy_blocks), (mass_tokens, heavy_tokens) = shares
    found = torch.stack([mass_blocks, mass_tokens, heavy_blocks, heavy_tokens])
    return torch.where(heavy.any(-1), found, 1.0).reshape(4, *q.shape[:3])


def kept_lse(q: Tensor, k: Tensor, tokens: TokenSelection, *, scale: float, mask_mod: MaskMod | None = None) -> Tensor:
    """Log-sum-exp of the kept tokens' exact scores: float32 [B, HQ, T]."""
    s = k.shape[2]
    scores = exact_scores(q, k, tokens.positions, scale=scale, mask_mod=mask_mod)
    return scores.masked_fill(~tokens.mask[..., :s][:, :, None], -torch.inf).logsumexp(-1).reshape(q.shape[:3])


def probe_documents(
    model: Any, ids: Tensor, context_tokens: int, method: Method, *, backend: Backend = "auto", step_tokens: int = 16
) -> tuple[str, list[Catch]]:
    """(backend, a catch a document) of B documents [B, S] decoded from ``context_tokens`` on, as :mod:`.perplexity`."""
    prompt = Prefilled(model, ids[:, : context_tokens - 1], ids.shape[1] - context_tokens, backend)
    probe = Probe()
    with prompt.decoding(method, probe) as step:
        for tokens in ids[:, context_tokens - 1 : -1].split(step_tokens, dim=1):  # type: ignore[no-untyped-call,unused-ignore]
            step(tokens)
    return prompt.backend_for(method), probe.catches()


def _rounded(x: Tensor) -> Any:
    """Nested lists of four digits: rows are read by people too."""
    return [_rounded(part) for part in x] if x.dim() else round(float(x), 4)
