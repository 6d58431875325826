"""The GPU's clock, added to a sum: before a wait and after it, so that the sum grows by what the wait took."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from .tiles import NATIVE, padded


@triton.jit
def stamp(total, n, SIGN: tl.constexpr, P: tl.constexpr, NATIVE: tl.constexpr):
    """One program adds the time, or takes it away; interpreted there is no clock, nor anything to wait for."""
    if NATIVE:
        i = tl.arange(0, P)
        tl.store(total + i, tl.load(total + i, i < n) + SIGN * globaltimer(), i < n)


def launch_stamp(total: Tensor, *, after: bool) -> None:
    """Nanoseconds, to every number of ``total`` int64, contiguous: taken away, or added if ``after``."""
    stamp[(1,)](
        total, total.numel(), SIGN=1 if after else -1, P=padded(total.numel()), NATIVE=NATIVE, num_warps=1
    )  # fmt: skip
