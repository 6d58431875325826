"""The fused kernels against the reference: on a GPU as compiled, elsewhere interpreted, on smaller shapes."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flex_tls as tls
from flex_tls.attention import Attended, attend
from flex_tls.compiled import compiled
from flex_tls.config import GroupReduce
from flex_tls.device import why_not_here
from flex_tls.fused import _visible, fused_attention, labels_of, options_of, summary_of, visible_to
from flex_tls.mods import MaskMod
from flex_tls.reference import attention_reference
from flex_tls.static import append_tokens, attend_all
from tests.cases import KINDS, Case, assert_as_exact, cases, make

pytest.importorskip("triton")
from flex_tls.kernels.tile_table import forced
from flex_tls.kernels.tiles import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Whose blocks are not scored by packed labels
OTHER_KINDS = tuple(kind for kind in KINDS if kind != "lowrank")
CFG = tls.TLSConfig(block_size=32, block_budget=256, token_budget=100, sink_tokens=16, recent_tokens=40)


def to_device(case: Case) -> Case:
    moved = {name: x.to(DEVICE) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return dataclasses.replace(case, **moved)


def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx < 70


def windows(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx < 30 * (h + 1)


def second_head_blind(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (h != 1) & (kv_idx >= 0)


def gaps(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx + h) % 100 < 50


def nothing(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx < 0


def documents(case: Case) -> MaskMod:
    """A query sees its own document alone: of 60 tokens or so, otherwise cut in every row."""
    batch_size, _, s, _ = case.k.shape
    row = torch.arange(batch_size, device=case.k.device)[:, None]
    document = (torch.arange(s, device=case.k.device) + 17 * row) // 60

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return document[b, q_idx] == document[b, kv_idx]

    return mask_mod


MASKS: tuple[MaskMod, ...] = (window, windows, second_head_blind, gaps, nothing)


def check(case: Case, scale: float | None = None, mask_mod: MaskMod | None = None) -> Attended:
    """Same selection but for ties that rounding breaks, attention as exact as PyTorch's, workspace as it was."""
    index = case.index()
    inputs, options = (case.q, case.k, case.v, index, case.cfg), {"scale": scale, "mask_mod": mask_mod}
    got = attend(*inputs, **options, backend="triton", return_lse=True)
    want = attend(*inputs, **options, backend="reference")
    assert got.blocks is not None
    assert got.tokens is not None
    assert want.blocks is not None
    assert want.tokens is not None
    assert torch.equal(got.blocks.counts, want.blocks.counts)
    assert torch.equal(got.tokens.counts, want.tokens.counts)
    # exp and sums round differently here and there: two candidates of nearly the same rank may change places
    flipped = int((got.tokens.mask != want.tokens.mask).sum())
    assert flipped <= 0.01 * int(want.tokens.counts.sum())
    assert not index.arrivals.any()
    used = case.q.shape[-1] ** -0.5 if scale is None else scale
    wide = (x.double() for x in (case.q, case.k, case.v))
    truth, lse = attention_reference(*wide, got.tokens, scale=used, mask_mod=mask_mod)
    low = attention_reference(case.q, case.k, case.v, got.tokens, scale=used, mask_mod=mask_mod)[0]
    blind = lse.isneginf()
    assert not got.out[blind].any()
    if not blind.all():
        assert_as_exact(got.out, low, truth)
    assert got.lse is not None
    tolerance = 1e-4 if case.q.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.lse.double(), lse, rtol=tolerance, atol=tolerance)
    return got


# Interpreted kernels take a second a case: a failure is reported as drawn, not shrunk
@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(cases(kinds=("lowrank",), max_t=2, max_hkv=2), st.sampled_from((None, 0.3)), st.booleans())
def test_the_fused_pipeline_computes_what_the_reference_does(case: Case, scale: float | None, half: bool) -> None:
    # Of labels of several words level 1 may read the first alone
    words, n_channels = case.cfg.label_words(case.cfg.label_channels), case.cfg.label_channels
    dims = min(32 // words[0], n_channels) if half else None
    check(to_device(dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, filter_dims=dims))), scale)


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(cases(kinds=OTHER_KINDS, max_t=3, max_hkv=2))
def test_every_kind_of_index_is_scored_as_the_reference_does(case: Case) -> None:
    check(to_device(case))


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(cases(max_t=3, max_hkv=2), st.sampled_from((*MASKS, documents)))
def test_a_mask_hides_from_both_levels_and_attention_what_it_hides_in_the_reference(case: Case, mask: Any) -> None:
    case = to_device(case)
    check(case, mask_mod=mask(case) if mask is documents else mask)


@pytest.mark.parametrize("group_reduce", get_args(GroupReduce))
def test_what_no_head_sees_is_not_kept(group_reduce: Any) -> None:
    """Sinks apart: the window holds fewer blocks and tokens than the budgets pay for."""
    cfg = dataclasses.replace(CFG, group_reduce=group_reduce)
    got = check(make(cfg, lens=[400], s=400, hkv=1, group=2, device=DEVICE), mask_mod=window)
    assert got.blocks is not None
    assert got.tokens is not None
    assert int(got.blocks.counts) == 1 + 3 < cfg.kept_blocks
    assert int(got.tokens.counts) == 16 + 70


def test_a_query_of_nothing_ranks_blocks_by_the_tokens_that_it_sees() -> None:
    """All scores are 0: the log-sum-exp of a block is that of its visible tokens' number."""
    cfg = dataclasses.replace(CFG, block_budget=128, block_reduce="logsumexp", group_reduce="mean")
    case = make(cfg, lens=[400], s=400, group=2, device=DEVICE)
    check(dataclasses.replace(case, q=torch.zeros_like(case.q)), mask_mod=gaps)


def test_a_masked_head_has_no_say_and_gets_nothing() -> None:
    case = make(CFG, lens=[300], s=320, hkv=1, group=3, device=DEVICE)
    got = check(case, mask_mod=second_head_blind)
    assert got.lse is not None
    assert got.lse[0, :, 0].isneginf().tolist() == [False, True, False]


def test_what_a_compiled_mask_captures_is_looked_at_anew() -> None:
    case = make(CFG, lens=[300, 170], s=330, group=2, t=2, device=DEVICE)
    hidden = torch.zeros(330, dtype=torch.bool, device=DEVICE)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~hidden[kv_idx] & (kv_idx % (h + 2) == 0)

    sizes = (2, 2, 2, 352, 330)
    run = compiled(_visible, (case.seq_lens,), sizes, None, mask_mod)
    for first in (0, 40):
        hidden[first : first + 64] = True
        bits = run(case.seq_lens, *sizes, mask_mod)
        assert bits.shape == (2, 4, 2, 11)
        assert torch.equal(bits, _visible(case.seq_lens, *sizes, mask_mod))
        position = torch.arange(352, device=DEVICE)
        for b, h, t in ((0, 3, 1), (1, 0, 0)):
            want = (position < case.seq_lens[b] - 1 + t) & (position % (h + 2) == 0)
            want[:330] &= ~hidden
            got = (bits[b, h, t, position // 32] >> (position % 32)) & 1
            assert torch.equal(got != 0, want)


@pytest.mark.cuda
@pytest.mark.parametrize("mask", [*MASKS, documents])
@pytest.mark.parametrize("kind", ["lowrank", "quest"])
@pytest.mark.parametrize(("batch_size", "group", "d", "t"), [(1, 4, 128, 1), (16, 8, 128, 1), (3, 5, 64, 3)])
def test_masks_in_long_contexts(mask: Any, kind: str, batch_size: int, group: int, d: int, t: int) -> None:
    cfg = tls.TLSConfig(index=kind, block_budget=2048, token_budget=512)  # type: ignore[arg-type]
    lens = [9000 - 511 * i for i in range(batch_size)]
    case = make(cfg, lens=lens, s=9000, hkv=2, group=group, t=t, d=d, dtype=torch.bfloat16, device="cuda")
    check(case, mask_mod=mask(case) if mask is documents else mask)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("group", "dtype", "token_budget"), [(1, torch.bfloat16, 512), (8, torch.float32, None), (16, torch.bfloat16, 512)]
)
def test_masks_of_many_heads(group: int, dtype: torch.dtype, token_budget: int | None) -> None:
    cfg = tls.TLSConfig(block_budget=2048, token_budget=token_budget, block_reduce="logsumexp", group_reduce="mean")
    case = make(cfg, lens=[9000, 4000], s=9000, hkv=1, group=group, d=128, dtype=dtype, device="cuda")
    check(case, mask_mod=windows)
    check(case, mask_mod=gaps)


@pytest.mark.parametrize("mask_mod", [None, windows])
@pytest.mark.parametrize("kind", ["quest", "mean", "oracle"])
def test_tokens_are_ranked_by_the_softmax_over_labels_whatever_scored_the_blocks(
    kind: str, mask_mod: MaskMod | None
) -> None:
    cfg = dataclasses.replace(CFG, index=kind)
    case = make(cfg, lens=[500, 430], s=500, hkv=1, group=4, device=DEVICE)
    # Heads that ask for much and for little: their softmaxes differ, and by boxes and means otherwise than by labels
    loud = torch.tensor([0.3, 1.0, 3.0, 6.0], device=DEVICE)[:, None, None]
    check(dataclasses.replace(case, q=case.q * loud), mask_mod=mask_mod)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize(
    ("batch_size", "group", "d", "t", "token_budget"),
    [(1, 4, 128, 1, 512), (16, 8, 128, 1, None), (3, 5, 64, 3, 512)],
)
def test_every_kind_of_index_in_long_contexts(
    kind: str, batch_size: int, group: int, d: int, t: int, token_budget: int | None
) -> None:
    """With few rows several programs share each, with many one is all."""
    cfg = tls.TLSConfig(index=kind, block_budget=2048, token_budget=token_budget)  # type: ignore[arg-type]
    lens = [9000 - 511 * i for i in range(batch_size)]
    check(make(cfg, lens=lens, s=9000, hkv=2, group=group, t=t, d=d, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize(
    ("group", "d", "t", "dtype"),
    [
        (1, 64, 1, torch.float32),
        (3, 80, 2, torch.bfloat16),
        (5, 96, 1, torch.float16),
        (7, 256, 1, torch.bfloat16),
        (8, 128, 2, torch.float32),
        (16, 128, 1, torch.bfloat16),
    ],
)
def test_groups_head_dims_and_dtypes(group: int, d: int, t: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter multiplies bfloat16 as integers")
    s = 5000 if DEVICE == "cuda" else 330
    case = make(CFG, lens=[s, 1 + t, s // 2], s=s, group=group, hkv=1, t=t, d=d, dtype=dtype, device=DEVICE)
    check(case)


# The second row of the first is shorter than the chunk: its first query sees nothing
@pytest.mark.parametrize(("t", "lens"), [(3, [80, 2]), (5, [80]), (8, [80])])
def test_several_query_tokens(t: int, lens: list[int]) -> None:
    cfg = tls.TLSConfig(
        block_size=16, block_budget=48, token_budget=24, sink_tokens=4, recent_tokens=8, label_dims=8, label_bits=4
    )
    # Interpreted, one program a row is the quickest: it goes through all phases at once
    with forced(INTERPRETED._replace(programs=1)) if DEVICE == "cpu" else contextlib.nullcontext():
        check(make(cfg, lens=lens, s=80, hkv=1, group=2, t=t, device=DEVICE))


@pytest.mark.cuda
@pytest.mark.parametrize("t", [3, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_several_query_tokens_in_long_contexts(t: int, batch_size: int) -> None:
    """With few rows several programs share each, with many one is all."""
    lens = [5000 - 307 * i for i in range(batch_size)]
    check(make(CFG, lens=lens, s=5000, hkv=2, group=4, t=t, d=128, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_block_sizes_and_every_token_of_the_blocks(size: int) -> None:
    cfg = dataclasses.replace(CFG, block_size=size, block_budget=4 * size + 256, token_budget=None)
    check(make(cfg, lens=[900, 65], s=900, group=4, d=64, device=DEVICE))


def test_few_tokens_of_blocks_of_128() -> None:
    cfg = dataclasses.replace(CFG, block_size=128, block_budget=512)
    check(make(cfg, lens=[640], s=640, hkv=1, group=2, device=DEVICE))


@pytest.mark.cuda
@pytest.mark.parametrize("token_budget", [100, 1024])
def test_some_tokens_of_large_blocks_of_long_contexts(token_budget: int) -> None:
    cfg = dataclasses.replace(CFG, block_size=128, block_budget=4096, token_budget=token_budget)
    check(make(cfg, lens=[20000, 9000], s=20000, group=4, d=128, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_long_contexts(batch_size: int) -> None:
    cfg = tls.TLSConfig(block_budget=4096, token_budget=1024)
    s = 98304 if batch_size == 1 else 20000
    lens = [s - 1237 * i % s for i in range(batch_size)]
    check(make(cfg, lens=lens, s=s, hkv=2, group=4, d=128, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.cuda
def test_a_million_tokens_and_more_than_two_to_the_31_elements() -> None:
    """Attention from the selection's own list, row by row: the reference would need copies of all keys."""
    s, hkv, d, device = 2**20 + 64, 9, 256, torch.device("cuda")
    cfg = tls.TLSConfig(block_size=16, block_budget=4096, token_budget=512)
    index = tls.KVIndex(
        cfg, batch_size=1, n_kv_heads=hkv, head_dim=d, capacity_tokens=s, dtype=torch.bfloat16, device=device
    )
    index.labels.codes.random_(-(2**31), 2**31 - 1)
    index.labels.step.fill_(0.1)
    index.seq_lens.fill_(s)
    index.max_len = s
    q = torch.randn(1, hkv, 1, d, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(1, hkv, s, d, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert k.numel() > 2**31
    got = attend(q, k, v, index, cfg, backend="triton", return_lse=True)
    assert got.tokens is not None
    ids = got.tokens.indices(512).long()[0, :, 0, :, None].expand(-1, -1, d)
    assert int(ids.max()) < s
    assert bool((got.tokens.counts == 512).all())
    keys, values = (x[0].gather(1, ids).double() for x in (k, v))
    weight = (q[0].double() @ keys.transpose(-1, -2) * d**-0.5).softmax(-1)
    truth = weight @ values
    assert float((got.out[0].double() - truth).norm() / truth.norm()) < 5e-3
    # The same blocks as the reference ranks them, but for a few whose exponentials round otherwise
    want = tls.select_blocks(q, index, cfg)
    assert got.blocks is not None
    assert int((got.blocks.kept() & want.kept()).sum()) >= 0.99 * int(want.counts.sum())


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_is_captured_without_synchronising_or_allocating(masked: bool) -> None:
    case = make(CFG, lens=[3000, 2000], s=4096, group=4, d=128, dtype=torch.bfloat16, device="cuda")
    index = case.index()
    mask_mod = documents(case) if masked else None
    step = partial(tls.two_level_attention, case.q, case.k, case.v, index, CFG, mask_mod=mask_mod, backend="triton")
    want = step().clone()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["num_device_alloc"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocated
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)
    # Grown in place, at the same addresses: the graph sees it
    index.append(case.k[:, :, :1])
    graph.replay()
    assert torch.equal(out, step())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["lowrank", "box", "oracle"])
def test_the_op_is_registered_as_pytorch_wants_it(kind: str, masked: bool) -> None:
    cfg = dataclasses.replace(CFG, index=kind)
    case = make(cfg, lens=[130, 70], s=140, hkv=1, group=3, d=16, device=DEVICE)
    index = case.index()
    visible = visible_to(case.q, index, index.seq_lens, window) if masked else None
    torch.library.opcheck(
        fused_attention,
        (case.q, case.k, case.v, index.seq_lens, *labels_of(index)),
        {"token_budget": 100, **options_of(index, cfg, 0.25), **summary_of(index), "visible": visible},
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_the_ops_of_every_layer_are_registered_as_pytorch_wants_them(labelled: bool) -> None:
    """A dense layer has no labels."""
    case = make(CFG, lens=[64, 40], s=66, group=3, d=16, t=2, device=DEVICE)
    labels = case.index().labels
    given = (labels.codes, labels.to_code, labels.offset, labels.words) if labelled else (None, None, None, [])
    checks = ("test_schema", "test_faketensor")
    new_k, new_v = case.k[:, :, :2].clone(), case.v[:, :, :2].clone()
    torch.library.opcheck(
        append_tokens, (new_k, new_v, case.seq_lens, case.k, case.v, *given),
        test_utils=checks,
    )  # fmt: skip
    arrivals = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        attend_all, (case.q, case.k, case.v, case.seq_lens, arrivals, 0.25),
        test_utils=checks,
    )  # fmt: skip


def test_older_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    obstacle = why_not_here(torch.device("cuda"))
    assert obstacle == "its kernels need compute capability 9.0 (Hopper) or newer, got NVIDIA A100"


@pytest.mark.cuda
@pytest.mark.parametrize("mask_mod", [None, windows])
def test_the_op_traces_into_a_compiled_step(mask_mod: MaskMod | None) -> None:
    case = make(CFG, lens=[300], s=320, group=2, d=64, dtype=torch.bfloat16, device="cuda")
    index = case.index()

    @torch.compile(fullgraph=True, dynamic=False)
    def step(q: Tensor) -> Tensor:
        return tls.two_level_attention(q * 2, case.k, case.v, index, CFG, mask_mod=mask_mod, backend="triton") + 1

    want = tls.two_level_attention(case.q * 2, case.k, case.v, index, CFG, mask_mod=mask_mod, backend="triton") + 1
    torch.testing.assert_close(step(case.q), want)


CUDA = pytest.mark.cuda


@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (64, torch.float16),
        pytest.param(128, torch.float16, marks=CUDA),
        pytest.param(64, torch.bfloat16, marks=CUDA),
        pytest.param(128, torch.bfloat16, marks=CUDA),
    ],
)
def test_the_error_is_no_larger_than_dense_attentions_over_the_same_tokens(d: int, dtype: torch.dtype) -> None:
    """Against float64, all seeds together; dense is PyTorch's flash attention, the chosen tokens gathered for it."""
    wrong = dict.fromkeys(("ours", "dense"), 0.0)
    size = 0.0
    s, kept, seeds = (20000, 1024, 8) if DEVICE == "cuda" else (330, 100, 3)
    cfg = tls.TLSConfig(block_budget=4096, token_budget=kept) if DEVICE == "cuda" else CFG
    for seed in range(seeds):
        case = make(cfg, lens=[s], s=s, hkv=1, group=4, d=d, dtype=dtype, seed=seed, device=DEVICE)
        got = attend(case.q, case.k, case.v, case.index(), cfg, backend="triton")
        assert got.tokens is not None
        assert bool((got.tokens.counts == kept).all())
        ids = got.tokens.indices(kept).long()[0, 0, 0]
        q, k, v = case.q.view(1, 1, 4, d), case.k[:, :, ids], case.v[:, :, ids]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            dense = scaled_dot_product_attention(q, k, v)
        truth = (q.double() @ k.double().mT * d**-0.5).softmax(-1) @ v.double()
        for name, out in (("ours", got.out), ("dense", dense)):
            wrong[name] += float((out.view(truth.shape).double() - truth).square().sum())
        size += float(truth.square().sum())
    ours, theirs = ((wrong[name] / size) ** 0.5 for name in ("ours", "dense"))
    assert ours <= 1.1 * theirs + torch.finfo(torch.float32).eps


@pytest.mark.cuda
def test_auto_takes_the_fused_kernels_where_they_can_run() -> None:
    case = make(CFG, lens=[300], s=320, group=2, d=64, dtype=torch.bfloat16, device="cuda")
    call = partial(tls.two_level_attention, case.q, case.k, case.v, case.index(), CFG)
    assert torch.equal(call(), call(backend="triton"))
