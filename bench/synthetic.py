"""Selections over long synthetic contexts, where no real weights are at hand: keys with planted structure.

Keys have a power-law spectrum in a random basis, a topic that drifts along the context, so that neighbours are alike,
and boosts along what queries ask, whose exponentials are Pareto distributed: attention over them is a power law. Every
query has a needle besides, one token anywhere that takes about half of its attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls import jsonl
from flex_tls.evaluate.methods import cost
from flex_tls.evaluate.probe import caught
from flex_tls.evaluate.sets import make_methods

from .rows import Machine

METHODS = (
    "ours", "ours:label_bits=4+4+2+2", "ours:block_reduce=logsumexp", "ours:label_dims=64:block_reduce=logsumexp",
    "quest", "quest_labels", "quest_double_sparsity", "oracle",
)  # fmt: skip
# Tokens on either side of which a needle is not placed: sinks and recent window would keep it anyway
MARGIN = 256
# Directions that one query asks along
N_ASKED = 3


class Context(NamedTuple):
    """k [1, HKV, S, D]; q_prompt and q [1, HQ, T, D]; needles int64 [T], the needle of every query of ``q``."""

    k: Tensor
    q_prompt: Tensor
    q: Tensor
    needles: Tensor


def make_context(
    s: int,
    *,
    head_dim: int = 128,
    n_kv_heads: int = 1,
    group: int = 4,
    n_queries: int = 16,
    n_directions: int = 48,
    tail: float = 1.2,
    drift: float = 0.02,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Context:
    """One row of keys and queries.

    Args:
        s: tokens.
        head_dim, n_kv_heads, group, n_queries: D, HKV, G and queries that end the context.
        n_directions: that queries ask along, :data:`N_ASKED` each, at most D.
        tail: exponent of the Pareto distribution of the planted attention; smaller is more concentrated.
        drift: share of the topic that changes from token to token.
        seed: of everything drawn.
        device: where.
    """
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    spectrum = torch.arange(1, head_dim + 1).float() ** -0.5
    spectrum = spectrum * (head_dim / spectrum.square().sum()).sqrt()
    basis = torch.linalg.qr(draw(n_kv_heads, head_dim, head_dim))[0]
    # A topic that keeps its variance while it drifts, filled in from a coarse grid
    every = max(1, round(0.1 / drift))
    steps = draw(n_kv_heads, -(-s // every) + 1, head_dim)
    keep = math.sqrt(1 - min(1.0, drift * every) ** 2)
    topic = steps.clone()
    for i in range(1, topic.shape[1]):
        topic[:, i] = keep * topic[:, i - 1] + math.sqrt(1 - keep**2) * steps[:, i]
    k = (0.7 * topic.repeat_interleave(every, 1)[:, :s] + 0.7 * draw(n_kv_heads, s, head_dim)) * spectrum @ basis
    # Every query asks along a few of these directions, every token answers along one of them
    asked = torch.linalg.qr(draw(n_kv_heads, head_dim, n_directions))[0].transpose(-1, -2)
    scale, strength = math.sqrt(head_dim), 8.0
    boost = torch.rand(n_kv_heads, s, 1, generator=gen).clamp_min(1e-7).log().neg() / tail
    answers = torch.randint(n_directions, (n_kv_heads, s), generator=gen)
    k = k + boost * scale / strength * asked[torch.arange(n_kv_heads)[:, None], answers]

    def queries(n: int) -> Tensor:
        own = (draw(n_kv_heads, group, n, head_dim) * spectrum) @ basis[:, None]
        # The heads of a group ask along the same directions, which is why they share keys
        chosen = torch.rand(n_kv_heads, n, n_directions, generator=gen).topk(N_ASKED, dim=-1).indices
        wants = torch.zeros(n_kv_heads, 1, n, n_directions).scatter_(3, chosen[:, None], 1.0)
        wants = wants * (0.75 + 0.5 * torch.rand(n_kv_heads, group, n, n_directions, generator=gen))
        return (strength * wants @ asked[:, None] + own).reshape(1, n_kv_heads * group, n, head_dim)

    q_prompt, q = queries(min(s, 1024)), queries(n_queries)
    needles = MARGIN + torch.randperm(s - 2 * MARGIN, generator=gen)[:n_queries]
    folded = q.view(n_kv_heads, group, n_queries, head_dim)
    for query, place in enumerate(needles.tolist()):
        mine = folded[:, :, query].mean(1)
        mass = (folded[:, :, query] @ k.transpose(-1, -2) / scale).logsumexp(-1).mean(1, keepdim=True)
        now = (mine * k[:, place]).sum(-1, keepdim=True) / scale
        k[:, place] += (mass - now) * scale * mine / mine.square().sum(-1, keepdim=True)
    return Context(*(x.to(device) for x in (k[None], q_prompt, q, needles)))


@torch.no_grad()
def measure(
    context: Context, block_budget: int, token_budget: int, block_size: int, specs: Sequence[str] = METHODS
) -> Iterator[dict[str, Any]]:
    """A row for every method: shares of mass, heavy tokens and needles that its selection holds."""
    _, _, s, d = context.k.shape
    base = tls.TLSConfig(
        block_size=block_size, block_budget=block_budget, token_budget=token_budget, sink_tokens=64, recent_tokens=64
    )
    for method in make_methods(specs, [base], s)[0]:
        assert method.cfg is not None
        index = tls.KVIndex.build(context.k, method.cfg, q=context.q_prompt)
        shares, found = [], []
        # Every query ends the same context: none sees fewer keys than another
        for query, needle in enumerate(context.needles):
            q = context.q[:, :, query : query + 1]
            blocks = tls.select_blocks(q, index, method.cfg)
            tokens = tls.select_tokens(q, index, blocks, method.cfg)
            shares.append(caught(q, context.k, blocks.kept(), block_size, tokens, scale=d**-0.5).mean((1, 2, 3)))
            found.append(tokens.mask[0, :, 0, needle].float().mean())
        mass_blocks, mass_tokens, heavy_blocks, heavy_tokens = torch.stack(shares).mean(0).tolist()
        yield {
            "bench": "synthetic", "S": s, "D": d, "HKV": context.k.shape[1], "method": method.name,
            "config": method.config, **cost(method, d, s)._asdict(), "queries": len(found),
            "mass_blocks": mass_blocks, "mass_tokens": mass_tokens, "heavy_blocks": heavy_blocks,
            "heavy_tokens": heavy_tokens, "needles": float(torch.stack(found).mean()),
        }  # fmt: skip


def append(path: Path, machine: Machine, found: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSONL file, with where they were measured."""
    jsonl.append(path, ({**row, **machine._asdict()} for row in found))
