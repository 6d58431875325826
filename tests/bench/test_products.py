"""The products bench runs to its end without a GPU, where the kernel is interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import rows, timing
from bench.__main__ import main
from bench.products import shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_command_appends_rows_of_every_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    # Interpreted, a call takes a second
    monkeypatch.setattr(timing, "WARM_UP", 0)
    out = tmp_path / "rows.jsonl"
    options = ["--device", DEVICE, "--model", "tiny", "--rows", "2,5", "--runs", "2", "--commit", "abc"]
    assert main(["run", "products", *options, "--out", str(out)]) == 0
    found = rows.read(out, rows.ProductRow)
    # More than four rows are left to torch
    want = {
        (name, m, p) for name in shapes("tiny") for m in (2, 5) for p in ("torch", "skinny") if m == 2 or p == "torch"
    }
    assert {(row.product, row.B, row.provider) for row in found} == want
    assert all(row.rel_error < (1e-2 if DEVICE == "cuda" else 1e-5) for row in found)


def test_the_weights_are_those_of_a_step() -> None:
    """Of Qwen3-8B: 15.1 GB in bfloat16, as the decode bench counts them."""
    layer = {name: n * k for name, (n, k) in shapes("qwen3-8b").items()}
    whole = 36 * (layer["gate_up"] + layer["down"] + layer["qkv"] + layer["o"]) + layer["head"]
    assert 2 * whole == pytest.approx(15.14e9, rel=1e-3)
