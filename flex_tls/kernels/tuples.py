"""Tuples that grow: Triton has no lists, and no unpacking."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it in every module


@triton.jit
def extended(values, value):
    """The tuple ``values`` with one more."""
    return values + (value,)  # noqa: RUF005 - see above
