"""Where the Triton kernels run."""

from __future__ import annotations

from importlib.util import find_spec

import torch

INSTALLED = find_spec("triton") is not None


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
