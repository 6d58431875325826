"""The index bench runs to its end without a GPU, and its error counts wrong codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flex_tls as tls
from bench import rows
from bench.__main__ import main
from bench.index_build import code_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_command_appends_rows_of_every_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU the kernels run interpreted, called as on one."""
    pytest.importorskip("triton")
    out = tmp_path / "rows.jsonl"
    options = ["--device", DEVICE, "--quick", "--runs", "2", "--commit", "abc", "--cases", "tiniest"]
    assert main(["run", "index", *options, "--out", str(out)]) == 0
    found = rows.read(out)
    stages = {"label_keys_eager": "build", "label_keys": "build", "append": "append", "fit": "fit", "audit": "audit"}
    assert {row.provider: row.stage for row in found} == stages
    # In float32 some channel may lie on the edge of two codes
    assert all(row.rel_error < 1e-2 for row in found)


def test_the_error_is_that_of_the_codes() -> None:
    k = torch.randn(1, 2, 64, 64)
    labels = tls.KVIndex.build(k, tls.TLSConfig()).labels
    codes = labels.encode(k)
    assert code_error(labels, codes, k) < 1e-2
    assert code_error(labels, codes ^ 0x11111111, k) > 0.05
