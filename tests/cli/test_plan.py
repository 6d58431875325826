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
from flex_tls.cli import plan
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
    assert planned.pools_nbytes == held
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
    said = " ".join(result.output.split())
    assert "2 x 20,000 tokens fit in no other way; which is faster is not known" in said
    assert (found["resident"]["pool_bytes"], found["resident"]["tokens_per_s"]) == (0, None)
    pools = next(line for line in result.output.splitlines() if "pools alone" in line)
    cells = [cell.strip() for cell in pools.split("│")]
    assert cells[2:4] == ["0.00 GB", f"{found['offloaded']['pool_bytes'] / 1e9:,.2f} GB"]
    host = found["offloaded"]["host_bytes"]
    result = runner.invoke(cli.app, [*command, *memory, "--store-dtype", "int8"])
    assert result.exit_code == 0, result.output
    assert 0.25 < json.loads(out.read_text())["offloaded"]["host_bytes"] / host < 0.32
    result = runner.invoke(cli.app, [*command, "--gpu-blocks", "3"])
    assert result.exit_code == 1
    assert "gpu_blocks: expected at least" in " ".join(result.output.split())


@pytest.mark.parametrize(("link_gb_per_s", "pays"), [(50.0, True), (0.01, False)])
def test_plan_says_whether_offload_is_faster(
    link_gb_per_s: float, pays: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows fit in any case; a slow link makes them not worth it."""
    monkeypatch.setattr(plan, "_rates", lambda: (3e12, link_gb_per_s * 1e9))
    out = tmp_path / "plan.json"
    options = ["--block-budget", "1024", "--gpu-mem", "0.1", "--host-mem", "1", "--json", str(out)]
    result = runner.invoke(cli.app, ["plan", "--model", str(model_folder), "--context", "20000", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    here, away = found["resident"], found["offloaded"]
    assert 1 <= here["largest_batch"] < away["largest_batch"]
    assert (away["tokens_per_s"] > here["tokens_per_s"]) == pays
    said = " ".join(result.output.split())
    assert f"offload {'pays' if pays else 'does not pay'}: at best {away['tokens_per_s']:,.0f} tokens a second" in said
    # At a batch of its own largest number of rows the step's time gives the same speed
    rows = str(here["largest_batch"])
    command = ["plan", "--model", str(model_folder), "--context", "20000", "--batch", rows, *options]
    assert runner.invoke(cli.app, command).exit_code == 0
    step_ms = json.loads(out.read_text())["resident"]["step_ms"]
    assert here["tokens_per_s"] == pytest.approx(int(rows) * 1e3 / step_ms)


def test_what_does_not_fit_decides_before_speed() -> None:
    def placed(rows: int, fits: bool = True) -> plan.Placement:
        return plan.Placement(1, 1, 1, fits, rows, 100, 1.0, 10.0 if rows else None)

    def said(here: plan.Placement, away: plan.Placement) -> str:
        return plan.verdict(plan.Plan(2, 100, 1, 1, 1, 1.0, 1.0, 0.05, here, away))

    assert said(placed(1), placed(0)) == "offload does not pay: not a row of that context fits"
    assert said(placed(0), placed(1)) == "offload pays: a row of that context fits in no other way"
    assert said(placed(1, False), placed(2)).endswith("rows, without it 1; 2 x 100 tokens fit in no other way")
