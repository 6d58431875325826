"""Launches that overlap: a kernel is set up while the one before it still runs (programmatic dependent launch)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(NATIVE: tl.constexpr):
    """Wait until all before is done and visible: before anything is written, and before what may be new is read.

    Only then is the next kernel set up, which waits by itself. Were it earlier, three launches would be under way at
    once, and programs of the third take whatever room they find, two on one processor and none on another
    (docs/design.md, section 8).
    """
    if NATIVE:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Let the lines that pointers are on come to the L2 cache: a hint, and so allowed before :func:`follow`."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
