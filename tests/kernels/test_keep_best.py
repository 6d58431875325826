"""The exact choice: the k best of any scores, ties to the lower place, in one chunk and in several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
tl = triton.language

from flex_tls.kernels.keep_best import find_edge, load_words, make_key, write_list  # noqa: E402 - needs triton
from flex_tls.kernels.tiles import NATIVE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A compiled count takes four words a thread at once
LEAST = 1024 if NATIVE else 32


@triton.jit
def choose(ranks, n, k, words, keys, out, count, first, end, POSITIVE: tl.constexpr, BN: tl.constexpr,
           CHUNKS: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    for chunk in range(CHUNKS):
        place = chunk * BN + tl.arange(0, BN)
        rank = tl.load(ranks + place, place < n, other=0.0)
        alive = (place < n) & (rank > float("-inf"))
        tl.store(keys + place, make_key(rank, alive, rank == float("inf"), POSITIVE).to(tl.int16))
    tl.debug_barrier()
    chunk_words = load_words(words, 0, BN * CHUNKS, BN)
    edge, ties = find_edge(chunk_words, words, BN * CHUNKS, k, POSITIVE, BN, CHUNKS, NATIVE)
    kept = write_list(chunk_words, words, BN * CHUNKS, edge, ties, out, out, first, end, n, BN, CHUNKS, WIDTH, 16,
                      False, NATIVE)  # fmt: skip
    tl.store(count, kept)


def kept(ranks: Tensor, k: int, chunk: int, parts: int = 1) -> list[int]:
    """The list, written in ``parts`` as several programs would."""
    n, chunk = len(ranks), max(chunk, LEAST)
    chunks = -(-n // chunk)
    words = torch.empty(chunks * chunk // 2, dtype=torch.int32, device=DEVICE)
    out = torch.full((k + 9,), -7, dtype=torch.int32, device=DEVICE)
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    per = -(-k // parts)
    for first in range(0, k, per):
        choose[(1,)](ranks.to(DEVICE), n, k, words, words.view(torch.int16), out, count, first, min(k, first + per),
                     POSITIVE=bool((ranks >= 0).all()), BN=chunk, CHUNKS=chunks,
                     WIDTH=triton.next_power_of_2(per), NATIVE=NATIVE)  # fmt: skip
    assert out[k:].eq(-7).all(), "wrote past its list"
    found: list[int] = out[: int(count)].tolist()
    assert out[int(count) : k].eq(n).all(), "left an entry unfilled"
    return found


def rounded(ranks: Tensor) -> Tensor:
    """What keys keep of a rank: bfloat16's digits if none is negative, else float16's."""
    if bool((ranks >= 0).all()):
        return torch.where(ranks.isposinf(), ranks, (ranks.view(torch.int32) & -65536).view(torch.float32))
    return torch.where(ranks.isinf(), ranks, ranks.clamp(-65472, 65472).half().float())


def expected(ranks: Tensor, k: int) -> list[int]:
    """By a stable sort: of equal keys the lower place comes first; -inf never counts, +inf always does."""
    order = rounded(ranks).sort(descending=True, stable=True).indices[:k]
    return sorted(int(i) for i in order if ranks[i] > -torch.inf)


RANKS = st.lists(
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-4, 4, width=16)
    | st.sampled_from((0.0, -0.0, 1.0, -1.0, 1e-40, -torch.inf, 3.4e38)),
    min_size=1,
    max_size=70,
)
SHARES = st.lists(st.floats(0, 1, width=32) | st.sampled_from((0.0, 1e-40, 0.5, torch.inf)), min_size=1, max_size=70)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))
@example([0.0, -7e16, -torch.inf, 8e24, -2.875, -3e16, -3.375, 0.0, 0.0, 1.0], 66, 32, 1)
@given(RANKS | SHARES, st.integers(1, 70), st.sampled_from((32, 128)), st.sampled_from((1, 3)))
def test_the_choice_is_that_of_a_stable_sort(values: list[float], k: int, chunk: int, parts: int) -> None:
    ranks = torch.tensor(values)
    k = max(min(k, len(values)), int(ranks.isposinf().sum()))
    assert kept(ranks, k, chunk, parts) == expected(ranks, k)


def adversarial(n: int) -> list[Tensor]:
    place = torch.arange(n)
    return [
        torch.zeros(n),
        torch.where(place % 3 == 0, 1.0, -1.0),
        torch.where(place % 5 == 0, 2.0, -torch.inf),
        torch.full((n,), -torch.inf),
        torch.where(place == n * 4 // 5, 3e38, 1e-30),
        place.float(),
        -place.float(),
        torch.full((n,), 1.0).view(torch.int32).add(place % 2).view(torch.float32),
    ]


@pytest.mark.parametrize(("k", "chunk"), [(1, 256), (7, 64), (200, 64), (200, 256), (256, 64)])
def test_adversarial_scores(k: int, chunk: int) -> None:
    for scores in adversarial(256):
        assert kept(scores, k, chunk) == expected(scores, k)


def test_adversarial_scores_in_some_large_chunks() -> None:
    for scores in adversarial(8192):
        assert kept(scores, 1024, 4096) == expected(scores, 1024)


SIZES = [(65536, 512), (8192, 1024), (100_000, 4096)]


@pytest.mark.cuda
@pytest.mark.parametrize(("n", "k"), [*SIZES, (8192, 1), (65536, 1), (100_000, 7)])
def test_adversarial_scores_of_many_candidates(n: int, k: int) -> None:
    for scores in adversarial(n):
        assert kept(scores, k, 8192) == expected(scores, k)


@pytest.mark.cuda
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_many_candidates(n: int, k: int) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).half().float()
    assert kept(scores, k, 8192) == expected(scores, k)


def distinct(n: int, positive: bool, seed: int) -> Tensor:
    """In any order, numbers that keys tell apart: bfloat16's if none is negative, else float16's of both signs."""
    if positive:
        # Up to the largest key, two below infinity's
        every = torch.arange(0x7C00 - 1).to(torch.int16).view(torch.bfloat16).float()
    else:
        half = torch.arange(1, 0x7C00 - 1).to(torch.int16).view(torch.float16).float()
        every = torch.cat([half, -half])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:n]]


def assert_topk(ranks: Tensor, k: int, chunk: int) -> None:
    assert ranks.unique().numel() == len(ranks)
    assert kept(ranks, k, chunk) == sorted(ranks.topk(k).indices.tolist())


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize(("k", "chunk"), [(1, 2048), (500, 512), (1999, 512)])
def test_of_distinct_scores_it_is_what_topk_takes(k: int, chunk: int, positive: bool) -> None:
    assert_topk(distinct(2000, positive, k), k, chunk)


@pytest.mark.cuda
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("k", [1, 1024, 4096])
def test_of_many_distinct_scores_it_is_what_topk_takes(k: int, positive: bool) -> None:
    assert_topk(distinct(30_000, positive, k), k, 8192)
