"""What every test shares: hypothesis profiles, threads, and who needs a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before any kernel is imported: without a GPU they run on the CPU, interpreted
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Choose with pytest's --hypothesis-profile. No deadline: a first compiled call takes seconds. Too-slow checks are off
# for the same reason; drawing is quick, what is drawn is compiled
settings.register_profile(
    "dev", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
# The same examples in every run: a failure in CI is the submission's, not the dice's
settings.register_profile("ci", settings.get_profile("dev"), max_examples=30, derandomize=True)
settings.register_profile("deep", settings.get_profile("dev"), max_examples=1000)
settings.load_profile("dev")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among xdist's workers; beyond four threads the tests' small tensors only wait for each other."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // workers)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``cuda`` where there is no such device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(skip)
