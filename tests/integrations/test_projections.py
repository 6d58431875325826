"""Fused projections compute what the single ones did, and leave no trace when they are undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import flex_tls as tls
from tests.integrations.models import make, prompts


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(**prompts(40, 30)).logits
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_projections_give_the_same_logits_and_undo(family: str) -> None:
    model = make(family)
    want, weights = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    assert tls.fuse_projections(model) == 2 * 3
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(weights)
    attention = model.base_model.layers[0].self_attn
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    # What is loaded into the parameters is what is computed with
    model.load_state_dict({name: x * 0.5 for name, x in weights.items()})
    halved = logits(model)
    assert not torch.allclose(halved, want)
    assert tls.unfuse_projections(model) == 2 * 3
    torch.testing.assert_close(logits(model), halved, rtol=1e-5, atol=1e-5)
    model.load_state_dict(weights)
    assert torch.equal(logits(model), want)
    assert tls.unfuse_projections(model) == 0


def test_siblings_are_one_matrix_product_in_a_traced_layer() -> None:
    model = make("llama")
    layer = model.base_model.layers[0].mlp
    x = torch.randn(1, 1, model.config.hidden_size)
    want = layer(x)
    tls.fuse_projections(model)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    traced = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(traced(x), want, rtol=1e-5, atol=1e-5)
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if node.target is torch._C._nn.linear]
    assert len(products) == 2


def test_an_interrupted_layer_leaves_nothing_behind() -> None:
    model = make("llama")
    tls.fuse_projections(model)
    want = logits(model)
    attention = model.base_model.layers[1].self_attn

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = attention.k_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), want)


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected layers with q_proj/k_proj/v_proj or gate_proj/up_proj .* Linear"):
        tls.fuse_projections(nn.Linear(2, 2))
    model = make("llama")
    tls.fuse_projections(model)
    with pytest.raises(ValueError, match="a model is fused once"):
        tls.fuse_projections(model)
    with torch.device("meta"), pytest.raises(ValueError, match="found none in LlamaForCausalLM"):
        tls.fuse_projections(type(model)(model.config))
