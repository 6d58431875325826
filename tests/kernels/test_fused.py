"""The fused kernels against the reference: on a GPU as compiled, elsewhere interpreted, on smaller shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import Attended, attend
from flex_tls.device import why_not_here
from flex_tls.reference import attention_reference
from tests.cases import Case, assert_as_exact, cases, make

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CFG = tls.TLSConfig(block_size=32, block_budget=256, token_budget=100, sink_tokens=16, recent_tokens=40)


def to_device(case: Case) -> Case:
    moved = {name: x.to(DEVICE) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return dataclasses.replace(case, **moved)


def check(case: Case, scale: float | None = None) -> Attended:
    """Same selection but for ties that rounding breaks, attention as exact as PyTorch's, workspace as it was."""
    index = case.index()
    got = attend(case.q, case.k, case.v, index, case.cfg, scale=scale, backend="triton", return_lse=True)
    want = attend(case.q, case.k, case.v, index, case.cfg, scale=scale, backend="reference")
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
    truth, lse = attention_reference(*wide, got.tokens, scale=used)
    low = attention_reference(case.q, case.k, case.v, got.tokens, scale=used)[0]
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


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_block_sizes_and_every_token_of_the_blocks(size: int) -> None:
    cfg = dataclasses.replace(CFG, block_size=size, block_budget=4 * size + 256, token_budget=None)
    check(make(cfg, lens=[900, 65], s=900, group=4, d=64, device=DEVICE))


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
def test_a_step_is_captured_without_synchronising_or_allocating() -> None:
    case = make(CFG, lens=[3000, 2000], s=4096, group=4, d=128, dtype=torch.bfloat16, device="cuda")
    index = case.index()
    want = tls.two_level_attention(case.q, case.k, case.v, index, CFG, backend="triton").clone()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["num_device_alloc"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            tls.two_level_attention(case.q, case.k, case.v, index, CFG, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocated
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tls.two_level_attention(case.q, case.k, case.v, index, CFG, backend="triton")
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)
    # Grown in place, at the same addresses: the graph sees it
    index.append(case.k[:, :, :1])
    graph.replay()
    assert torch.equal(out, tls.two_level_attention(case.q, case.k, case.v, index, CFG, backend="triton"))


def test_the_op_is_registered_as_pytorch_wants_it() -> None:
    case = make(CFG, lens=[300, 70], s=320, group=3, d=16, device=DEVICE)
    index = case.index()
    labels = index.labels
    torch.library.opcheck(
        torch.ops.flex_tls.fused_attention.default,
        (case.q, case.k, case.v, index.seq_lens, labels.codes, labels.to_query, labels.low, labels.step,
         index.arrivals, labels.words, 32, 8, 100, 16, 40, 0.25, 16, "max", "softmax_mean"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_older_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    obstacle = why_not_here(torch.device("cuda"))
    assert obstacle == "its kernels need compute capability 9.0 (Hopper) or newer, got NVIDIA A100"


@pytest.mark.cuda
def test_the_op_traces_into_a_compiled_step() -> None:
    case = make(CFG, lens=[300], s=320, group=2, d=64, dtype=torch.bfloat16, device="cuda")
    index = case.index()

    @torch.compile(fullgraph=True, dynamic=False)
    def step(q: Tensor) -> Tensor:
        return tls.two_level_attention(q * 2, case.k, case.v, index, CFG) + 1

    want = tls.two_level_attention(case.q * 2, case.k, case.v, index, CFG, backend="triton") + 1
    torch.testing.assert_close(step(case.q), want)


@pytest.mark.cuda
def test_auto_takes_the_fused_kernels_where_they_can_run() -> None:
    case = make(CFG, lens=[300], s=320, group=2, d=64, dtype=torch.bfloat16, device="cuda")
    index = case.index()
    fused = tls.two_level_attention(case.q, case.k, case.v, index, CFG, backend="triton")
    assert torch.equal(tls.two_level_attention(case.q, case.k, case.v, index, CFG), fused)
