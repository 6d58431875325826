"""What the operator bench compares, registered by name in the order of its tables.

A provider turns a case's input sets into calls to be timed. Baselines are written as well as we can write them: dense
kernels get their best form, FlexAttention the folded queries and partial block lists of docs/design.md, and the
published selection methods Triton kernels of their own, with our exact choice and our attention kernel.
"""

from . import dense, sliding_window, given, quest, double_sparsity, two_level  # noqa: F401, I001 - in the tables' order
from .registry import PROVIDERS, Job, Provider

__all__ = ["PROVIDERS", "Job", "Provider"]
