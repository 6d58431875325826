"""Rows survive their file, refuse what is not a row, and are enough to draw from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bench import operator, plots, timing
from bench.__main__ import main
from bench.cases import SUITES, Case
from bench.plots import draw_all, table
from bench.providers.registry import Provider
from bench.rows import Row, append, latest, read
from flex_tls import jsonl

ROW = Row(
    bench="operator",
    case="qwen3-8b-b1-96k",
    B=1,
    HQ=32,
    HKV=8,
    D=128,
    S=98304,
    block_size=64,
    block_budget=8192,
    token_budget=1024,
    dtype="bfloat16",
    provider="flex_total",
    stage="total",
    median_us=35.25,
    p10_us=35.0,
    p90_us=36.5,
    inputs="rotated",
    runs=50,
    floor_us=5.5,
    rel_error=2.5e-3,
    gpu="NVIDIA H100 80GB HBM3",
    driver="580.159.04",
    torch="2.11.0",
    triton="3.6.0",
    commit="0123456789abcdef",
    dirty=False,
    date="2026-11-24T05:00:00Z",
)


def vary(**changes: object) -> Row:
    return dataclasses.replace(ROW, **changes)  # type: ignore[arg-type]


def test_rows_come_back_from_their_file_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.jsonl"
    append(path, [ROW])
    append(path, [vary(token_budget=None, dirty=True)])
    assert read(path) == [ROW, vary(token_budget=None, dirty=True)]
    assert read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Row) if field.name != "rel_error_dense"])
def test_a_row_without_one_of_its_fields_is_refused(name: str, tmp_path: Path) -> None:
    fields = dataclasses.asdict(ROW)
    del fields[name]
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, [ROW, fields])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: expected the fields .*missing \['{name}'\], unknown \[\]"):
        read(path)


def test_rows_that_are_older_than_a_field_are_read() -> None:
    older = dataclasses.asdict(vary(rel_error_dense=2.0e-3))
    del older["rel_error_dense"]
    assert Row.from_dict(older) == ROW
    assert ROW.rel_error_dense is None


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown \['speed'\]"):
        Row.from_dict(dataclasses.asdict(ROW) | {"speed": 1.0})


@pytest.mark.parametrize(("name", "value"), [("S", 1.5), ("median_us", "fast"), ("runs", True), ("gpu", None)])
def test_a_value_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected"):
        vary(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_makes_no_row(value: float) -> None:
    with pytest.raises(ValueError, match="rel_error: expected a finite number"):
        vary(rel_error=value)


def test_the_latest_of_equal_rows_counts() -> None:
    newer, other = vary(median_us=30.0), vary(provider="sdpa_cudnn", stage="attention")
    repeated = vary(inputs="repeated")
    assert latest([ROW, other, repeated, newer]) == [newer, other, repeated]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn_from_rows(tmp_path: Path, suffix: str) -> None:
    providers = {"triton_total": 35.0, "flex_given_selection[split_kv=8]": 14.0, "sdpa_cudnn_gqa": 137.0}
    lengths = [
        vary(case=f"qwen3-8b-b{b}-{s}", B=b, S=s, provider=provider, median_us=us * s / 1e5, p90_us=us * s / 1e5 + 1)
        for s in (8192, 16384, 98304)
        for b in (1, 16)
        for provider, us in providers.items()
    ]
    budgets = [
        vary(case=f"qwen3-8b-b1-96k-{block}-1024", block_budget=block, provider=provider, median_us=us)
        for block in (2048, 4096)
        for provider, us in providers.items()
    ]
    for rows, endings in (
        (lengths[:3], [""]),
        (lengths, ["", "-lengths-qwen3-8b"]),
        ([*lengths, *budgets], ["", "-lengths-qwen3-8b", "-budgets-qwen3-8b"]),
    ):
        paths = draw_all(rows, tmp_path / f"picture{suffix}")
        assert [path.name for path in paths] == [f"picture{ending}{suffix}" for ending in endings]
        assert all(path.stat().st_size > 5000 for path in paths)


def test_no_curve_mixes_block_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        vary(case=f"qwen3-8b-b1-{s}{end}", B=1, S=s, block_size=size)
        for end, size in (("", 32), ("-block64", 64))
        for s in (8192, 16384, 98304)
    ]
    drawn: list[Row] = []

    def lengths(rows: list[Row], batch_sizes: list[int]) -> Figure:
        drawn.extend(rows)
        return Figure()

    monkeypatch.setattr(plots, "_lengths", lengths)
    draw_all(rows, tmp_path / "picture.svg")
    assert drawn == rows[:3]


def test_the_table_compares_with_the_best_dense_kernel_of_the_case() -> None:
    dense = [vary(provider="sdpa_cudnn", median_us=140.0), vary(provider="sdpa_flash", median_us=141.0)]
    lines = table([ROW, *dense, vary(inputs="repeated"), vary(case="other")]).splitlines()
    assert "| 4.0x |" in lines[2]
    assert "inputs repeated" in lines[-2]
    assert "x |" not in lines[-2]
    assert "x |" not in lines[-1]


def test_the_table_has_denses_error_on_the_same_tokens() -> None:
    without, having = table([ROW, vary(rel_error_dense=2.25e-3)]).splitlines()[2:]
    assert "| 2.5e-03 |  | 50 |" in without
    assert "| 2.5e-03 | 2.2e-03 | 50 |" in having


def test_the_command_line_measures_and_draws_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    quick = ["run", "operator", "--device", "cpu", "--quick", "--commit", "abc", "--dirty", "--out", str(out)]
    flash = [*quick, "--providers", "sdpa_*", "--cases", "tiny-b2"]
    assert main(flash) == 0
    (row,) = read(out)
    assert (row.provider, row.gpu, row.commit, row.dirty, row.runs) == ("sdpa_flash", "cpu", "abc", True, 5)
    assert row.rel_error < 1e-2
    assert main(["plot", "operator", "--rows", str(out)]) == 0
    assert out.with_suffix(".svg").is_file()
    assert main([*flash, "--repeat-inputs"]) == 0
    assert [row.inputs for row in read(out)] == ["rotated", "repeated"]
    assert main(["plot", "operator", "--rows", str(tmp_path / "none.jsonl")]) == 2
    assert main([*quick, "--runs", "1"]) == 2
    assert main([*quick, "--providers", "nothing"]) == 2
    assert "providers: nothing matches nothing; there are sdpa_cudnn" in capsys.readouterr().err


def test_a_run_cut_by_its_time_limit_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    quick = ["run", "operator", "--device", "cpu", "--quick", "--commit", "abc", "--out", str(out)]
    flash = [*quick, "--providers", "sdpa_*"]
    assert main([*flash, "--seconds", "0"]) == 0
    assert "left: tiny-b1 tiny-b2" in capsys.readouterr().out
    assert not out.exists() or not read(out)
    assert main([*flash, "--cases", "tiny-b1"]) == 0
    assert main([*flash, "--resume"]) == 0
    assert [row.case for row in read(out)] == ["tiny-b1", "tiny-b2"]


@pytest.mark.parametrize("suite", ["budgets", "blocks"])
def test_a_suite_is_resumed_where_rows_are_missing(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cases without any row first, then those that another run measured with fewer providers; none twice."""
    out = tmp_path / "rows.jsonl"
    measured: list[str] = []

    def run_case(case: Case, *_: object, providers: list[str], **__: object) -> tuple[list[Row], list[str]]:
        measured.append(case.name)
        return [vary(case=case.name, provider=name, gpu="cpu", commit="abc") for name in providers], []

    monkeypatch.setattr(operator, "run_case", run_case)
    monkeypatch.setattr(timing, "read_bytes_per_us", lambda device: 1.0)
    # A CPU runs all that a GPU does
    monkeypatch.setattr(Provider, "runs_here", lambda *_: True)
    command = ["run", "operator", "--device", "cpu", "--suite", suite, "--commit", "abc", "--out", str(out)]
    names = list(SUITES[suite].cases)
    assert main([*command, "--cases", names[0], "--providers", "triton_total"]) == 0
    assert main([*command, "--cases", ",".join(names[1:3])]) == 0
    measured.clear()
    assert main([*command, "--resume"]) == 0
    assert measured == [*names[3:], names[0]]
    assert f"2 cases have all rows of this commit in {out}, {len(names) - 2} are left" in capsys.readouterr().out
    measured.clear()
    assert main([*command, "--resume"]) == 0
    assert not measured
