from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.cache_layer import Shared
from flex_tls.evaluate.eviction import EvictionLayer, evicting_cache
from flex_tls.evaluate.methods import Method
from flex_tls.evaluate.perplexity import score_documents
from flex_tls.model_config import ModelShape
from flex_tls.progress import Progress

from ..integrations.models import FULL, make
from .test_decoding import documents

H2O = tls.TLSConfig(block_size=16, block_budget=512, token_budget=20, sink_tokens=0, recent_tokens=7, dense_layers=0)


def evict_one_by_one(q: Tensor, k: Tensor, v: Tensor, n_prompt: int) -> tuple[Tensor, list[set[int]]]:
    """One KV head: q [G, S, D], k and v [S, D]. Outputs [G, S - n_prompt, D], and who is alive after each token."""
    s = k.shape[0]
    p = (q @ k.T).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf).softmax(-1)
    weight = p[:, :n_prompt].sum((0, 1)).tolist()
    alive = set(range(n_prompt))
    outs, kept = [], []

    def evict(n: int) -> None:
        while len(alive) > 20:
            old = sorted(alive - set(range(n - 7, n)))
            # Of equally light tokens the later one goes
            alive.remove(min(old, key=lambda i: (weight[i], -i)))

    evict(n_prompt)
    for i in range(n_prompt, s):
        alive.add(i)
        seen = sorted(alive)
        p = (q[:, i] @ k[seen].T).softmax(-1)
        outs.append(p @ v[seen])
        for place, token in enumerate(seen):
            weight[token] += float(p[:, place].sum())
        evict(i + 1)
        kept.append(set(alive))
    return torch.stack(outs, dim=1), kept


@given(st.integers(0, 10**6), st.integers(1, 60), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_eviction_is_that_of_the_definition(seed: int, n_prompt: int, chunks: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    s = n_prompt + sum(chunks)
    q, k, v = (torch.randn(1, h, s, 16, generator=generator) for h in (4, 2, 2))
    shape = ModelShape("tiny", 1, 2, 16, (None,), torch.float32)
    shared = Shared(tls.TLSConfig(dense_layers=1), "reference", shape, s, Progress(1))
    layer = EvictionLayer(shared, 0, H2O)
    layer.allocate(torch.float32, torch.device("cpu"))
    outs, start = [], 0
    for n in (n_prompt, *chunks):
        shared.progress.begin(n, None, None, torch.device("cpu"))
        layer.update(k[:, :, start : start + n], v[:, :, start : start + n])
        outs.append(layer.attend(q[:, :, start : start + n], 1.0))
        start += n
    for head in range(2):
        expected, kept = evict_one_by_one(q[0, 2 * head : 2 * head + 2], k[0, head], v[0, head], n_prompt)
        torch.testing.assert_close(torch.cat(outs[1:], dim=2)[0, 2 * head : 2 * head + 2], expected)
        assert set(layer.alive[0, head].nonzero().flatten().tolist()) == kept[-1]


def test_a_budget_that_holds_everything_evicts_nothing() -> None:
    method = Method("h2o", dataclasses.replace(FULL, sink_tokens=0, recent_tokens=256), evicts=True)
    ((_, (score, _)),) = score_documents(make(), documents(2, 100), 90, [method], step_tokens=4)
    assert score.kl == pytest.approx(0, abs=1e-6)
    assert score.backend == "eviction"


def test_a_model_that_evicts_on_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="h2o: expected full attention in every layer"):
        evicting_cache(make("mistral, window").config, H2O, 1, 100)
