"""What a user's ``mask_mod`` lets a head see: one bit a slot, causality included, lowest bits first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_visible(visible, slot, there):
    """Whether the bit of ``slot`` is set in the bytes at ``visible``; False where not ``there``.

    Whole words would be loaded ahead into shared memory in a pipelined loop, and of 16 heads not fit there.
    """
    return ((tl.load(visible + slot // 8, there, other=0) >> (slot % 8)) & 1) != 0
