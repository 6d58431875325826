"""Pictures and tables of whole models: steps over the context, prompts, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flex_tls.cli.figures import save

from .plots import provenance
from .rows import ModelRow, StageRow

COLOURS = {
    "two_level": "#9b1d3a",
    "two_level_tuned": "#e4572e",
    "two_level_autotuned": "#dd8fa5",
    "two_level_fused": "#d1495b",
    "two_level_fused_tuned": "#edae49",
    "two_level_skinny": "#7b2cbf",
    "two_level_skinny_overlapped": "#5a189a",
    "two_level_overlapped": "#c77dff",
    "dense_skinny": "#1b4965",
    "dense_skinny_overlapped": "#62b6cb",
    "dense_overlapped": "#5fa8d3",
    "dense": "#00507a",
    "transformers_static": "#4f9ac4",
    "transformers_default": "#a3cbe3",
    "transformers_sdpa": "#4f9ac4",
}
OTHER = "#8d99ae"
STAGE_COLOURS = {
    "matrix products": "#8d99ae",
    "append": "#b5a642",
    "two-level attention": "#e4572e",
    "full attention": "#9b1d3a",
    "norms, rotary, activations": "#4f9ac4",
    "sampling, copies": "#2e7d4f",
}


def table(rows: Sequence[ModelRow]) -> str:
    """Markdown: a line for every row, with its ratio to its case's dense attention: ours, or transformers' prompt."""
    lines = [
        "| bench | model | layers | B | context | provider | ms median | p10 - p90 | p99 | tokens/s | weights floor ms "
        "| case's dense / this | runs |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        case = [x for x in rows if x.key[2:-1] == row.key[2:-1]]
        dense = next((x.ms_median for x in case if x.provider in ("dense", "transformers_sdpa")), None)
        floor = "" if row.weights_floor_ms is None else f"{row.weights_floor_ms:.2f}"
        ratio = f"{dense / row.ms_median:.2f}x" if dense else ""
        lines.append(
            f"| {row.bench} | {row.case} | {row.n_layers} | {row.B} | {row.context} | {row.provider} "
            f"| {row.ms_median:.3f} | {row.ms_p10:.3f} - {row.ms_p90:.3f} | {row.ms_p99:.3f} "
            f"| {row.tokens_per_second:.0f} | {floor} | {ratio} | {row.runs} |"
        )
    return "\n".join(lines)


def draw_all(rows: Sequence[ModelRow], stages: Sequence[StageRow], path: Path) -> list[Path]:
    """Every picture that the rows are enough for; returns their paths.

    ``path``: milliseconds of a step over the context, a panel for every model and batch size. Beside it ``-prefill``,
    tokens a second of prompts, and ``-stages``, where the time of a step goes.
    """
    pictures: list[tuple[str, Callable[[], Figure]]] = []
    steps = [row for row in rows if row.bench == "decode"]
    prompts = [row for row in rows if row.bench == "prefill"]
    if steps:
        pictures.append(("", lambda: _panels(steps, "One decode step", "ms a step, median; whiskers p10 to p99", True)))
    if prompts:
        pictures.append(("-prefill", lambda: _panels(prompts, "Reading a prompt", "tokens a second", False)))
    if stages:
        pictures.append(("-stages", lambda: _stages(stages)))
    written = []
    for ending, draw in pictures:
        target = path.with_stem(path.stem + ending)
        save(draw(), target)
        written.append(target)
    return written


# Most panels side by side
COLUMNS = 3


def _panels(rows: Sequence[ModelRow], title: str, label: str, steps: bool) -> Figure:
    """A panel for every model and batch size: curves over the context, or bars where there is one context."""
    panels = sorted({(row.case, row.n_layers, row.B) for row in rows})
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(6.4 * min(len(panels), COLUMNS), 4.6 * lines), layout="constrained")
    grid = figure.subplots(lines, min(len(panels), COLUMNS), squeeze=False).flatten()
    for axes, (case, n_layers, b) in zip(grid, panels, strict=False):
        mine = [row for row in rows if (row.case, row.n_layers, row.B) == (case, n_layers, b)]
        contexts = sorted({row.context for row in mine})
        name = f"{case}, {n_layers} layers, B {b}, {mine[0].dtype}"
        if len(contexts) > 1:
            _curves(axes, mine, label, steps)
            axes.set_title(name, fontsize=9)
        else:
            _one_context(axes, mine, label, steps)
            axes.set_title(f"{name}, {contexts[0]:,} tokens", fontsize=9)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(provenance(rows), fontsize=7)
    return figure


def _value(row: ModelRow, steps: bool) -> float:
    return row.ms_median if steps else row.tokens_per_second


def _curves(axes: Axes, rows: Sequence[ModelRow], label: str, steps: bool) -> None:
    for provider, size in dict.fromkeys((row.provider, row.blocks_of) for row in rows):
        some = (row for row in rows if (row.provider, row.blocks_of) == (provider, size))
        line = sorted(some, key=lambda row: row.context)
        name = provider if size is None else f"{provider}, blocks of {size}"
        y = [_value(row, steps) for row in line]
        spread = [
            [max(0.0, row.ms_median - row.ms_p10) for row in line],
            [max(0.0, row.ms_p99 - row.ms_median) for row in line],
        ]
        axes.errorbar(
            [row.context for row in line], y, yerr=spread if steps else None, marker="o", ms=3.5, capsize=2,
            label=f"{name} {y[-1]:.3g}", color=COLOURS.get(provider, OTHER),
        )  # fmt: skip
    floors = [row.weights_floor_ms for row in rows if row.weights_floor_ms is not None]
    if steps and floors:
        axes.axhline(floors[-1], color="black", lw=0.8, ls=":", label="byte floor of the weights")
    ticks = sorted({row.context for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(ticks, [f"{s // 1024}k" if s >= 1024 else str(s) for s in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.set_xlabel("tokens cached" if steps else "tokens of the prompt")
    axes.set_ylabel(label)
    low, high = axes.get_ylim()
    # Figures that differ little do not fill the picture
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.legend(fontsize=7)


def _one_context(axes: Axes, rows: Sequence[ModelRow], label: str, steps: bool) -> None:
    ordered = sorted(rows, key=lambda row: _value(row, steps))
    values = [_value(row, steps) for row in ordered]
    bars = axes.barh(range(len(ordered)), values, color=[COLOURS.get(row.provider, OTHER) for row in ordered])
    axes.bar_label(bars, [f"{x:.3g}" for x in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(ordered)), [row.provider for row in ordered], fontsize=8)
    axes.invert_yaxis()
    if values[-1] > 10 * values[0]:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel(label.partition(";")[0])


def _stages(rows: Sequence[StageRow]) -> Figure:
    """For every profile: the stages of a step as bars, and the kernels of one layer along time."""
    figure = Figure(figsize=(14.4, 3.4 * len(rows)), layout="constrained")
    for (bars, line), row in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _bars(bars, row)
        _time_line(line, row)
    figure.suptitle("Where the time of one decode step goes, by the profiler", fontsize=11)
    figure.supxlabel(provenance(rows), fontsize=7)
    return figure


def _bars(axes: Axes, row: StageRow) -> None:
    ordered = sorted(row.stage_us.items(), key=lambda item: item[1])
    colours = [STAGE_COLOURS.get(name, OTHER) for name, _ in ordered]
    axes.barh(range(len(ordered)), [us for _, us in ordered], color=colours)
    for i, (name, us) in enumerate(ordered):
        axes.annotate(f" {us:.0f} ({row.stage_kernels[name]:.0f} kernels)", (us, i), va="center", fontsize=7)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.margins(x=0.25)
    axes.set_xlabel(f"us in one step; {sum(row.stage_us.values()):.0f} in all")
    axes.set_title(f"{row.case}, {row.n_layers} layers, B {row.B}, {row.context} tokens: {row.provider}", fontsize=9)


def _time_line(axes: Axes, row: StageRow) -> None:
    names = [name for name in STAGE_COLOURS if any(stage == name for stage, _, _ in row.layer)]
    for i, name in enumerate(names):
        spans = [(start, us) for stage, start, us in row.layer if stage == name]
        axes.broken_barh(spans, (i - 0.4, 0.8), color=STAGE_COLOURS[name])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("us, one layer in the middle, from its append to the next layer's")
    axes.grid(alpha=0.25, axis="x")
