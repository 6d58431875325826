from __future__ import annotations

import json
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from flex_tls.cli import app as cli
from flex_tls.cli import options
from flex_tls.evaluate import rows
from flex_tls.evaluate.tasks import TASKS

runner = CliRunner()

BUDGETS = ["--block-size", "16", "--block-budget", "3/4,1/2", "--token-budget", "1/2,1/4", "--backend", "reference"]
SOME = ["dense", "ours", "quest", "window", "oracle", "ours:label_bits=8"]


def run(*arguments: str | Path) -> str:
    result = runner.invoke(cli.app, ["eval", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def failed(*arguments: str | Path) -> str:
    result = runner.invoke(cli.app, ["eval", *map(str, arguments)])
    assert result.exit_code != 0
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        words = torch.randint(0, 10**6, (120,), generator=torch.Generator().manual_seed(i)).tolist()
        (folder / f"{i}.txt").write_text(" ".join(map(str, words)))
    return folder


def test_perplexity_of_every_method_with_rows_summary_and_picture(
    model_folder: Path, texts: Path, tmp_path: Path
) -> None:
    out, summary, picture = tmp_path / "rows.jsonl", tmp_path / "summary.json", tmp_path / "kl.png"
    options = [texts, "--model", model_folder, "--context-tokens", "320", "--score-tokens", "2", *BUDGETS]
    printed = run("ppl", *options, "--methods", ",".join(SOME), "--documents", "2", "--out", out, "--json", summary)
    assert "label_bits=8" in printed
    assert "dense: perplexity" in printed
    found = rows.read(out)
    # Two documents under dense, under what changes with the budgets twice
    assert len(found) == 2 * (1 + 2 * (len(SOME) - 1))
    assert len({row.key for row in found}) == len(found)
    for row in found:
        assert isinstance(row, rows.PplRow)
        assert row.kl > 0 if row.config else row.kl == 0
        assert 0 <= row.agreement <= 1
        assert row.transformers
        assert row.python == platform.python_version()
        if row.config is None:
            assert row.top1 is not None
            assert row.log_p is not None
            assert (len(row.top1), len(row.log_p)) == (2, 2)
            assert -sum(row.log_p) / 2 == pytest.approx(row.nll, rel=1e-5)
        else:
            assert row.top1 is row.log_p is None
    lines = json.loads(summary.read_text())["results"]
    assert {line["n_documents"] for line in lines} == {2}
    assert all(line["kl"]["low"] <= line["kl"]["mean"] <= line["kl"]["high"] for line in lines)
    run("plot", out, "--out", picture)
    assert picture.stat().st_size > 10_000


def test_what_was_measured_is_not_measured_again(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flex_tls.cli import evaluate

    out = tmp_path / "rows.jsonl"
    options = ["ppl", texts, "--model", model_folder, "--context-tokens", "320", "--score-tokens", "2", *BUDGETS]
    options += ["--out", out, "--batch", "2"]
    asked: list[tuple[int, list[str]]] = []
    score_documents = evaluate.score_documents

    def counted(model: Any, ids: Any, context_tokens: int, methods: Any, **kwargs: Any) -> Any:
        asked.append((len(ids), [method.name for method in methods]))
        return score_documents(model, ids, context_tokens, methods, **kwargs)

    monkeypatch.setattr(evaluate, "score_documents", counted)
    run(*options, "--documents", "2", "--methods", "dense,ours")
    assert asked == [(2, ["dense", "ours", "ours"])]
    first = rows.read(out)
    run(*options, "--documents", "2", "--methods", "dense,ours")
    assert len(asked) == 1
    # One more document, one more method
    run(*options, "--documents", "3", "--methods", "ours,window")
    # Dense attention runs in any case: what it said of the new document is kept
    assert asked[1:] == [(2, ["window", "window"]), (1, ["dense", "ours", "window", "ours", "window"])]
    assert rows.read(out)[: len(first)] == first
    keys = [row.key for row in rows.read(out)]
    assert len(set(keys)) == len(keys)


def test_retrieval_tasks_side_by_side(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("single", "copy", "frequent_words"):
        monkeypatch.setitem(TASKS, name, TASKS[name]._replace(max_new_tokens=3))
    out, summary = tmp_path / "rows.jsonl", tmp_path / "summary.json"
    options = ["--model", model_folder, "--tasks", "single,copy,frequent_words", "--length", "1200", "--samples", "1"]
    options += ["--methods", "dense,ours", "--depth", "0,1", *BUDGETS, "--out", out]
    printed = run("retrieval", *options, "--json", summary)
    assert "frequent_words" in printed
    found = rows.read(out)
    # Depth is of no matter to counted words
    assert len(found) == (2 + 2 + 1) * 3
    for row in found:
        assert isinstance(row, rows.AnswerRow)
        # Characters are tokens here, and the filler comes in sentences
        assert 900 < row.prompt_tokens <= 1200
        assert 0 <= row.score <= 1
        assert row.prediction
        assert row.depth == (None if row.task == "frequent_words" else row.depth)
    lines = json.loads(summary.read_text())["results"]
    assert len(lines) == len(found)
    assert lines[0]["score"]["low"] is None
    before = out.read_text()
    run("retrieval", *options)
    assert out.read_text() == before
    picture = tmp_path / "depths.png"
    assert "single" in run("plot", out, "--out", picture)
    assert picture.stat().st_size > 5000
    # Without depths there is no map to draw
    without = [replace(row, depth=None) for row in found if isinstance(row, rows.AnswerRow)]
    rows.append(tmp_path / "without.jsonl", without)
    assert "nor of eval retrieval --depth" in failed("plot", tmp_path / "without.jsonl", "--out", picture)


def test_budgets_over_the_whole_context_lose_nothing(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    budgets = ["--block-size", "16", "--block-budget", "640", "--token-budget", "all"]
    run("ppl", texts, "--model", model_folder, "--context-tokens", "200", "--score-tokens", "2", *budgets, "--out", out,
        "--methods", "ours,quest,oracle")  # fmt: skip
    for row in rows.read(out):
        assert isinstance(row, rows.PplRow)
        assert math.isclose(row.kl, 0, abs_tol=1e-6)
        assert row.agreement == 1


def test_texts_of_a_data_set_are_scored_as_those_of_files(
    model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = ModuleType("datasets")

    def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        assert (path, config, options) == ("me/books", "old", {"split": "test", "streaming": True})
        return [{"body": path.read_text()} for path in sorted(texts.iterdir())]

    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    options = ["--model", model_folder, "--context-tokens", "320", "--score-tokens", "2", *BUDGETS, "--documents", "2"]
    options += ["--methods", "ours"]
    dataset = ["--dataset", "me/books:old", "--split", "test", "--text-column", "body"]
    run("ppl", texts, *options, "--out", tmp_path / "files.jsonl")
    run("ppl", *dataset, *options, "--out", tmp_path / "dataset.jsonl")
    files, found = (rows.read(tmp_path / f"{name}.jsonl") for name in ("files", "dataset"))
    assert [row.key for row in found] == [row.key for row in files]
    assert {row.document for row in found if isinstance(row, rows.PplRow)} == {
        "me/books:old/test/0", "me/books:old/test/1",
    }  # fmt: skip
    assert "--dataset: expected it or files" in failed("ppl", texts, *dataset, *options)


def test_what_cannot_be_evaluated_says_why(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    model = ["--model", model_folder]
    assert "method: expected one of dense, ours" in failed("ppl", texts, *model, "--methods", "snapkv")
    assert "--token-budget: expected 1, one for each" in failed("ppl", texts, *model, "--token-budget", "1/8,1/16")
    assert "at most 2048 tokens, the model's positions" in failed("ppl", texts, *model, "--context-tokens", "3000")
    assert "documents: expected files of at least" in failed("ppl", texts, *model, "--context-tokens", "1900")
    assert "tasks: expected some of single" in failed("retrieval", *model, "--tasks", "needle")
    assert "backend: expected one of" in failed("ppl", texts, *model, "--backend", "fast")
    (tmp_path / "rows.jsonl").write_text("")
    assert "holds none of eval ppl" in failed("plot", tmp_path / "rows.jsonl", "--out", tmp_path / "kl.png")


def test_attention_is_probed_into_rows_once(model_folder: Path, texts: Path, tmp_path: Path) -> None:
    out, summary = tmp_path / "rows.jsonl", tmp_path / "summary.json"
    options = ["attention", texts, "--model", model_folder, "--context-tokens", "320", "--score-tokens", "2", *BUDGETS]
    options += ["--methods", "ours,oracle,dense", "--documents", "2", "--batch", "2", "--out", out, "--json", summary]
    assert "fewest heavy tokens" in run(*options)
    found = rows.read(out)
    assert len(found) == 2 * 2 * 2
    assert run(*options)
    assert rows.read(out) == found
    for line in json.loads(summary.read_text())["results"]:
        assert 0 < line["mass_tokens"]["mean"] <= line["mass_blocks"]["mean"] <= 1.0001
        assert line["worst_layer"] in (2, 3)
    assert "expected one that selects among cached tokens" in failed(*options[:-6], "--methods", "dense,h2o")


def test_questions_from_a_longbench_file(model_folder: Path, tmp_path: Path) -> None:
    path, out, summary = tmp_path / "lcc.jsonl", tmp_path / "rows.jsonl", tmp_path / "summary.json"
    fields = {"input": "", "context": "x = 1\n" * 200, "answers": ["x = 1"], "dataset": "lcc"}
    path.write_text("".join(json.dumps({**fields, "context": fields["context"] + str(i)}) + "\n" for i in range(2)))
    options = ["tasks", path, "--model", model_folder, "--length", "320", *BUDGETS, "--methods", "dense,ours"]
    assert "lcc" in run(*options, "--out", out, "--json", summary)
    found = rows.read(out)
    assert len(found) == 2 * (1 + 2)
    assert {row.eval for row in found} == {"tasks"}
    assert all(isinstance(row, rows.AnswerRow) and row.prompt_tokens <= 320 for row in found)
    assert run(*options, "--out", out)
    assert rows.read(out) == found
    assert {line["n_samples"] for line in json.loads(summary.read_text())["results"]} == {2}
    (tmp_path / "empty.jsonl").write_text("")
    assert "files: expected questions, got none" in failed("tasks", tmp_path / "empty.jsonl", "--model", model_folder)


@pytest.mark.parametrize("spec", ["yarn:2", "linear:2"])
def test_scaled_positions_reach_further(model_folder: Path, spec: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model, _ = options.load_model(str(model_folder), "cpu", "float32")
    reach = model.config.max_position_embeddings
    options.scale_rope(model, spec)
    assert model.config.max_position_embeddings == 2 * reach
    # As if it had been loaded with the scaling in its configuration
    config = AutoConfig.from_pretrained(model_folder)
    config.rope_parameters = dict(model.config.rope_parameters)
    config.max_position_embeddings = 2 * reach
    other = AutoModelForCausalLM.from_pretrained(model_folder, config=config, dtype=torch.float32)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("spec", ["yarn", "dynamic:2", "yarn:1", "yarn:x"])
def test_a_scaling_that_there_is_not_is_refused(spec: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected yarn or linear and a factor above 1"):
        options.scale_rope(None, spec)
