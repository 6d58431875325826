"""Suites hold what they promise, and a case that does not fit is skipped, not tried."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from bench import operator, rows, timing
from bench.__main__ import main
from bench.cases import CASES, MAX_SETS, ROTATED_BYTES, SUITES
from bench.providers import PROVIDERS

CUDA = torch.device("cuda")


def test_suites_name_cases_and_providers_that_exist() -> None:
    for suite in SUITES.values():
        assert set(suite.cases) <= set(CASES)
        for pattern in suite.providers:
            assert any(fnmatch(name, pattern) for name in PROVIDERS), pattern


def test_the_sweep_has_both_models_at_every_length_and_batch_size() -> None:
    shapes = {(CASES[name].HQ, CASES[name].B, CASES[name].S // 1024) for name in SUITES["sweep"].cases}
    lengths = (8, 16, 32, 48, 64, 96, 128, 256)
    assert shapes == {(hq, b, s) for hq in (32, 40) for b in (1, 2, 4, 8, 16, 32) for s in lengths}


def test_the_budgets_suite_varies_one_budget_around_the_default() -> None:
    budgets = {(CASES[name].block_budget, CASES[name].token_budget) for name in SUITES["budgets"].cases}
    assert {block for block, token in budgets if token == 1024} == {2048, 4096, 8192, 16384}
    assert {token for block, token in budgets if block == 8192} == {256, 512, 1024, 2048, 4096}
    for name in SUITES["budgets"].cases:
        CASES[name].config()


@pytest.mark.parametrize("case", [CASES[name] for name in SUITES["sweep"].cases], ids=lambda case: case.name)
def test_what_is_read_of_all_input_sets_is_far_larger_than_the_cache(case: object) -> None:
    assert hasattr(case, "n_sets")
    n_sets = case.n_sets(CUDA)
    read_bytes = case.kv_bytes(case.token_budget) + case.rows * case.S * case.D / 16
    assert n_sets * read_bytes >= (ROTATED_BYTES if n_sets < MAX_SETS else 3 * 50e6)


def test_every_case_of_the_sweep_fits_in_80_gb() -> None:
    for name in SUITES["sweep"].cases:
        assert CASES[name].needed_bytes(CASES[name].n_sets(CUDA)) < 79e9, name


def test_a_case_that_does_not_fit_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["qwen3-8b-b16-256k"]
    monkeypatch.setattr(operator, "release", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 80e9))
    n_sets = case.n_sets(CUDA)
    assert operator.why_not(case, torch.device("cpu"), n_sets) is None
    assert operator.why_not(case, CUDA, n_sets) == "needs about 27 GB for 1 input sets, 20 GB are free"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(rows, "_driver", lambda: "none")
    monkeypatch.setattr(timing, "read_bytes_per_us", lambda device: 1.0)
    out = tmp_path / "rows.jsonl"
    assert main(["run", "operator", "--cases", case.name, "--commit", "abc", "--out", str(out)]) == 0
    assert "skipping qwen3-8b-b16-256k: needs about 27 GB" in capsys.readouterr().out
