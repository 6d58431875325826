"""The baselines attend to what they say they select, and select what their papers say; kernels interpreted on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.cases import CASES, Case, dry
from bench.inputs import make_inputs
from bench.operator import dense_error, dense_over, relative_error, run_case
from bench.providers import PROVIDERS
from bench.rows import machine
from flex_tls.reference import attention_reference

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bfloat16 as integers; torch's flash attention on CUDA takes no float32
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 1e-2 if DEVICE.type == "cuda" else 1e-5
# A group of 5, Qwen3-14B's
CASE = Case(name="t", B=2, HQ=10, HKV=2, D=64, S=1024, block_size=32, block_budget=256, token_budget=160, dtype=DTYPE)


def test_the_error_is_that_of_the_packages_oracle() -> None:
    (inputs,) = make_inputs(CASE, DEVICE, 1)
    wide = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    want, _ = attention_reference(*wide, inputs.tokens, scale=1 / math.sqrt(CASE.D))
    assert relative_error(want, inputs, inputs.tokens.mask[:, :, 0]) < 1e-12
    assert relative_error(want.view(CASE.B, CASE.HKV, CASE.group, CASE.D), inputs, None) > 0.1


@pytest.mark.parametrize("some", [True, False])
def test_dense_attention_over_some_tokens_is_of_those_alone(some: bool) -> None:
    sets = make_inputs(CASE, DEVICE, 2)
    masks = [i.tokens.mask[:, :, 0] if some else None for i in sets]
    assert 0 < dense_error(sets, masks) < TOLERANCE
    assert relative_error(dense_over(sets[0], masks[0]), sets[1], masks[1]) > 0.1


def test_rows_of_who_chooses_have_denses_error_too() -> None:
    case = CASES["tiniest"] if DEVICE.type == "cuda" else dry(CASES["tiniest"])
    found, failed = run_case(
        case, DEVICE, machine(DEVICE, "abc"), providers=["triton_dense", "quest_token_budget"], splits=[], runs=2,
        bytes_per_us=1.0, n_sets=1,
    )  # fmt: skip
    assert not failed
    dense, quest = found
    assert dense.rel_error_dense is None
    assert quest.rel_error_dense is not None
    assert 0 < quest.rel_error_dense < TOLERANCE


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("sdpa_flash", None),
        ("triton_dense", None),
        ("sliding_window_triton", 256),
        ("quest_block_budget", 256),
        ("quest_token_budget", 160),
        ("double_sparsity", 160),
        ("triton_given_blocks", 160),
        ("triton_given_tokens", 160),
    ],
)
def test_providers_attend_exactly_to_what_they_select(name: str, tokens: int | None) -> None:
    sets = make_inputs(CASE, DEVICE, 2)
    assert PROVIDERS[name].runs_here(CASE, DEVICE)
    job = PROVIDERS[name].make(CASE, sets, None)
    # Twice: the kernels leave their workspaces as they found them
    for call, inputs, mask in list(zip(job.calls, sets, job.masks, strict=True)) * 2:
        assert relative_error(call(), inputs, mask) < TOLERANCE
        assert mask is None if tokens is None else bool((mask.sum(-1) == tokens).all())


def assert_best(scores: Tensor, mask: Tensor, slack: float) -> None:
    """No candidate that was left out scores higher than one that was kept, but for ``slack`` of rounding."""
    worst_kept = scores.masked_fill(~mask, torch.inf).amin(-1)
    best_left = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert bool((best_left <= worst_kept + slack).all())


@pytest.mark.parametrize("n", [33, 100])
def test_quest_keeps_the_newest_block_and_those_with_the_best_bounds(n: int) -> None:
    from bench.kernels.score_boxes import launch_score_boxes

    b, hkv, group, d, kept = 2, 2, 3, 48, 7
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(b, hkv * group, 1, d, generator=generator).to(DEVICE)
    ends = torch.randn(2, b, hkv, n, d, generator=generator).to(DEVICE)
    low, high = ends.amin(0), ends.amax(0)
    arrivals = torch.zeros(b * hkv, dtype=torch.int32, device=DEVICE)
    ids, counts = launch_score_boxes(q, low, high, arrivals, kept=kept, block_size=16)
    folded = q.view(b, hkv, group, 1, d).double()
    bound = torch.maximum(folded * low[:, :, None], folded * high[:, :, None]).sum(-1).amax(2)
    mask = torch.zeros(b, hkv, n, dtype=torch.bool, device=DEVICE).scatter(2, ids.view(b, hkv, -1).long(), True)
    assert counts.tolist() == mask.sum(-1).flatten().tolist() == [kept] * (b * hkv)
    assert bool((ids.diff(dim=-1) > 0).all())
    assert bool(mask[..., -1].all())
    assert_best(bound[..., :-1], mask[..., :-1], 1e-5)


@pytest.mark.parametrize("distinct", [5, 10_000], ids=["ties", "distinct"])
def test_double_sparsity_keeps_the_best_tokens_of_the_whole_cache(distinct: int) -> None:
    from bench.kernels.ask import launch_ask
    from bench.kernels.rank_labels import launch_rank_labels
    from bench.providers.double_sparsity import make_labels

    b, hkv, group, d, s, kept = 1, 2, 4, 128, 1040, 20
    generator = torch.Generator().manual_seed(distinct)
    q = torch.randn(b, hkv * group, 1, d, generator=generator).to(DEVICE)
    keys = torch.randn(b, hkv, distinct, d, generator=generator)
    k = keys[:, :, torch.randint(distinct, (s,), generator=generator)].to(DEVICE)
    labels = make_labels(q, k)
    assert labels.codes.shape == (b, hkv, 2, s)
    lens = torch.full((b,), s, device=DEVICE)
    asked, base, unit = launch_ask(
        q, lens, labels.to_query, labels.low, labels.step, bits=(4, 4), filter_dims=labels.low.shape[2]
    )
    arrivals = torch.zeros(b * hkv, dtype=torch.int32, device=DEVICE)
    ids, counts = launch_rank_labels(labels.codes, lens, asked, base, unit, arrivals, bits=(4, 4), kept=kept)
    assert counts.tolist() == [kept] * (b * hkv)
    assert not arrivals.any()
    code = (labels.codes[:, :, :, None] >> torch.arange(0, 32, 4, device=DEVICE)[:, None]) & 15
    value = code.flatten(2, 3) * labels.step[..., None].double() + labels.low[..., None]
    chosen = labels.to_query.double().transpose(-1, -2) @ k.double().transpose(-1, -2)
    # A label is off by half a step at most, from the key in its channels
    assert bool(((value - chosen).abs() <= 0.51 * labels.step[..., None]).all())
    scores = (q.view(b, hkv, group, d).double() @ labels.to_query.double() @ value).amax(2)
    mask = torch.zeros(b, hkv, s, dtype=torch.bool, device=DEVICE).scatter(2, ids.view(b, hkv, -1).long(), True)
    # Queries in 8 bits: an error of a channel is at most half of a 127th of the largest
    assert_best(scores, mask, 0.02 * float(scores.abs().max()))
    if distinct == 5:
        # Equal labels have equal scores: of those at the edge the lowest positions are kept
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort().values
        assert torch.equal(ids.view(b, hkv, kept).long(), expected)
