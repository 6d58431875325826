"""The offload bench: its trace is as local as it says, and every part runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.trace import REAL_TEXT, overlaps, trace


def test_a_made_trace_is_as_local_as_real_text() -> None:
    ids = trace(40, 6, 768, 128)
    assert ids.shape == (40, 6, 128)
    assert bool((ids[..., 1:] > ids[..., :-1]).all())
    assert int(ids.max()) == 767
    for got, want in zip(overlaps(ids, 768), REAL_TEXT, strict=True):
        assert got == pytest.approx(want, abs=0.015)
    assert torch.equal(ids, trace(40, 6, 768, 128))


def test_every_part_runs_and_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = tmp_path / "rows.jsonl"
    options = ["--quick", "--device", device, "--runs", "2", "--batch", "1", "--context", "4096", "--commit", "x"]
    parts = "overlap,steps" if device == "cpu" else "link,overlap,steps"
    assert main(["run", "offload", "--parts", parts, *options, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["part"] for row in rows} == set(parts.split(","))
    found = {row["provider"]: row for row in rows if row["part"] == "steps"}
    assert found["no_residency"]["hit_rate"] == 0
    assert found["async"]["hit_rate"] > 0.8
    assert found["async"]["fetched_bytes"] < 0.3 * found["no_residency"]["fetched_bytes"]
