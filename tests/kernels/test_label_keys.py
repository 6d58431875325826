"""The labelling kernel: every channel's code is the nearest to the exact product, and nothing else is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.labels import TokenLabels, label_keys

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 as integers (3.7)
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == "cuda" else ()))
UNTOUCHED = 0x5A5A5A5A


def random_labels(b: int, h: int, s: int, d: int, dims: int, bits: int | tuple[int, ...]) -> TokenLabels:
    dims = min(dims, d)
    words = (bits,) * -(-dims * bits // 32) if isinstance(bits, int) else bits
    dims = min(dims, sum(32 // each for each in words))
    labels = TokenLabels.empty(b, h, s, d, dims=dims, words=words, device=torch.device(DEVICE))
    labels.codes.fill_(UNTOUCHED)
    labels.to_code.normal_(std=d**-0.5).mul_((labels.levels + 1) / 4)
    labels.offset.normal_().add_((labels.levels + 1) / 2)
    return labels


def unpack(codes: Tensor, words: tuple[int, ...], dims: int) -> Tensor:
    """[B, HKV, W, S] -> [B, HKV, S, C]."""
    channels = [
        (codes[:, :, word] >> (place * bits)) & (2**bits - 1)
        for word, bits in enumerate(words)
        for place in range(32 // bits)
    ]
    assert not any(x.any() for x in channels[dims:])
    return torch.stack(channels[:dims], -1)


def assert_nearest(labels: TokenLabels, k: Tensor, row: int, start: int, count: int) -> None:
    assert labels.words is not None
    codes = labels.codes[row : row + 1, :, :, start : start + count]
    got = unpack(codes, labels.words, labels.low.shape[-1])[0].double()
    key, to_code, offset = k[row, :, :count].double(), labels.to_code[row].double(), labels.offset[row].double()
    exact = (key @ to_code + offset[:, None]).clamp_min(0).minimum(labels.levels.double())
    # Three parts of TF32 or bfloat16 lose some 2^-21 of a product
    slack = 2.0**-18 * (key.abs() @ to_code.abs() + offset[:, None].abs())
    assert bool(((got - exact).abs() <= 0.5 + slack).all())


# Interpreted kernels are slow: a failure is reported as drawn, not shrunk
@settings(max_examples=20, phases=(Phase.explicit, Phase.generate))
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    h=st.integers(1, 2),
    d=st.sampled_from((16, 64, 80, 96, 128, 256)),
    dims=st.sampled_from((1, 7, 16, 32, 100)),
    bits=st.sampled_from((2, 4, 8)) | st.lists(st.sampled_from((2, 4, 8)), min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from(DTYPES),
    counted=st.booleans(),
    seed=st.integers(0, 2**31),
)
# Places behind a wide word's last channel lie past its 32 bits
@example([35, 13, 46], 1, 16, 32, (8, 2), torch.float16, False, 503639216)
@example([70], 1, 64, 24, (4, 2), torch.float16, False, 0)
def test_every_code_is_the_nearest_and_no_other_slot_is_written(
    counts: list[int],
    h: int,
    d: int,
    dims: int,
    bits: int | tuple[int, ...],
    dtype: torch.dtype,
    counted: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    b, t = len(counts), max(*counts, 1)
    if not counted:
        counts = [t] * b
    start = torch.randint(0, 30, (b,))
    # Lengths as they lie in some wider table; more than there are count for all
    table = torch.tensor([[n if n < t else n + 3, 99] for n in counts], device=DEVICE)
    labels = random_labels(b, h, 100, d, dims, bits)
    # Heads innermost, as a projection leaves them
    k = torch.randn(b, t, h, d, device=DEVICE).to(dtype).transpose(1, 2)
    given_counts = table[:, 0] if counted else None
    label_keys(k, start.to(DEVICE), given_counts, labels.codes, labels.to_code, labels.offset, labels.words)
    for row, (first, count) in enumerate(zip(start.tolist(), counts, strict=True)):
        assert_nearest(labels, k, row, first, count)
        untouched = labels.codes[row].clone()
        untouched[..., first : first + count] = UNTOUCHED
        assert bool((untouched == UNTOUCHED).all())


def test_the_op_is_well_formed() -> None:
    labels = random_labels(2, 2, 64, 64, 32, 4)
    k = torch.randn(2, 2, 40, 64, device=DEVICE)
    start, counts = torch.tensor([3, 0], device=DEVICE), torch.tensor([40, 7], device=DEVICE)
    torch.library.opcheck(label_keys, (k, start, counts, labels.codes, labels.to_code, labels.offset, labels.words))


@pytest.mark.cuda
def test_an_index_built_by_the_kernel_is_the_one_built_without_it() -> None:
    cfg = tls.TLSConfig(block_size=32, block_budget=256, token_budget=128, sink_tokens=32, recent_tokens=32)
    k = torch.randn(3, 2, 1000, 128, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor([1000, 1, 517], device="cuda")
    index = tls.KVIndex.build(k, cfg, lens, capacity_tokens=1100)
    want = unpack(index.labels.encode(k), (4,) * 4, 32)
    for row, count in enumerate(lens.tolist()):
        assert_nearest(index.labels, k, row, 0, count)
        got = unpack(index.labels.codes[row : row + 1, :, :, :count], (4,) * 4, 32)
        # Sums run in another order: a channel on the edge of two codes may take either, and a single token's all are
        if count > 1:
            assert (got != want[row : row + 1, :, :count]).float().mean() < 1e-3


@pytest.mark.cuda
def test_more_elements_than_32_bits_count() -> None:
    t, d = 2**31 // 64 + 1000, 64
    labels = random_labels(1, 1, t, d, 32, 4)
    k = torch.empty(1, 1, t, d, dtype=torch.bfloat16, device="cuda")
    k[:, :, -1000:].normal_()
    label_keys(
        k,
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        None,
        labels.codes,
        labels.to_code,
        labels.offset,
        labels.words,
    )
    last = TokenLabels(**{**labels.tensors, "codes": labels.codes[..., -1000:]}, words=labels.words)
    assert_nearest(last, k[:, :, -1000:], 0, 0, 1000)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_the_kernel_waits_for_nobody_and_is_captured() -> None:
    labels = random_labels(1, 8, 4096, 128, 32, 4)
    k = torch.randn(1, 8, 4096, 128, dtype=torch.bfloat16, device="cuda")
    start = torch.zeros(1, dtype=torch.int64, device="cuda")
    args = (k, start, None, labels.codes, labels.to_code, labels.offset, labels.words)
    label_keys(*args)
    want = labels.codes.clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            label_keys(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    labels.codes.zero_()
    graph.replay()
    assert torch.equal(labels.codes, want)
