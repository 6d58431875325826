"""Kernels that pass interpreted compile for a GPU too, and fit its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.compile_for_gpu import CASES

# Of one program on Hopper and newer
SHARED_BYTES = 227 * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them")
def test_kernels_compile_for_a_gpu() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [int(line.rpartition(": ")[2]) for line in done.stdout.splitlines()]
    assert len(shared) == len(CASES)
    assert max(shared) <= SHARED_BYTES
