from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import flex_tls as tls
from flex_tls.cli import app as cli
from flex_tls.cli.plan import largest
from tests.integrations.models import SPARSE, make

runner = CliRunner()


@given(st.integers(0, 5000), st.integers(1, 70))
def test_the_largest_that_fits_fits_and_the_next_does_not(limit: int, unit: int) -> None:
    found = largest(lambda n: n <= limit, unit)
    assert found <= limit < found + unit
    assert largest(lambda n: True) == 2**30


@pytest.mark.parametrize(
    "offload",
    [
        None, tls.OffloadConfig(gpu_blocks=7), tls.OffloadConfig(gpu_fraction=0.6),
        tls.OffloadConfig(gpu_blocks=7, store_dtype="int8"),
    ],
)  # fmt: skip
def test_planned_bytes_are_what_a_cache_allocates(offload: tls.OffloadConfig | None) -> None:
    model = make("qwen3")
    planned = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=170, dtype=torch.float32, offload=offload)
    made = tls.TLSCache(
        model.config, SPARSE, batch_size=2, max_len=170, dtype=torch.float32, device="cpu", offload=offload
    )
    away = made.offloaded_layers
    assert planned.host_nbytes == sum(layer.opened().store.nbytes for layer in away)
    held = sum(layer.opened().pool.nbytes for layer in away)
    held += sum(layer.index.nbytes for layer in made.tls_layers if layer.index is not None)
    held += sum(x.nbytes for layer in made.tls_layers if layer not in away for x in layer.buffers())
    assert planned.device_nbytes == held


def test_plan_says_what_fits(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "--model", str(model_folder), "--context", "20000", "--batch", "2", "--block-budget", "1024"]
    memory = ["--gpu-mem", "0.03", "--host-mem", "0.1", "--json", str(out)]
    result = runner.invoke(cli.app, [*command, *memory])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["resident"]["fits"], found["offloaded"]["fits"]) == (False, True)
    assert found["resident"]["largest_batch"] < 2 <= found["offloaded"]["largest_batch"]
    assert found["resident"]["largest_context"] < 20000 <= found["offloaded"]["largest_context"]
    assert "it fits in no other way" in result.output
    host = found["offloaded"]["host_bytes"]
    result = runner.invoke(cli.app, [*command, *memory, "--store-dtype", "int8"])
    assert result.exit_code == 0, result.output
    assert 0.25 < json.loads(out.read_text())["offloaded"]["host_bytes"] / host < 0.32
    result = runner.invoke(cli.app, [*command, "--gpu-blocks", "3"])
    assert result.exit_code == 1
    assert "gpu_blocks: expected at least" in " ".join(result.output.split())
