"""What a setting costs in time next to what it gains in KL: rows of the operator bench joined with rows of eval ppl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from flex_tls.cli.figures import save
from flex_tls.cli.plots import ablations
from flex_tls.evaluate.bootstrap import Interval
from flex_tls.evaluate.rows import Row as EvalRow
from flex_tls.evaluate.sets import BASE
from flex_tls.evaluate.summary import PplSummary, kl_ratio, summarise_ppl

from . import markdown
from .report_targets import LEAST_DOCUMENTS, WIDE, pair_of
from .rows import Row, most_sampled, read

# Settings that the operator bench has, at 96k tokens and B=1: the ending of a case's name, and a provider
CASE = "qwen3-8b-b1-96k"
CHANGES = {
    **{f"block_size={size}": ("", "triton_total") for size in (16, 32, 64, 128)},
    "filter_dims=16": ("", "triton_filter16"),
    "group_reduce=softmax_max": ("", "triton_softmax_max"),
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


def timed(results: Path, block_size: int) -> dict[str, tuple[Row, Row]]:
    """The newest row of each of :data:`METHODS` in blocks of ``block_size``, and that of ours in the same run (GPU and
    commit), by method."""
    runs: dict[tuple[str, str], dict[tuple[str, int, str], Row]] = {}
    for row in most_sampled(sorted(read(results / "operator.jsonl"), key=lambda row: row.date)):
        if row.inputs == "rotated" and row.case.startswith(CASE):
            ending = row.case.removeprefix(CASE).removesuffix(f"-block{row.block_size}")
            runs.setdefault((row.gpu, row.commit), {})[ending, row.block_size, row.provider] = row
    found = {}
    for run in runs.values():
        base = run.get(("", block_size, "triton_total"))
        for method, (ending, provider) in METHODS.items():
            _, _, size = method.partition(f"{BASE}:block_size=")
            key = ending, int(size or block_size), provider
            if base is not None and key in run:
                found[method] = (run[key], base)
    return found


def ablated_times(results: Path, block_size: int) -> dict[str, str]:
    """How much longer the operator takes with a change than without it in the same run, by the change."""
    return {
        method.partition(":")[2]: f"{row.median_us / base.median_us:.2f} ({markdown.gpu(row.gpu)}, {row.commit[:7]})"
        for method, (row, base) in timed(results, block_size).items()
        if ":" in method
    }


def cost_section(found: Sequence[EvalRow], results: Path, pictures: Path, base: Path) -> Iterator[str]:
    """Microseconds against KL, both over those of ours."""
    yield "## Microseconds against KL\n"
    command = "python -m bench run operator --suite budgets"
    points = list(_points(found, results))
    if not points:
        yield f"No rows yet: `{command}` and those of the ablation.\n"
        return
    ours = points[0].base
    path = pictures / "cost.svg"
    save(_scatter(ours.method, points), path)
    yield f"![KL over time, both over ours]({markdown.link(path, base)})\n"
    yield (
        f"Both over those of `{ours.method}`, which is at 1, 1. KL: SmolLM2, 1/4 and 1/8 of the context, where most "
        "tokens were scored. Time: the operator's at 96k tokens, B=1, heads of 128, budgets of 8,192 and 1,024, in the "
        f"newest run that has both; runs are of several commits. `{command}`, `--suite blocks`, and the ablation's "
        "command\n"
    )
    table = [("change, or method", "KL, times", "scored a document", "us", f"`{ours.method}`, us", "time, times", "GPU",
              "commit")]  # fmt: skip
    table += [
        (f"`{x.name}`", markdown.interval(x.ratio, 2), f"{x.base.span[1]:,}", f"{x.row.median_us:.1f}",
         f"{x.beside.median_us:.1f}", f"{x.time:.2f}", markdown.gpu(x.row.gpu), x.row.commit[:7])
        for x in sorted(points, key=lambda x: x.ratio.mean)
    ]  # fmt: skip
    yield markdown.table(table)


class _Point(NamedTuple):
    """A change of ``base`` or a published method: its KL over that of base, its row and that of base beside it."""

    base: PplSummary
    name: str
    ratio: Interval
    row: Row
    beside: Row

    @property
    def time(self) -> float:
        return self.row.median_us / self.beside.median_us


def _points(found: Sequence[EvalRow], results: Path) -> Iterator[_Point]:
    """Each once, of the span in which most tokens were scored; all in blocks of one size but where that changes."""
    lines = [x for x in summarise_ppl(found) if x.config is not None]
    studies = [x for x in ablations(found) if pair_of(x[0]) == WIDE and x[0].n_documents >= LEAST_DOCUMENTS]
    studies.sort(key=lambda x: -x[0].score_tokens)
    studies = [x for x in studies if x[0].method == studies[0][0].method]
    sizes = {base.config["block_size"] for base, _ in studies if base.config is not None}
    times = {name: rows for size in sizes for name, rows in timed(results, size).items()}
    seen = set()
    for base, changes in studies:
        some = [(f"{BASE}:{change}", ratio) for _, change, _, ratio in changes]
        some += [
            (name, kl_ratio(found, x, base))
            for x in lines
            if x.span == base.span and (name := _published(x, base)) is not None
        ]
        for method, ratio in some:
            if method in times and method not in seen:
                seen.add(method)
                yield _Point(base, method.removeprefix(f"{BASE}:"), ratio, *times[method])


def _published(line: PplSummary, base: PplSummary) -> str | None:
    """The published method that a line is, in blocks and as many tokens as ours keeps, or keeps in blocks."""
    assert base.config is not None
    assert line.config is not None
    name = line.method.removesuffix(f":block_size={base.config['block_size']}")
    same = line.model == base.model and line.config["block_size"] == base.config["block_size"]
    return name if same and name in _KEPT and base.config[_KEPT[name]] == line.kept_tokens else None


def _scatter(base: str, points: Sequence[_Point]) -> Figure:
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for name, ratio, time in [*((x.name, x.ratio, x.time) for x in points), (base, Interval(1.0, 1.0, 1.0), 1.0)]:
        axes.plot([time, time], [ratio.low, ratio.high], color="#8d99ae", lw=1)
        axes.plot(time, ratio.mean, "o", ms=4, color="#2e7d4f" if name in _KEPT else "#9b1d3a")
        axes.annotate(name, (time, ratio.mean), (5, 3), textcoords="offset points", fontsize=7)
    axes.set(
        yscale="log", xlabel="time of one token's attention, times ours", ylabel="KL, times ours; bars 95% intervals"
    )
    axes.margins(x=0.12)
    axes.grid(alpha=0.25)
    return figure
