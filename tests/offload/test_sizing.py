"""Slots shared out among layers by what each missed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from flex_tls.offload import balanced_slots
from flex_tls.offload.sizing import STEEPNESS
from hypothesis import given
from hypothesis import strategies as st

LEAST, MOST = 10, 200
LAYERS = st.lists(st.tuples(st.integers(LEAST, MOST), st.floats(0, 1)), min_size=1, max_size=40)


@given(LAYERS)
def test_slots_stay_within_the_bounds_and_the_total(layers: list[tuple[int, float]]) -> None:
    slots, misses = zip(*layers, strict=True)
    sizes = balanced_slots(slots, misses, least=LEAST, most=MOST)
    assert len(sizes) == len(slots)
    assert all(LEAST <= size <= MOST for size in sizes)
    full = all(size == MOST for size, miss in zip(sizes, misses, strict=True) if miss)
    assert sum(sizes) == sum(slots) or (full and sum(sizes) < sum(slots))


@given(st.integers(LEAST, MOST), st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_a_layer_that_missed_more_never_gets_fewer(slots: int, misses: list[float]) -> None:
    """But for one slot, where what is left does not go round layers that missed as much."""
    sizes = balanced_slots([slots] * len(misses), misses, least=LEAST, most=MOST)
    found = sorted(zip(misses, sizes, strict=True))
    assert all(a[1] <= b[1] + 1 for a, b in pairwise(found))


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=20), st.lists(st.integers(50, 90), min_size=20, max_size=20))
def test_where_misses_fall_as_supposed_the_answer_does_not_depend_on_where_one_starts(
    need: list[float], slots: list[int]
) -> None:
    slots = slots[: len(need)]
    misses = [0.01 * a * (p / 70) ** -STEEPNESS for a, p in zip(need, slots, strict=True)]
    even = [sum(slots) // len(slots)] * len(slots)
    even[0] += sum(slots) - sum(even)
    again = [0.01 * a * (p / 70) ** -STEEPNESS for a, p in zip(need, even, strict=True)]
    sizes = balanced_slots(slots, misses, least=LEAST, most=MOST)
    others = balanced_slots(even, again, least=LEAST, most=MOST)
    assert all(abs(a - b) <= 1 for a, b in zip(sizes, others, strict=True))


def test_what_never_missed_stays_as_it_is() -> None:
    assert balanced_slots([20, 30], [0.0, 0.0], least=LEAST, most=MOST) == (20, 30)


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_slots_go_with_the_fifth_root_of_misses(share: float) -> None:
    sizes = balanced_slots([64, 64], [share, share / 16], least=LEAST, most=MOST)
    assert sizes[0] / sizes[1] == pytest.approx(16 ** (1 / 5), rel=0.05)
