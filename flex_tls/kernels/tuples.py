"""Tuples that grow, and become one tensor: Triton has no lists, and no unpacking."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extended(values, value):
    """The tuple ``values`` with one more."""
    return values + (value,)  # noqa: RUF005 - see above


@triton.constexpr_function
def _halvings(n: int) -> int:
    """How often the next power of two can be halved."""
    return (n - 1).bit_length()


@triton.jit
def stacked(columns, N: tl.constexpr):
    """N tensors [...] as one, [..., N]; the last of them again up to a power of two."""
    LEVELS: tl.constexpr = _halvings(N)
    shape: tl.constexpr = columns[0].shape
    for _ in tl.static_range(2**LEVELS - N):
        columns = extended(columns, columns[N - 1])
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(2 ** (LEVELS - 1 - level)):
            joined = extended(joined, tl.join(columns[i], columns[i + 2 ** (LEVELS - 1 - level)]))
        columns = joined
    return tl.reshape(columns[0], shape + [2**LEVELS])  # noqa: RUF005 - see above
