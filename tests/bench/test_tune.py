"""Tuning finds what is faster, writes what is clearly faster, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import rows, timing
from bench.__main__ import main
from bench.cases import CASES, dry
from bench.timing import Recording, Spread

pytest.importorskip("triton")
from bench import tune
from flex_tls.kernels.tile_table import TABLE, Entry, read_table
from flex_tls.kernels.tiles import Tiles, rule

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
CASE = CASES["qwen3-8b-b4-96k"]
SHAPE = ("cpu", tune.DRY_PROCESSORS, 256, 4, 8192, CASE.rows)
RULE = rule(tune.DRY_PROCESSORS, head_bytes=256, rows=CASE.rows)
MACHINE = rows.Machine("cpu", "none", "2", "3", "abc", False, "2026-11-24T05:00:00Z")


class Bench:
    """Stands in for kernels and clocks: a setting takes ``us`` less what each of its values wins; some do not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wins: Mapping[str, float], broken: str = "") -> None:
        self.wins, self.broken, self.prepared = wins, broken, list[str]()
        monkeypatch.setattr(tune, "release", lambda device: None)
        monkeypatch.setattr(tune, "why_not_here", lambda device: None)
        monkeypatch.setattr(tune, "make_inputs", lambda case, device, n_sets: [])
        monkeypatch.setattr(tune, "prepare", self.prepare)
        monkeypatch.setattr(tune, "interleave", self.interleave)

    def prepare(self, case: Any, sets: Any, device: Any, tiles: Tiles, base: tune.Trial | None) -> tune.Trial:
        name = tune.differs(tiles, RULE)
        self.prepared.append(name)
        if self.broken and self.broken in name:
            raise RuntimeError("out of resource: shared memory")
        us = 100.0 - sum(self.wins.get(part, 0.0) for part in name.split(","))
        return tune.Trial(tiles, Recording(lambda: None, [torch.tensor(us)], 1), [], 0.0)

    def interleave(self, recordings: Mapping[str, Recording], device: Any, runs: int) -> dict[str, Spread]:
        assert "rule" in recordings
        medians = {name: float(recording.outputs[0]) for name, recording in recordings.items()}
        return {name: Spread(us, us, us, runs) for name, us in medians.items()}

    def tune(self, tmp_path: Path, coordinates: str = "*", seconds: float | None = None) -> dict[Any, Tiles]:
        names = [name for name in tune.COORDINATES if coordinates in ("*", name)]
        status = tune.tune(
            [CASE], CPU, MACHINE, coordinates=names, runs=3, clock=tune.Clock(seconds),
            table=tmp_path / "tiles.json", out=tmp_path / "tune.jsonl",
        )  # fmt: skip
        assert status == 0
        return {entry[:-1]: entry.tiles for entry in read_table(tmp_path / "tiles.json")}


def test_the_best_value_of_each_coordinate_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch, {"warps=4": 5, "score_words=4096": -3, "score_words=16384": 2, "score_stages=2": 0.1})
    found = bench.tune(tmp_path)
    assert found == {SHAPE: RULE._replace(warps=4, score_words=16384)}
    # About ten a case: each of them compiles for ten seconds
    assert len(bench.prepared) <= 13
    got = rows.read(tmp_path / "tune.jsonl", rows.TuneRow)
    assert {row.step for row in got} == {*tune.COORDINATES, "confirm"} - {"programs"}
    last = got[-1]
    assert (last.step, last.provider, last.runs) == ("confirm", "warps=4,score_words=16384", 3)
    assert last.tiles == found[SHAPE]._asdict()
    assert [row.provider for row in got[-2:]] == ["rule", last.provider]
    assert "warps=4,score_words=16384: 7.0% less than the rule\n" in capsys.readouterr().out


def test_a_setting_that_does_not_run_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Bench(monkeypatch, {"score_words=16384": 50, "warps=4": 3}, broken="score_words=16384").tune(tmp_path)
    assert found == {SHAPE: RULE._replace(warps=4)}
    assert "score_words=16384: skipped, RuntimeError: out of resource: shared memory" in capsys.readouterr().out


def test_what_wins_less_than_two_percent_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Bench(monkeypatch, {"warps=4": 1.9}).tune(tmp_path) == {}
    assert "warps=4: 1.9% less than the rule, too little" in capsys.readouterr().out


def test_only_entries_of_what_was_measured_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stays = Entry("another GPU", 132, 256, 4, 8192, 8, rule(132, head_bytes=256, rows=8))
    stale = Entry(*SHAPE, RULE._replace(attend_tile=32, choose=4096))
    both = {stays[:-1]: stays.tiles, stale[:-1]: stale.tiles}
    tune.write_table(tmp_path / "tiles.json", [stays, stale])
    # A search cut short says nothing against an entry
    assert Bench(monkeypatch, {}).tune(tmp_path, seconds=0) == both
    # The table's entry is tried too, and stays while nothing is faster
    assert Bench(monkeypatch, {"attend_tile=32": 5}).tune(tmp_path, "warps") == both
    assert Bench(monkeypatch, {"warps=4": 5}).tune(tmp_path, "warps") == {**both, SHAPE: RULE._replace(warps=4)}
    assert Bench(monkeypatch, {"warps=4": -5}).tune(tmp_path) == {stays[:-1]: stays.tiles}


def test_a_case_cut_by_its_time_limit_still_confirms_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch, {"warps=4": 5, "score_words=4096": 5, "score_words=16384": 6})
    clock = tune.Clock(None)
    monkeypatch.setattr(clock, "has_time", lambda trials=1: len(bench.prepared) < 3)
    outcome = tune.tune_case(
        CASE, CPU, MACHINE, RULE, None, processors=2, coordinates=list(tune.COORDINATES), runs=3, clock=clock,
        out=tmp_path / "tune.jsonl",
    )  # fmt: skip
    assert bench.prepared == ["rule", "warps=4", "warps=4,score_words=4096"]
    assert outcome == (RULE._replace(warps=4, score_words=4096), False)
    assert "cut short at score_words" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["qwen3-8b-b1-96k", "qwen3-8b-b4-96k", "qwen3-8b-b16-96k", "qwen3-14b-b1-96k"])
def test_every_candidate_on_an_h100_can_be_launched(name: str) -> None:
    case = CASES[name]
    default = rule(132, head_bytes=256, rows=case.rows)
    found = [t for c in tune.COORDINATES for t in tune.variants(default, c, rows=case.rows, processors=132)]
    assert len(found) == len(set(found)) <= 12
    for tiles in found:
        assert tiles.programs == 1 or tiles.programs * case.rows <= 132


@interpreted
def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dry(CASES["tiniest"])
    sets = tune.make_inputs(case, CPU, 1)
    default = rule(2, head_bytes=64, rows=1)._replace(programs=1)
    base = tune.prepare(case, sets, CPU, default, None)
    assert base.rel_error < 1e-5
    assert base.masks[0] is not None
    other = base._replace(masks=[base.masks[0].roll(16, -1)])
    with pytest.raises(ValueError, match=r"[0-9.]+% of the rule's tokens are others"):
        tune.prepare(case, sets, CPU, default, other)
    monkeypatch.setattr(tune, "checked_error", lambda *given: float("nan"))
    with pytest.raises(ValueError, match="an error of nan against float64"):
        tune.prepare(case, sets, CPU, default, base)


@interpreted
def test_the_command_line_tunes_on_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0)
    monkeypatch.setattr(tune, "DRY_PROCESSORS", 1)
    shipped = TABLE.read_bytes()
    table, out = tmp_path / "made" / "tiles.json", tmp_path / "tune.jsonl"
    quick = ["tune", "operator", "--device", "cpu", "--quick", "--commit", "abc", "--out", str(table)]
    quick += ["--rows", str(out), "--runs", "2"]
    assert main([*quick, "--coordinates", "attend_stages"]) == 0
    got = rows.read(out, rows.TuneRow)
    assert [row.provider for row in got][:2] == ["rule", "attend_stages=3"]
    assert got[1].step == "attend_stages"
    assert {(row.case, row.gpu, row.commit, row.runs) for row in got} == {("tiniest", "cpu", "abc", 2)}
    assert max(row.rel_error for row in got) < 1e-5
    # Whichever was faster here
    assert all(entry.gpu == "cpu" for entry in read_table(table))
    assert TABLE.read_bytes() == shipped
    assert main([*quick, "--seconds", "0"]) == 0
    assert "stopping in time; left: tiniest" in capsys.readouterr().out
    table.write_text(json.dumps([{"rows": 1}]))
    assert main(quick) == 2
    assert "entry 1: entry: missing ['gpu'" in capsys.readouterr().err
    assert main(["tune", "operator", "--device", "cpu"]) == 2
    assert main([*quick, "--coordinates", "nothing"]) == 2
    assert main([*quick, "--runs", "1"]) == 2
