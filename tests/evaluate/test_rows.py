from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from flex_tls import TLSConfig
from flex_tls.evaluate import rows
from flex_tls.evaluate.summary import summarise_ppl, summarise_retrieval

COMMON = {
    "model": "m", "dtype": "float32", "backend": "reference", "device": "cpu", "flex_tls": "0", "torch": "2",
    "transformers": "5", "commit": "", "date": "2026-01-01", "index_share": 0.1,
    "read_share": 0.2,
}  # fmt: skip


def ppl_row(digest: str, method: str = "dense", kl: float = 0.0, nll: float = 1.0) -> rows.PplRow:
    return rows.PplRow(
        eval="ppl", **COMMON, method=method, config=None, digest=digest, document="d", context_tokens=10,
        score_tokens=5, step_tokens=1, kl=kl, nll=nll, nll_dense=1.0, agreement=1.0,
    )  # fmt: skip


def retrieval_row(digest: str, score: float, config: dict[str, Any] | None) -> rows.AnswerRow:
    return rows.AnswerRow(
        eval="retrieval", **COMMON, method="dense" if config is None else "ours", config=config, digest=digest,
        task="single", length_tokens=100, prompt_tokens=99, depth=None, seed=0, template="", references=["1"],
        prediction="", score=score,
    )  # fmt: skip


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.jsonl"
    whole = dataclasses.asdict(TLSConfig(block_budget=4096))
    first, second = ppl_row("a"), retrieval_row("b", 0.5, whole)
    rows.append(path, [first])
    rows.append(path, [second])
    assert rows.read(path) == [first, second]
    assert rows.read(tmp_path / "none.jsonl") == []
    # From before a field was there
    older = {name: value for name, value in whole.items() if name != "sparse_from_tokens"}
    rows.append(path, [retrieval_row("b", 0.5, older)])
    assert rows.read(path)[2] == second


def test_rows_from_before_versions_and_outputs_were_kept_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fields = dataclasses.asdict(ppl_row("a"))
    for name in ("python", "triton", "driver", "top1", "log_p"):
        del fields[name]
    path.write_text(json.dumps(fields) + "\n")
    assert rows.read(path) == [ppl_row("a")]


def test_an_interrupted_write_costs_its_own_row_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows.append(path, [ppl_row("a"), ppl_row("b")])
    path.write_bytes(path.read_bytes()[:-20])
    assert rows.read(path) == [ppl_row("a")]
    rows.append(path, [ppl_row("c")])
    assert rows.read(path) == [ppl_row("a"), ppl_row("c")]


@pytest.mark.parametrize("line", ["{}", "[]", '{"eval": "ppl"}', '{"eval": "speed"}', "not json"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected a row of flex-tls eval"):
        rows.read(path)


def test_the_key_tells_apart_what_was_measured() -> None:
    row = ppl_row("a")
    assert dataclasses.replace(row, date="later", kl=3.0).key == row.key
    for change in ({"digest": "b"}, {"config": {"block_budget": 1}}, {"context_tokens": 11}, {"model": "n"}):
        assert dataclasses.replace(row, **change).key != row.key


def test_perplexity_is_that_of_all_tokens_together() -> None:
    (line,) = summarise_ppl([ppl_row("a", nll=1.5, kl=0.1), ppl_row("b", nll=0.5, kl=0.3)])
    assert (line.n_documents, line.score_tokens) == (2, 10)
    assert line.perplexity == pytest.approx(2.718281828)
    assert line.perplexity_ratio.mean == pytest.approx(1.0)
    assert line.perplexity_ratio.low < 1 < line.perplexity_ratio.high
    assert line.kl.mean == pytest.approx(0.2)


def test_retrieval_is_compared_sample_by_sample() -> None:
    config = {"block_budget": 640, "token_budget": 128}
    found = [retrieval_row(d, s, None) for d, s in (("a", 1.0), ("b", 0.0))]
    found += [retrieval_row(d, s, config) for d, s in (("a", 0.5), ("b", 0.0))]
    dense, ours = summarise_retrieval(found)
    assert (dense.score.mean, ours.score.mean, ours.kept_tokens) == (0.5, 0.25, 128)
    assert ours.loss is not None
    assert ours.loss.mean == 0.25
