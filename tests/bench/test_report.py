from __future__ import annotations

import math
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer

from bench.__main__ import _parser, main
from bench.report import ACCURACY, SPEED, write_report
from bench.report_commands import retrieval_commands, text_commands
from bench.report_retrieval import retrieval_section
from bench.report_targets import target_section
from bench.rows import FirstTokenRow, ModelRow, Row
from flex_tls import TLSConfig, jsonl
from flex_tls.cli.evaluate import eval_app
from flex_tls.cli.plots import ablations, pareto
from flex_tls.evaluate import rows
from flex_tls.evaluate.methods import cost
from flex_tls.evaluate.sets import make_methods
from flex_tls.evaluate.summary import summarise_losses, summarise_ppl
from flex_tls.evaluate.tasks import TASKS
from tests.bench.test_models import MACHINE, model_row
from tests.bench.test_rows import vary

ORIGIN = {
    "model": "m", "dtype": "float32", "device": "cpu", "flex_tls": "0", "torch": "2", "transformers": "5",
    "commit": "0123456789abcdef", "date": "2026-01-01T00:00:00Z",
}  # fmt: skip
CFG = TLSConfig(block_budget=1024, token_budget=512, sink_tokens=32, recent_tokens=32)

ON = {**MACHINE._asdict(), "gpu": "a GPU", "commit": "abc"}


def operator(provider: str, us: float, **changes: object) -> Row:
    return vary(**{**ON, "case": "case", "provider": provider, "median_us": us, "runs": 30, **changes})


def step(provider: str, ms: float, **changes: object) -> ModelRow:
    times = {"ms_median": ms, "ms_p10": ms - 0.1, "ms_p90": ms + 0.1, "tokens_per_second": 1e3 / ms, "runs": 30}
    return model_row(**{**ON, "provider": provider, **times, **changes})


OPERATORS = [
    operator("sdpa_cudnn_gqa", 137.0), operator("triton_total", 20.0),
    # Another run's, and a case without a dense row of ours' run
    operator("double_sparsity", 30.0, commit="def"), operator("triton_total", 20.0, case="other"),
    # The default's time and changed settings', other blocks too, and one without the default's beside it
    operator("triton_total", 20.0, case="qwen3-8b-b1-96k", block_size=16),
    operator("triton_filter16", 19.0, case="qwen3-8b-b1-96k", block_size=16),
    operator("triton_total", 18.0, case="qwen3-8b-b1-96k-block64", block_size=64),
    operator("triton_total", 30.0, case="qwen3-8b-b1-96k-block32", block_size=32, commit="def"),
    # Newer, but without a dense row beside it: the run before it stays
    operator("triton_total", 10.0, commit="def"),
    # Both levels of the first, and one level of a run without the other
    operator("triton_given_blocks", 8.0), operator("triton_given_tokens", 5.0),
    operator("triton_given_blocks", 8.0, commit="def"),
]  # fmt: skip
STEPS = [step("dense", 10.0), step("two_level", 5.0), step("two_level_tuned", 4.0, commit="def")]
THROUGHPUT = {
    "bench": "offload", "part": "throughput", "model": "qwen3-8b", "context": 98304, "gpu_gb": None,
    "provider": "offload_async", "B": 8, "us_median": 15e3, "tokens_per_second": 550.0, "hit_rate": 0.96,
    "fetched_bytes": 5e8, "runs": 20, **ON,
}  # fmt: skip
OFFLOAD = [
    THROUGHPUT, {**THROUGHPUT, "context": 49152, "gpu_gb": 40.0},
    {"bench": "offload_quality", "text": "prose", "context": 4096, "provider": "async", "pool_over_budget": 2.0,
     "block_budget": 1024, "token_budget": 512, "hit_rate": 0.97, "missing_mass": 0.005, "waits": 0.25,
     "kl_to_no_offload": 0.002,
     "kl_dense_to_this": 0.006, "kl_dense_to_no_offload": 0.005, "scored": 128, **ON},
]  # fmt: skip


def ppl_rows(*specs: str, documents: int = 3) -> list[rows.Row]:
    dice = random.Random(0)
    methods, _ = make_methods(specs, [CFG], 4096)
    return [
        rows.PplRow(
            eval="ppl", **ORIGIN, method=m.name, config=m.config, backend="reference", **cost(m, 64, 4096)._asdict(),
            digest=str(i), document=f"{half}/{i}.txt", context_tokens=4096, score_tokens=8, step_tokens=8,
            kl=dice.random() if m.cfg else 0.0, nll=1.0, nll_dense=1.0, agreement=0.9,
        )
        for m in methods
        for i, half in enumerate(("choosing", "confirming") * documents)
        if i < documents
    ]  # fmt: skip


def answers(task: str, method: str, scores: Sequence[float], length: int = 8000, **changes: object) -> list[rows.Row]:
    """Samples of a task at 1/4 and 1/8; those of one task and place in ``scores`` are the same question."""
    cfg = None if method == "dense" else {**asdict(CFG), "block_budget": length // 4, "token_budget": length // 8}
    return [
        rows.AnswerRow(**{
            "eval": "retrieval", **ORIGIN, "method": method, "config": cfg, "backend": "", "index_share": 0.1,
            "read_share": 0.2, "digest": f"{task} {length} {i}", "task": task, "length_tokens": length,
            "prompt_tokens": length, "depth": None, "seed": i, "template": "", "references": ["1"], "prediction": "",
            "score": score, **changes,
        })
        for i, score in enumerate(scores)
    ]  # fmt: skip


def other_rows() -> list[rows.Row]:
    common = {
        **ORIGIN, "method": "ours", "config": asdict(CFG), "backend": "reference", "index_share": 0.1,
        "read_share": 0.2,
    }  # fmt: skip
    table = [[0.9, 0.8], [0.7, 0.95]]
    found: list[rows.Row] = [
        rows.AttentionRow(
            eval="attention", **common, digest=str(i), document="d", context_tokens=4096, score_tokens=8, layers=[2, 3],
            mass_blocks=table, mass_tokens=table, heavy_blocks=table, heavy_tokens=table,
            locality=[0.8, 0.9], missed_bound=table,
        )
        for i in range(2)
    ]  # fmt: skip
    found += [
        rows.AnswerRow(
            eval="retrieval", **common, digest=f"{depth}", task="single", length_tokens=100, prompt_tokens=99,
            depth=depth, seed=0, template="", references=["1"], prediction="", score=depth,
        )
        for depth in (0.0, 1.0)
    ]  # fmt: skip
    return found


def test_a_report_has_every_section_with_rows_and_the_command_of_every_other(tmp_path: Path) -> None:
    rows.append(tmp_path / "accuracy.jsonl", ppl_rows("comparison"))
    rows.append(tmp_path / "accuracy-ablation.jsonl", ppl_rows("ablation", "frontier", documents=8))
    rows.append(tmp_path / "accuracy-more.jsonl", other_rows())
    synthetic = [
        "run",
        "synthetic",
        "--context",
        "600",
        "--block-budget",
        "256",
        "--token-budget",
        "192",
        "--seeds",
        "1",
    ]
    assert main([*synthetic, "--out", str(tmp_path / "synthetic.jsonl")]) == 0
    for name in ("rope", "mixed", "shares"):
        rows.append(tmp_path / f"{name}.jsonl", ppl_rows("ours", "oracle"))
    tried = [
        {"try": name, "config": asdict(CFG), "digest": str(i), "half": "confirming" if i % 2 else "choosing", "kl": kl,
         "label_bytes": 16, "kept_blocks": 32.0, "context_tokens": 3072, "score_tokens": 64}
        for name, kl, n in (("ours", 0.02, 8), ("32x4", 0.01, 8), ("16x4", 0.01, 7)) for i in range(n)
    ]  # fmt: skip
    jsonl.append(tmp_path / "tries.jsonl", tried)
    jsonl.append(tmp_path / "operator.jsonl", OPERATORS)
    jsonl.append(tmp_path / "decode.jsonl", STEPS)
    indexing = [operator("label_keys", 100.0, floor_us=80.0), operator("label_keys_eager", 900.0), operator("fit", 9.0)]
    jsonl.append(tmp_path / "index.jsonl", indexing)
    waits = {"n_layers": 36, "context": 8192, "block_budget": 8192, "token_budget": 1024, "dtype": "bfloat16"}
    first = [
        FirstTokenRow(
            bench="first-token", case="qwen3-8b", B=1, provider=name, prompt_seconds=5.0, seconds=seconds,
            **waits, **{**MACHINE._asdict(), **ON},
        )
        for name, seconds in (("cold", 70.0), ("cold", 61.0), ("warm", 15.5))
    ]  # fmt: skip
    jsonl.append(tmp_path / "first-token.jsonl", first)
    jsonl.append(tmp_path / "offload.jsonl", OFFLOAD)
    (tmp_path / "decode.svg").write_text("<svg/>", encoding="utf-8")
    out = tmp_path / "docs" / "report.md"
    written = write_report(tmp_path, out)
    names = {"report.md", "accuracy.svg", "ablation.svg", "frontier.svg", "attention.svg", "depths.svg", "cost.svg",
             "throughput.svg"}  # fmt: skip
    assert {path.name for path in written} == names
    text = out.read_text(encoding="utf-8")
    assert "(../decode.svg)" in text
    assert "operator-lengths" not in text
    # Ratios: of one run's rows, of the dense loop's best batch; none where no dense was measured
    assert "| a GPU | `case` | 137 | 20.0 (6.8) |  |  |" in text
    assert "| a GPU | `other` |" not in text
    assert re.search(r"`filter_dims=16` \|.*\| cpu \| 0.95 \(a GPU, abc\) \|", text)
    assert re.search(r"`filter_dims=16` \|.*\| 8 \| 19.0 \| 20.0 \| 0.95 \| a GPU \| abc \|", text)
    assert (
        "| `32x4` | 3,072 | 16 | 1,024, 512 | 0.0100 | 0.50 (0.50-0.50) | 0.50 (0.50-0.50) | 16 | 16 | 32.0 | 8 |"
        in text
    )
    assert "`16x4`" not in text
    assert "--tokens 4224 --pool 2 --block-budget 1024 --token-budget 512 --providers async --texts 'prose'`" in text
    assert re.search(r"`block_size=64` \|.*\| cpu \| 0.90 \(a GPU, abc\) \|", text)
    assert re.search(r"`block_size=32` \|.*\|  \|", text)
    assert "| `two_level` |  | 5.00 (4.90 to 5.10) | 2.00 | 200 | 30 | abc |" in text
    assert "| `two_level_tuned` |  | 4.00 (3.90 to 4.10) |  | 250 | 30 | def |" in text
    assert "| a GPU | 98,304 | all | `offload_async` | 8 | 15.0 | 550 | 5.5 | 96.0% | 500 | 20 | abc |" in text
    assert "| a GPU | 49,152 | 40 | `offload_async` | 8 | 15.0 | 550 |  | 96.0% | 500 | 20 | abc |" in text
    assert (
        "| a GPU | prose | `async` | 2 | 1,024, 512 | 97.0% | 0.50% | 25% | 0.0020 | 0.0060 | 0.0050 | 128 | abc |"
        in text
    )
    assert "| a GPU | `case` | 12.0 | 3.0 | 5.0 | 20.0 | 60% | 30 | abc |" in text
    assert text.count("| 60% |") == 1
    assert "| labels of the whole context, one layer | 100.0 (" in text
    assert "| 80% | 30 | abc |" in text
    assert "900.0" not in text
    assert "| a GPU | qwen3-8b | 36 | 1 | 8,192 | cold | 61.0 | 5.0 | abc |" in text
    assert "70.0" not in text
    assert "No rows yet" not in text
    for path in written[1:]:
        assert f"(report/{path.name})" in text
        assert path.stat().st_size > 5000
    assert "`quest_double_sparsity`" in text
    assert "3: 82.5%" in text or "2: 85.0%" in text
    # Measured before, with another result: the same report
    again = [replace(row, date="2001-01-01", kl=9.0) for row in ppl_rows("comparison")]
    rows.append(tmp_path / "accuracy-older.jsonl", again)
    write_report(tmp_path, out)
    assert out.read_text(encoding="utf-8") == text


def test_needles_at_chosen_depths_are_listed_by_the_bytes_of_the_index(tmp_path: Path) -> None:
    found = [
        *answers("single", "dense", [1, 1, 0, 1], depth=0.5, index_share=0.0),
        # What is read of a prompt depends on its length
        *(
            replace(row, read_share=0.2 + i / 100)
            for i, row in enumerate(answers("single", "ours", [1, 0, 0, 1], depth=0.5, index_share=0.0625))
        ),
        *answers("multi_key", "dense", [1], depth=1.0),
        *answers("multi_key", "ours", [0], depth=1.0, index_share=0.0625),
        *answers("single", "ours:label_bits=2", [0, 0], depth=0.5, index_share=0.03125),
        # In another dtype all is lost, and dense attention too
        *answers("single", "dense", [0], depth=0.5, dtype="bfloat16"),
        *answers("single", "ours", [0], depth=0.5, dtype="bfloat16", index_share=0.0625),
        # Nobody asked dense attention, and a needle at random
        *answers("multi_value", "ours", [0], depth=0.5), *answers("copy", "dense", [1]), *answers("copy", "ours", [0]),
    ]  # fmt: skip
    text = "\n".join(retrieval_section(found, tmp_path, tmp_path))
    half = "| 8,000 | 3.1 | 20.0 | `ours:label_bits=2` | 0.0% (0.0% to 0.0%) | 100.0% (100.0% to 100.0%) | 2 |"
    assert text.index(f"| m, float32 {half}") < text.index("| m, float32 | 8,000 | 6.2 | 21.2 | `ours` | 25.0% (")
    assert re.search(r"`ours` \| 25.0% \([^|]*\| 62.5% \([^|]*\| 5 \| multi_key, single \|", text)
    assert "| m, bfloat16 | 8,000 | 6.2 | 20.0 | `ours` | 0.0% | 0.0% | 1 | single |" in text


def test_losses_are_means_of_tasks_over_the_samples_that_dense_answered_too() -> None:
    found = [
        *answers("single", "dense", [1, 1, 1, 1]), *answers("single", "ours", [1, 1, 1, 0]),
        *answers("copy", "dense", [1, 0]), *answers("copy", "ours", [0, 0, 1]),
        # Needles at chosen depths are the map's
        *answers("multi_key", "dense", [1, 1], depth=0.5), *answers("multi_key", "ours", [0, 0], depth=0.5),
        *answers("single", "dense", [0], 3072), *answers("single", "ours", [1], 3072),
    ]  # fmt: skip
    short, long = summarise_losses(found)
    assert (short.length_tokens, short.loss.mean) == (3072, -1)
    # 1/4 and 1/2 of the tasks' scores, and not 2 of 6 samples
    assert (long.tasks, long.n_samples, long.loss.mean, long.dense.mean) == (("copy", "single"), 6, 0.375, 0.75)
    assert long.loss.low < 0.375 < long.loss.high
    (copying,) = summarise_losses([row for row in found if row.length_tokens == 8000], ["copy"])
    assert copying.loss.mean == 0.5


def test_targets_say_what_holds_what_is_missed_and_what_bounds_it() -> None:
    pairs = {
        "ours": (0.004, 1.02),
        "oracle": (0.003, 1.01),
        "quest_double_sparsity:block_size=32": (0.02, 1.05),
        "ours:group_reduce=softmax_max": (0.002, 1.001),
    }
    base = TLSConfig(block_budget=1792, token_budget=896, sink_tokens=32, recent_tokens=32)
    found: list[rows.Row] = [
        rows.PplRow(
            eval="ppl", **ORIGIN, method=m.name, config=m.config, backend="", **cost(m, 64, 7168)._asdict(),
            digest=str(i), document=f"choosing/manual-{i}.rst", context_tokens=7168, score_tokens=1024, step_tokens=16,
            kl=pairs[m.name][0], nll=1 + math.log(pairs[m.name][1]), nll_dense=1.0, agreement=0.9,
        )
        for m in make_methods(list(pairs), [base], 8192)[0]
        for i in range(8)
    ]  # fmt: skip
    for i, task in enumerate(TASKS):
        found += [*answers(task, "dense", [1, 1]), *answers(task, "ours", [1, float(i > 0)])]
        found += answers(task, "oracle", [1, 1])
    text = "\n".join(target_section(found, {(7168, 1024)}))
    assert "8 documents, 7,168 tokens of context, 8,192 scored in all" in text
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| 1/")}
    assert lines["1/4, 1/8: KL"][2] == "holds"
    assert lines["1/4, 1/8: perplexity above dense"][1:4] == [
        "+2.00% (+2.00% to +2.00%)", "missed", "`ours:group_reduce=softmax_max` +0.10% (+0.10% to +0.10%)"
    ]  # fmt: skip
    assert "`oracle` +1.00%" in lines["1/4, 1/8: perplexity above dense"][4]
    assert lines["1/4, 1/8: KL over the oracle's"][1:3] == ["1.333 (1.333 to 1.333)", "holds"]
    (rival,) = (cells for name, cells in lines.items() if "Quest" in name and name.startswith("1/4"))
    assert rival[1:4] == ["5.0 (5.0 to 5.0)", "missed", "`ours:group_reduce=softmax_max` 10.0 (10.0 to 10.0)"]
    (retrieval,) = (cells for name, cells in lines.items() if "all 8 tasks, 16 samples of 8,000 tokens" in name)
    assert retrieval[2] == "missed, open"
    assert retrieval[4].startswith("`oracle` 0.0%")
    # Nothing at 1/8 and 1/16, and no attention
    assert lines["1/8, 1/16: KL"][1:3] == ["", "not measured"]
    assert next(cells for name, cells in lines.items() if "heavy" in name)[2] == "not measured"


def test_commands_are_those_of_the_rows_and_run() -> None:
    found = [row for row in ppl_rows("comparison", "ours:block_size=32") if isinstance(row, rows.PplRow)]
    scaled = [
        replace(row, model="m, RoPE yarn:2", document="confirming/x", context_tokens=9000)
        for row in found
        if row.digest == "0"
    ]
    # Some methods are not the whole comparison
    some = [replace(row, context_tokens=2000) for row in found if row.method in ("dense", "ours", "oracle")]
    assert text_commands("compare", some).startswith("`flex-tls eval ppl out/texts --documents 3")
    text = text_commands("compare", [*found, *scaled])
    assert (
        "`flex-tls eval compare out/texts --documents 3 --context-tokens 4096 --score-tokens 8 --dtype float32 "
        "--block-budget 1024 --token-budget 512`, as `eval ppl` with `--methods ours:block_size=32`"
    ) in text
    assert "compare out/texts/confirming --documents 1 --context-tokens 9000" in text
    assert "--rope yarn:2" in text
    asked = [*answers("single", "dense", [1, 1]), *answers("single", "ours", [1, 1]), *answers("copy", "dense", [1])]
    deep = answers("multi_key", "ours", [1, 1, 1], depth=0.5)
    answered = retrieval_commands([row for row in [*asked, *deep] if isinstance(row, rows.AnswerRow)])
    assert (
        "--length 8000 --samples 2 --tasks single --methods dense,ours --dtype float32 --block-budget 2000" in answered
    )
    assert "--samples 1 --tasks copy --methods dense --dtype float32`" in answered
    assert "--samples 3 --tasks multi_key --depth 0.5 --methods ours" in answered
    evaluation = typer.main.get_command(eval_app)
    commands = re.findall(r"flex-tls eval ([^`]+)`", text + answered)
    commands += [part.removeprefix("flex-tls eval ") for part in re.split(r"&&\s+\\?\s*", ACCURACY)]
    assert len(commands) == 7
    for command in commands:
        name, *arguments = shlex.split(command)
        # Fails at an option that the command does not have
        evaluation.commands[name].make_context(name, arguments, resilient_parsing=True)
    for command in SPEED.replace("\\\n", " ").split("&&"):
        assert _parser().parse_args(shlex.split(command)[3:])


def test_without_rows_a_report_says_how_to_get_them(tmp_path: Path) -> None:
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("No rows yet") == 19
    assert "flex-tls eval ablate out/texts --documents 24 --context-tokens 7168 --score-tokens 192" in text


def test_an_ablation_changes_one_component_at_a_time() -> None:
    ((base, changes),) = ablations(ppl_rows("ablation"))
    assert base.method == "ours"
    assert {component for component, *_ in changes} >= {"index", "label channels", "block budget", "dense layers"}
    for _, change, line, ratio in changes:
        assert line.config is not None
        assert base.config is not None
        differs = {key for key, value in line.config.items() if value != base.config[key]}
        assert differs == {setting.partition("=")[0] for setting in change.split(":")}
        assert ratio.mean == pytest.approx(line.kl.mean / base.kl.mean)


def test_the_front_is_what_nothing_beats() -> None:
    lines = [line for line in summarise_ppl(ppl_rows("frontier")) if line.config]
    front = pareto(lines, "index_share")
    for line in front:
        assert not any(x.index_share <= line.index_share and x.kl.mean < line.kl.mean for x in lines)
    assert len({line.index_share for line in front}) == len(front) > 1
