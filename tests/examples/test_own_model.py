"""The example decodes what dense attention decodes while budgets hold the context, and compiles once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import flex_tls as tls

FILE = Path(__file__).parents[2] / "examples" / "own_model.py"
FULL = tls.TLSConfig(block_size=16, block_budget=256, token_budget=None, sink_tokens=4, recent_tokens=8)
SPARSE = tls.TLSConfig(block_size=16, block_budget=48, token_budget=32, sink_tokens=4, recent_tokens=8)
PROMPT, NEW = 90, 6


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_model", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up
    sys.modules["own_model"] = module
    spec.loader.exec_module(module)
    return module


def decoder(example: ModuleType, cfg: tls.TLSConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = example.Decoder(example.Sizes(layers=2), cfg).eval()
    return model


def prompt() -> Tensor:
    return torch.randint(0, 512, (2, PROMPT), generator=torch.Generator().manual_seed(1))


def test_the_example_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 150


def test_full_budgets_give_dense_greedy_tokens_with_one_compilation(example: ModuleType) -> None:
    model, ids = decoder(example, FULL), prompt()
    with torch.no_grad():
        want = ids
        for _ in range(NEW):
            want = torch.cat([want, model.read(want, 200)[0]], 1)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert torch.equal(model.generate(ids, NEW), want[:, PROMPT:])
    assert graphs["unique_graphs"] - before == 1


def test_the_whole_step_is_traced_as_on_cuda(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph, run by the oracle: two-level attention, not what CUDA compiles of it."""
    model, ids = decoder(example, SPARSE), prompt()
    capacity = PROMPT + NEW
    with torch.no_grad():
        monkeypatch.setattr(example, "compiled_flex", example.flex_attention)
        torch._dynamo.reset()
        step = torch.compile(model.step, fullgraph=True, backend="eager")
        token, caches = model.read(ids, capacity)
        tokens, position = [token], torch.tensor([PROMPT])
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        for t in range(NEW - 1):
            tokens.append(step(tokens[-1], position + t, caches))
        # The first, and one in which the index's length is no constant any more
        assert graphs["unique_graphs"] - before == 2
        # Token by token again, by the reference operator
        _, caches = model.read(ids, capacity)
        for t in range(NEW - 1):
            x = model.embed(tokens[t])
            for block, cache in zip(model.blocks, caches, strict=True):
                q, k, v = block.project(x, position + t)
                cache.keys.index_copy_(2, position + t, k)
                cache.values.index_copy_(2, position + t, v)
                cache.index.append(k)
                out = tls.two_level_attention(q, cache.keys, cache.values, cache.index, SPARSE, backend="reference")
                x = block.finish(x, out)
            assert torch.equal(model.head(x).argmax(-1), tokens[t + 1])


@pytest.mark.cuda
def test_on_cuda_the_whole_step_compiles(example: ModuleType) -> None:
    """Twice: with the index's first length as a constant, then with any."""
    model, ids = decoder(example, FULL).cuda(), prompt().cuda()
    with torch.no_grad():
        want = ids
        for _ in range(NEW):
            want = torch.cat([want, model.read(want, 200)[0]], 1)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    assert torch.equal(model.generate(ids, NEW), want[:, PROMPT:])
    assert graphs["unique_graphs"] - before == 2
