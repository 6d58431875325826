"""Fused projections and skinny products compute what the single ones did, and leave no trace when undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flex_tls as tls
from flex_tls.device import INSTALLED, is_interpreted
from flex_tls.skinny import skinny_linear, skinny_product
from tests.cases import assert_as_exact
from tests.integrations.models import make, prompts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = INSTALLED and is_interpreted()
needs_kernel = pytest.mark.skipif(
    not INSTALLED or (DEVICE == "cpu" and not INTERPRETED), reason="its kernel needs a GPU, or TRITON_INTERPRET=1"
)


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


@needs_kernel
def test_skinny_products_give_the_same_logits_and_undo() -> None:
    """Of every projection, with biases, the head's too; a prompt's rows are too many, and meet PyTorch's product."""
    model = make("qwen2").to(DEVICE)
    ids = torch.arange(70, device=DEVICE)[None] % 50

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(ids[:, :n]).logits for n in (1, 4, 5, 70)]

    want = run()
    n_layers = len(model.base_model.layers)
    assert tls.fuse_projections(model, skinny=True) == 4 * n_layers + 1
    for got, each in zip(run(), want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-5, atol=1e-5)
    assert tls.unfuse_projections(model) == 4 * n_layers + 1
    # Weights lie elsewhere now, for which cuBLAS may take another way
    for got, each in zip(run(), want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-5, atol=1e-5)


def test_fused_again_weights_stay_where_they_are() -> None:
    model = make("qwen2")
    before = {name: x.data_ptr() for name, x in model.named_parameters()}
    tls.fuse_projections(model)
    once = {name: x.data_ptr() for name, x in model.named_parameters()}
    assert once != before
    tls.unfuse_projections(model)
    tls.fuse_projections(model)
    assert {name: x.data_ptr() for name, x in model.named_parameters()} == once


def test_a_compiled_step_follows_what_projections_are() -> None:
    """A cache keeps its compiled step, whether or not projections were fused when it was made."""
    model = make("llama")
    token = torch.zeros(1, 1, dtype=torch.int64)
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    step = torch.compile(lambda: model(token, use_cache=False).logits, fullgraph=True, backend=backend)
    with torch.no_grad():
        want = step()
        tls.fuse_projections(model)
        torch.testing.assert_close(step(), want, rtol=1e-5, atol=1e-5)
        tls.unfuse_projections(model)
        assert torch.equal(step(), want)
    single, fused = products
    assert single - fused == 3 * len(model.base_model.layers)


@needs_kernel
@settings(max_examples=20)
@given(st.data())
def test_skinny_linear_is_linear(data: st.DataObject) -> None:
    """Any sizes, of any dtype, with and without a bias; rows of a wider tensor, and of a batch."""
    rows = data.draw(st.sampled_from(((1,), (2, 1), (3,), (2, 2), (1, 4), (5,), (0,))))
    n, k = data.draw(st.integers(1, 70)), data.draw(st.sampled_from((1, 8, 40, 200, 1032, 4096)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float16, *(() if DEVICE == "cpu" else (torch.bfloat16,)))))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(DEVICE, dtype)  # noqa: E731
    weight = draw(n, k + 8)[:, :k]
    x = draw(*rows, 2 * k)
    x = x[..., ::2] if data.draw(st.booleans()) else x[..., k:]
    bias = draw(n) if data.draw(st.booleans()) else None
    got = skinny_linear(x, weight, bias)
    wide = None if bias is None else bias.double()
    truth = nn.functional.linear(x.double(), weight.double(), wide)
    assert got.shape == truth.shape
    if got.numel():
        assert_as_exact(got, nn.functional.linear(x, weight, bias), truth)


@needs_kernel
def test_skinny_product_is_an_op_that_torch_compile_can_trace() -> None:
    x, weight = torch.randn(3, 64, device=DEVICE), torch.randn(5, 64, device=DEVICE)
    for bias in (None, torch.randn(5, device=DEVICE)):
        torch.library.opcheck(skinny_product, (x, weight, bias))


def test_skinny_linear_leaves_gradients_autocasting_and_errors_to_torch() -> None:
    x, weight = torch.randn(1, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE, requires_grad=True)
    skinny_linear(x, weight, None).sum().backward()
    assert weight.grad is not None
    weight = weight.detach()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert skinny_linear(x, weight, None).dtype == torch.bfloat16
    for other in (x.half(), x[:, :7]):
        with pytest.raises(RuntimeError):
            skinny_linear(other, weight, None)


@needs_kernel
def test_skinny_products_refuse_weights_that_do_not_lie_in_rows() -> None:
    model = make("llama").to(DEVICE)
    layer = model.base_model.layers[0].mlp.down_proj
    layer.weight.data = layer.weight.data.T.contiguous().T
    with pytest.raises(
        ValueError, match=r"skinny: .*down_proj: the kernel reads weights along contiguous columns, got strides \(1, "
    ):
        tls.fuse_projections(model, skinny=True)
    assert tls.unfuse_projections(model) == 0


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    """As accelerate gives to layers whose weights it moves."""
    model = make("llama")
    first = model.base_model.layers[0].self_attn
    first.k_proj.forward = first.k_proj.forward
    assert tls.fuse_projections(model) == 2 * len(model.base_model.layers) - 1
    tls.unfuse_projections(model)
    assert "forward" in vars(first.k_proj)


@pytest.mark.skipif(not INSTALLED or DEVICE == "cuda" or INTERPRETED, reason="here it can run, or is not installed")
def test_skinny_products_that_cannot_run_here_are_refused_and_nothing_is_changed() -> None:
    model = make("llama")
    with pytest.raises(ValueError, match=r"skinny: \S+_proj: its kernels need a CUDA device"):
        tls.fuse_projections(model, skinny=True)
    assert tls.unfuse_projections(model) == 0


@pytest.mark.parametrize("change", ["cast", "copied", "assigned"])
def test_weights_that_lie_elsewhere_are_refused(change: str) -> None:
    """What was fused would go on computing with the weights that it knows."""
    model = make("llama")
    tls.fuse_projections(model)
    if change == "cast":
        model.double().float()
    elif change == "copied":
        model = copy.deepcopy(model)
    else:
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"expected weights where fuse_projections laid them, .* unfuse_projections"):
        logits(model)
    tls.unfuse_projections(model)
    logits(model)
    tls.fuse_projections(model)
    logits(model)


def test_skinny_products_refuse_another_dtype() -> None:
    model = make("llama").double()
    with pytest.raises(
        ValueError, match=r"skinny: \S+: the kernel takes bfloat16, float16 and float32, got torch.float64"
    ):
        tls.fuse_projections(model, skinny=True)
    assert tls.unfuse_projections(model) == 0


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
