"""The stamp: a sum grows by the time from one to the next; interpreted there is no clock."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flex_tls.kernels.stamp import launch_stamp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Three sums, and a number beyond them: they are no power of two
BEFORE = (0, 5, -7, 11)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has a clock")
def test_interpreted_it_changes_nothing() -> None:
    total = torch.tensor(BEFORE)
    for after in (False, True):
        launch_stamp(total[:3], after=after)
        assert tuple(total.tolist()) == BEFORE


@pytest.mark.cuda
def test_every_sum_grows_by_what_lies_between_two_stamps() -> None:
    total = torch.tensor(BEFORE, device="cuda")
    grown = [0, 0, 0]
    for _ in range(2):
        launch_stamp(total[:3], after=False)
        # Ten milliseconds at 2 GHz
        torch.cuda._sleep(20_000_000)
        launch_stamp(total[:3], after=True)
        now = total.tolist()
        assert now[3] == BEFORE[3]
        for i in range(3):
            more = now[i] - BEFORE[i] - grown[i]
            assert 5_000_000 < more < 10_000_000_000, "nanoseconds"
            grown[i] += more
