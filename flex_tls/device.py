"""Where the Triton kernels run, by which driver, and how the host reads what a device computed without stalling it."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
# That the kernels compute in
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_here(device: torch.device) -> str | None:
    """What keeps the fused kernels from ``device``; None if nothing does."""
    if not INSTALLED:
        return "triton is not installed; pip install triton"
    if device.type != "cuda" and not is_interpreted():
        return f"its kernels need a CUDA device, got {device}"
    # A traced call cannot ask
    if device.type == "cuda" and not torch.compiler.is_compiling():
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, got a ROCm build of torch"
        if torch.cuda.get_device_capability(device) < (9, 0):
            return f"its kernels need compute capability 9.0 (Hopper) or newer, got {torch.cuda.get_device_name()}"
    return None


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, slowly, for tests; it says so itself."""
    from .kernels.tiles import NATIVE

    return not NATIVE


def driver_version() -> str:
    """The GPU driver's; "" where its tool is missing, as in some containers."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def to_host(x: Tensor) -> tuple[Tensor, Any]:
    """A copy of ``x`` on the host, and the event that says when it has arrived; None if it has.

    The copy is queued on the current stream, into page-locked memory, and nothing waits for it here.
    """
    if not x.is_cuda:
        return x.clone(), None
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    event.record()
    return copy, event
