"""What a setting costs in time next to what it gains in KL: rows of the operator bench joined with rows of eval ppl."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flex_tls.cli.figures import save
from flex_tls.cli.plots import ablations
from flex_tls.evaluate.bootstrap import Interval
from flex_tls.evaluate.rows import Row as EvalRow
from flex_tls.evaluate.sets import BASE
from flex_tls.evaluate.summary import PplSummary, kl_ratio, summarise_ppl

from . import markdown
from .report_targets import LEAST_DOCUMENTS, WIDE, pair_of
from .rows import Row, read

# Settings that the operator bench has, at 96k tokens and B=1: the ending of a case's name, and a provider
CASE = "qwen3-8b-b1-96k"
CHANGES = {
    "block_size=16": ("-block16", "triton_total"),
    "block_size=64": ("-block64", "triton_total"),
    "filter_dims=16": ("", "triton_filter16"),
    "block_size=16:label_bits=4+4+2+2": ("-block16", "triton_wide"),
    "index=box": ("", "triton_box"),
    "index=mean": ("", "triton_mean"),
    "label_bits=4+4+2+2": ("", "triton_wide"),
    "label_bits=4+2": ("", "triton_mixed"),
    "label_bits=4+2+2+2:filter_dims=24": ("", "triton_mixed_filter24"),
    "block_budget=x1/2": ("-4096-1024", "triton_total"),
    "block_budget=x2": ("-16384-1024", "triton_total"),
    "token_budget=x1/4": ("-8192-256", "triton_total"),
    "token_budget=x1/2": ("-8192-512", "triton_total"),
    "token_budget=x2": ("-8192-2048", "triton_total"),
    "token_budget=None": ("", "triton_blocks_only"),
}
METHODS = {
    **{f"{BASE}:{change}": timed for change, timed in CHANGES.items()},
    "quest": ("", "quest_token_budget"),
    "quest_wide": ("", "quest_block_budget"),
    "double_sparsity": ("", "double_sparsity"),
}
# What a published method keeps of ours' budgets
_KEPT = {"quest": "token_budget", "quest_wide": "block_budget", "double_sparsity": "token_budget"}


def timed(results: Path) -> dict[str, tuple[Row, Row]]:
    """The newest row of each of :data:`METHODS`, and that of ours in the same run (GPU and commit), by method."""
    runs: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in sorted(read(results / "operator.jsonl"), key=lambda row: row.date):
        if row.inputs == "rotated" and row.case.startswith(CASE):
            runs.setdefault((row.gpu, row.commit), {})[row.case.removeprefix(CASE), row.provider] = row
    found = {}
    for run in runs.values():
        base = run.get(("", "triton_total"))
        for method, key in METHODS.items():
            if base is not None and key in run:
                found[method] = (run[key], base)
    return found


def ablated_times(results: Path) -> dict[str, str]:
    """How much longer the operator takes with a change than with the defaults in the same run, by the change."""
    return {
        method.partition(":")[2]: f"{row.median_us / base.median_us:.2f} ({markdown.gpu(row.gpu)}, {row.commit[:7]})"
        for method, (row, base) in timed(results).items()
        if ":" in method
    }


def cost_section(found: Sequence[EvalRow], results: Path, pictures: Path, base: Path) -> Iterator[str]:
    """Microseconds against KL, both over those of ours."""
    yield "## Microseconds against KL\n"
    command = "python -m bench run operator --suite budgets"
    times = timed(results)
    points = [(method, span, ratio, *times[method]) for method, (span, ratio) in _ratios(found, times).items()]
    if not points:
        yield f"No rows yet: `{command}` and those of the ablation.\n"
        return
    path = pictures / "cost.svg"
    save(_scatter([(method, ratio, row.median_us / ours.median_us) for method, _, ratio, row, ours in points]), path)
    yield f"![KL over time, both over ours]({markdown.link(path, base)})\n"
    yield (
        "Both over those of `ours`, which is at 1, 1. KL: SmolLM2, 1/4 and 1/8 of the context, where most tokens were "
        f"scored. Time: the operator's at 96k tokens, B=1, heads of 128, budgets of 8,192 and 1,024, in the newest run "
        f"that has both; runs are of several commits. `{command}`, `--suite blocks`, and the ablation's command\n"
    )
    table = [("configuration", "KL, times", "scored a document", "us", "`ours`, us", "time, times", "GPU", "commit")]
    for method, span, ratio, row, ours in sorted(points, key=lambda x: x[2].mean):
        table.append((
            f"`{method}`", markdown.interval(ratio, 2), f"{span[1]:,}", f"{row.median_us:.1f}",
            f"{ours.median_us:.1f}", f"{row.median_us / ours.median_us:.2f}", markdown.gpu(row.gpu), row.commit[:7],
        ))  # fmt: skip
    yield markdown.table(table)


def _ratios(found: Sequence[EvalRow], methods: Collection[str]) -> dict[str, tuple[tuple[int, int], Interval]]:
    """KL of each method over that of ours at 1/4 and 1/8, over the span in which most tokens were scored."""
    lines = [x for x in summarise_ppl(found) if x.config is not None]
    ratios: dict[str, tuple[tuple[int, int], Interval]] = {}
    studies = [x for x in ablations(found) if pair_of(x[0]) == WIDE and x[0].n_documents >= LEAST_DOCUMENTS]
    for base, changes in sorted(studies, key=lambda x: -x[0].score_tokens):
        some = [(f"{BASE}:{change}", ratio) for _, change, _, ratio in changes]
        some += [(x.method, kl_ratio(found, x, base)) for x in lines if x.span == base.span and _published(x, base)]
        for method, ratio in some:
            if method in methods:
                ratios.setdefault(method, (base.span, ratio))
    return ratios


def _published(line: PplSummary, base: PplSummary) -> bool:
    """Whether a line is a published method's in as many tokens as ours keeps, or keeps in blocks."""
    assert base.config is not None
    kept = {name: base.config[_KEPT[name]] for name in _KEPT}
    return line.model == base.model and kept.get(line.method) == line.kept_tokens


def _scatter(points: Sequence[tuple[str, Interval, float]]) -> Figure:
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for method, ratio, time in [*points, (BASE, Interval(1.0, 1.0, 1.0), 1.0)]:
        axes.plot([time, time], [ratio.low, ratio.high], color="#8d99ae", lw=1)
        axes.plot(time, ratio.mean, "o", ms=4, color="#9b1d3a" if method.startswith(BASE) else "#2e7d4f")
        axes.annotate(
            method.removeprefix(f"{BASE}:"), (time, ratio.mean), (5, 3), textcoords="offset points", fontsize=7
        )
    axes.set(
        yscale="log", xlabel="time of one token's attention, times ours", ylabel="KL, times ours; bars 95% intervals"
    )
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    return figure
