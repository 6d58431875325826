"""Compiles kernels for a Hopper GPU where there is none: ``python -m tests.kernels.compile_for_gpu``, not interpreted.

Interpreted, a kernel passes with what Triton's compiler refuses. Nothing is launched; prints a line for each kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import flex_tls as tls
from flex_tls.fused import attend_fused
from flex_tls.kernels.skinny import launch_skinny_product
from flex_tls.kernels.tile_table import forced
from flex_tls.kernels.tiles import rule

PROCESSORS = 132


class Hopper:
    """What Triton asks of a driver to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def attention(
    dtype: torch.dtype = torch.bfloat16, group: int = 4, b: int = 1, hkv: int = 8, s: int = 98304, d: int = 128,
    mask: Callable[..., Any] | None = None, **options: Any,
) -> None:  # fmt: skip
    """The fused kernel with the tiles that a GPU would get."""
    cfg = tls.TLSConfig(**options)
    index = tls.KVIndex(cfg, batch_size=b, n_kv_heads=hkv, head_dim=d, capacity_tokens=s, dtype=dtype)
    q, k = torch.empty(b, hkv * group, 1, d, dtype=dtype), torch.empty(b, hkv, s, d, dtype=dtype)
    with forced(rule(PROCESSORS, head_bytes=d * q.element_size(), rows=b * hkv)):
        attend_fused(q, k, k, index, cfg, d**-0.5, mask_mod=mask)


def products(rows: int) -> None:
    """A product of few rows."""
    launch_skinny_product(torch.empty(rows, 4096).bfloat16(), torch.empty(256, 4096).bfloat16(), None)


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A sliding window, as a user's mask_mod."""
    return q_idx - kv_idx < 1000


CASES: dict[str, Callable[[], None]] = {
    "one sequence": attention,
    "many sequences, half the index": lambda: attention(b=16, s=8192, label_bits=(4, 2)),
    "float32, five heads, a mask": lambda: attention(torch.float32, group=5, hkv=2, s=8192, mask=window),
    "boxes": lambda: attention(index="quest", hkv=2),
    "means and a mask, raw ranks": lambda: attention(index="mean", hkv=2, mask=window, group_reduce="mean"),
    "sixteen heads and a mask": lambda: attention(group=16, hkv=1, s=8192, mask=window),
    "keys": lambda: attention(index="oracle", hkv=1, s=8192),
    "one row": lambda: products(1),
    "two rows": lambda: products(2),
    "four rows": lambda: products(4),
}


def main() -> None:
    """Compile every case; prints its name and the bytes of shared memory."""
    driver.set_active(Hopper())
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_only
    for name, case in CASES.items():
        compiled.clear()
        case()
        kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in compiled]
        sys.stdout.write(f"{name}: {max(kernel.metadata.shared for kernel in kernels)}\n")


if __name__ == "__main__":
    main()
