"""Where the time of one decode step goes: a profile's kernels, grouped into stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .rows import Machine, StageRow

# In order: the first pattern that a kernel's name holds. Inductor's names list what was fused
STAGES = (
    ("append", r"^append"),
    ("two-level attention", r"^two_level"),
    ("full attention", r"^attend|fmha|flash|sdpa"),
    (
        "matrix products",
        r"^skinny|gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|dot_kernel|reduce_1Block|triton_tem|_mm(_|$)|addmm",
    ),
    ("norms, rotary, activations", r"^triton_"),
)
OTHER = "sampling, copies"


class Kernel(NamedTuple):
    """One kernel of a profile; microseconds."""

    name: str
    start_us: float
    us: float


def stage_of(name: str) -> str:
    """The stage that a kernel's name says."""
    return next((stage for stage, pattern in STAGES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def profile(step: Callable[[], object], steps: int) -> list[Kernel]:
    """Kernels of ``steps`` calls, in order; CUDA only."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in found.events()
        if event.device_type == cuda
    ]
    return sorted(kernels, key=lambda kernel: kernel.start_us)


def stage_row(
    kernels: Sequence[Kernel], steps: int, case: str, batch_size: int, n_layers: int, context: int, provider: str,
    machine: Machine,
) -> StageRow:  # fmt: skip
    """The row of a profile of ``steps`` steps."""
    us: dict[str, float] = {}
    count: dict[str, float] = {}
    for kernel in kernels:
        stage = stage_of(kernel.name)
        us[stage] = us.get(stage, 0.0) + kernel.us / steps
        count[stage] = count.get(stage, 0.0) + 1 / steps
    return StageRow(
        bench="stages", case=case, B=batch_size, n_layers=n_layers, context=context, provider=provider,
        stage_us=us, stage_kernels=count, layer=one_layer(kernels, steps, n_layers), **machine._asdict(),
    )  # fmt: skip


def one_layer(kernels: Sequence[Kernel], steps: int, n_layers: int) -> list[list[object]]:
    """From one ``append`` to the next, in the middle of the last step: [stage, start, duration], from 0.

    Empty if there is not one ``append`` a layer and step.
    """
    first = [i for i, kernel in enumerate(kernels) if stage_of(kernel.name) == "append"]
    if len(first) != steps * n_layers or n_layers < 2:
        return []
    middle = (steps - 1) * n_layers + max(0, n_layers // 2 - 1)
    chosen = kernels[first[middle] : first[middle + 1]]
    return [[stage_of(k.name), k.start_us - chosen[0].start_us, k.us] for k in chosen]
