"""Benches of whole models: cases run, are resumed and drawn; a profile's kernels find their stage."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flex_tls as tls
from bench import decode, first_token, rows
from bench.__main__ import main
from bench.model_plots import draw_all, table
from bench.models import random_model, weight_bytes
from bench.rows import ModelRow, StageRow
from bench.stages import Kernel, one_layer, stage_of, stage_row
from tests.bench.test_rows import ROW

MACHINE = rows.Machine(**{name: getattr(ROW, name) for name in rows.Machine._fields})
TINY = ["--model", "tiny", "--device", "cpu", "--commit", "abc", "--runs", "2"]


def model_row(**changes: object) -> ModelRow:
    row = ModelRow(
        bench="decode", case="qwen3-8b", B=1, provider="two_level", n_layers=36, context=98304, max_len=98560,
        block_budget=8192, token_budget=1024, dense_layers=2, dtype="bfloat16", ms_median=7.5, ms_p10=7.4, ms_p90=7.6,
        ms_p99=7.9, runs=50, tokens_per_second=133.0, weights_floor_ms=5.1, build_seconds=30.0, peak_bytes=10**10,
        **MACHINE._asdict(),
    )  # fmt: skip
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_steps_in_other_blocks_are_other_rows_but_for_dense_ones() -> None:
    for provider, size in (("two_level_skinny", 16), ("dense_skinny", None), ("transformers_static", None)):
        rows_of = [model_row(provider=provider, block_size=n) for n in (None, 16)]
        assert [row.blocks_of for row in rows_of] == [None, size]
        assert (rows_of[0].key == rows_of[1].key) == (size is None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measuring of the read bandwidth."""
    monkeypatch.setattr("bench.timing.read_bytes_per_us", lambda device: 1e4)


def test_decode_cases_run_are_cut_short_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.jsonl"
    run = ["run", "decode", *TINY, "--providers", "transformers_default", "--contexts", "40,70", "--out", str(out)]
    assert main([*run, "--seconds", "0", "--batch", "2"]) == 0
    assert "no time for B=2 70: " in capsys.readouterr().out
    assert main([*run, "--batch", "2", "--contexts", "70"]) == 0
    assert main([*run, "--batch", "2", "--resume"]) == 0
    assert [(row.B, row.context, row.provider) for row in rows.read(out, ModelRow)] == [
        (2, 70, "transformers_default"), (2, 40, "transformers_default"),
    ]  # fmt: skip
    assert main(["plot", "decode", "--rows", str(out)]) == 0
    assert out.with_suffix(".svg").is_file()
    assert main(["plot", "decode", "--rows", str(tmp_path / "none.jsonl")]) == 2
    assert main([*run[:-4], "--providers", "fastest", "--out", str(out)]) == 2
    assert "providers: expected some of two_level, dense" in capsys.readouterr().err


def test_prompts_are_read_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prefill.jsonl"
    run = ["run", "prefill", *TINY, "--contexts", "70", "--out", str(out)]
    assert main([*run, "--providers", "ours[32],ours_flash[32],transformers_sdpa"]) == 0
    found = rows.read(out, ModelRow)
    assert [row.provider for row in found] == ["ours[32]", "ours_flash[32]", "transformers_sdpa"]
    assert all(row.bench == "prefill" and row.tokens_per_second > 0 for row in found)
    assert main([*run, "--providers", "ours"]) == 2
    assert "expected transformers_sdpa, ours[CHUNK]" in capsys.readouterr().err


def test_the_first_token_is_timed_in_fresh_processes_that_share_their_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first finds its caches empty and leaves them full for the second."""
    out, found_full = tmp_path / "first.jsonl", []
    fresh = first_token._in_fresh_process

    def watched(asked: str, caches: Path) -> dict[str, Any]:
        found_full.append((caches / "inductor").exists())
        return fresh(asked, caches)

    monkeypatch.setattr(first_token, "_in_fresh_process", watched)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = ["run", "first-token", "--model", "tiny", "--device", "cpu", "--commit", "abc"]
    run += ["--contexts", "70", "--layers", "1"]
    assert main([*run, "--out", str(out)]) == 0
    assert found_full == [False, True]
    found = rows.read(out, rows.FirstTokenRow)
    assert [(row.provider, row.n_layers, row.context) for row in found] == [("cold", 1, 70), ("warm", 1, 70)]
    assert all(0 < row.prompt_seconds < row.seconds for row in found)
    monkeypatch.setattr(sys, "executable", "false")
    assert main([*run, "--out", str(out)]) == 2
    assert "the measuring process ended with 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bed() -> decode.Bed:
    model = random_model("tiny", None, torch.device("cpu"))
    cfg = tls.TLSConfig(block_size=16, block_budget=64, token_budget=32, sink_tokens=4, recent_tokens=8)
    found = decode.Bed(model, cfg, 2, 90)
    found.set_context(60)
    return found


def test_transformers_decodes_over_the_bed_s_keys(bed: decode.Bed) -> None:
    """Both of its caches see the same tokens as the dense one of ours."""
    inputs, context = decode._inputs(bed), bed.dense.get_seq_length()
    assert context == 60
    logits: list[torch.Tensor] = []
    handle = bed.model.register_forward_hook(lambda module, args, out: logits.append(out.logits))
    decode._transformers_default(bed)()
    compiled = torch.compile
    try:
        torch.compile = lambda forward, **kwargs: bed.model  # type: ignore[assignment]
        decode._transformers_static(bed)()
    finally:
        torch.compile = compiled
    tls.enable(bed.model)
    with torch.no_grad():
        bed.model(**inputs, past_key_values=bed.dense)
    tls.disable(bed.model)
    handle.remove()
    bed.dense.crop(context)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-4, atol=1e-4)


def test_a_provider_that_fails_costs_the_others_nothing(bed: decode.Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bed: Any) -> Callable[[], object]:
        raise RuntimeError("cannot")

    monkeypatch.setitem(decode.PROVIDERS, "dense", decode.Provider(fails))
    found, steps, failed = decode.measure(bed, "tiny", ["dense", "transformers_default"], 2, MACHINE, 1.0)
    assert ([row.provider for row in found], list(steps), failed) == (
        ["transformers_default"], ["transformers_default"], ["dense"],
    )  # fmt: skip


def test_a_step_reads_all_weights_but_the_embeddings() -> None:
    model = random_model("tiny", 2, torch.device("cpu"))
    assert model.config.num_hidden_layers == 2
    every = sum(x.numel() * 4 for x in model.parameters())
    assert weight_bytes(model) == every - 97 * 64 * 4


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("append", "append"),
        ("attend", "full attention"),
        ("two_level", "two-level attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matrix products"),
        ("triton_red_fused_mm_7", "matrix products"),
        ("triton_red_fused__to_copy_mm_mul_3", "matrix products"),
        ("triton_poi_fused_add_cos_mul_2", "norms, rotary, activations"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", "norms, rotary, activations"),
        ("Memcpy DtoH (Device -> Pinned)", "sampling, copies"),
    ],
)
def test_kernels_find_their_stage(name: str, stage: str) -> None:
    assert stage_of(name) == stage


def test_a_profile_becomes_stages_and_one_layer() -> None:
    names = ["nvjet", "append", "attend"]
    kernels = [Kernel(names[i % 3], 10.0 * i, 4.0) for i in range(3 * 4 * 2)]
    row = stage_row(kernels, 2, "m", 1, 4, 100, "two_level", MACHINE)
    assert row.stage_us == {"matrix products": 16.0, "append": 16.0, "full attention": 16.0}
    assert row.stage_kernels["append"] == 4.0
    assert row.layer == [["append", 0.0, 4.0], ["full attention", 10.0, 4.0], ["matrix products", 20.0, 4.0]]
    assert one_layer(kernels[:-2], 2, 4) == []


def test_pictures_are_drawn_from_rows(tmp_path: Path) -> None:
    steps = [
        model_row(B=b, context=s, provider=name, ms_median=ms, ms_p10=ms - 0.1, ms_p99=ms + 0.3)
        for b in (1, 4)
        for s in (256, 8192, 98304)
        for name, ms in (("two_level", 7.0 + s / 2e5), ("dense", 6.5 + b * s / 2e4))
    ]
    prompts = [model_row(bench="prefill", provider="ours[4096]", context=s) for s in (8192, 98304)]
    stages = StageRow(
        bench="stages", case="qwen3-8b", B=1, n_layers=36, context=98304, provider="two_level",
        stage_us={"matrix products": 6150.0, "attention": 280.0},
        stage_kernels={"matrix products": 252, "attention": 36},
        layer=[["attention", 0.0, 8.0], ["matrix products", 8.0, 150.0]], **MACHINE._asdict(),
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    rows.append(path, [stages])
    assert rows.read(path, StageRow) == [stages]
    for given, profiles, endings in (
        (steps, [], [""]),
        ([*steps, *prompts], [stages], ["", "-prefill", "-stages"]),
    ):
        paths = draw_all(given, profiles, tmp_path / "decode.png")
        assert [found.name for found in paths] == [f"decode{ending}.png" for ending in endings]
        assert all(found.stat().st_size > 5000 for found in paths)
    assert "1.53x" in table([model_row(), model_row(provider="dense", ms_median=11.5)]).splitlines()[2]


def test_the_rows_in_the_repository_are_rows() -> None:
    assert rows.read(rows.ROOT / "bench" / "results" / "decode.jsonl", ModelRow)
