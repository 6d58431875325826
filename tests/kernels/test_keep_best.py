"""The exact choice: the k best of any scores, ties to the lower place, in one chunk and in several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
tl = triton.language

from flex_tls.kernels.keep_best import keep_best  # noqa: E402 - needs triton
from flex_tls.kernels.tiles import NATIVE  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def choose(scores, n, k, keys, out, count, K, position, sinks, recent, BN: tl.constexpr, CHUNKS: tl.constexpr,
           KP: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    keep_best(
        scores,
        n,
        k,
        out,
        keys,
        out,
        count,
        n,
        position,
        sinks,
        recent,
        n,
        K,
        1,
        1,
        BN,
        CHUNKS,
        KP,
        16,
        16,
        WHOLE,
        "max",
        NATIVE,
    )


def kept(scores: Tensor, k: int, chunk: int) -> list[int]:
    n = len(scores)
    out, keys = (torch.full((n + k,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    chunks = -(-n // chunk)
    choose[(1,)](scores.to(DEVICE), n, k, keys, out, count, k, 2**30, 0, 0, BN=chunk, CHUNKS=chunks,
                 KP=triton.next_power_of_2(k), WHOLE=n == chunk * chunks, NATIVE=NATIVE)  # fmt: skip
    assert out[k:].eq(-7).all(), "wrote past its list"
    found = out[: int(count)].tolist()
    assert out[int(count) : k].eq(n).all(), "left an entry unfilled"
    return found


def expected(scores: Tensor, k: int) -> list[int]:
    """By a stable sort: of equal scores the lower place comes first; -inf never counts."""
    order = scores.sort(descending=True, stable=True).indices[:k]
    return sorted(int(i) for i in order if scores[i] > -torch.inf)


FLOATS = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from((0.0, -0.0, 1.0, -1.0, 1e-40, -torch.inf, 3.4e38)),
)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))
@given(st.lists(FLOATS, min_size=1, max_size=70), st.integers(1, 70), st.sampled_from((16, 128)))
def test_the_choice_is_that_of_a_stable_sort(values: list[float], k: int, chunk: int) -> None:
    scores = torch.tensor(values)
    assert kept(scores, min(k, len(values)), chunk) == expected(scores, min(k, len(values)))


@pytest.mark.parametrize("k", [1, 7, 64, 200, 256])
@pytest.mark.parametrize("chunk", [64, 256])
def test_adversarial_scores(k: int, chunk: int) -> None:
    place = torch.arange(256)
    for scores in (
        torch.zeros(256),
        torch.where(place % 3 == 0, 1.0, -1.0),
        torch.where(place % 5 == 0, 2.0, -torch.inf),
        torch.full((256,), -torch.inf),
        torch.where(place == 200, 3e38, 1e-30),
        place.float(),
        -place.float(),
        torch.full((256,), 1.0).view(torch.int32).add(place % 2).view(torch.float32),
    ):
        assert kept(scores, k, chunk) == expected(scores, k)


@pytest.mark.cuda
@pytest.mark.parametrize(("n", "k"), [(65536, 512), (8192, 1024), (100_000, 4096)])
def test_many_candidates(n: int, k: int) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).half().float()
    assert kept(scores, k, 8192) == expected(scores, k)
