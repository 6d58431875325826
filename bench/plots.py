"""Pictures and tables, from rows alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flex_tls.cli.figures import save

from .cases import SUITES
from .rows import Measured, ModelRow, Row

# Ours in warm colours, dense kernels in blues, other sparse methods in greens and greys
COLOURS = {
    "triton_total": "#9b1d3a",
    "triton_filter16": "#e4572e",
    "triton_mixed": "#f28f3b",
    "triton_mixed_filter24": "#f7b978",
    "triton_blocks_only": "#dd8fa5",
    "flex_total": "#d1495b",
    "flex_given_selection": "#edae49",
    "flex_given_tokens": "#f4d58d",
    "sdpa_cudnn": "#00507a",
    "sdpa_flash": "#4f9ac4",
    "flex_dense": "#a3cbe3",
    "double_sparsity": "#2e7d4f",
    "quest_block_budget": "#7ba05b",
    "quest_token_budget": "#b5a642",
}
OTHER = "#8d99ae"
# Curves over S and over budgets; the rest is in the table. What a line is called beside it
CURVES = {
    "sdpa_cudnn": "dense, cuDNN",
    "sdpa_flash": "dense, flash",
    "sliding_window_triton": "sliding window",
    "quest_block_budget": "Quest, block budget",
    "quest_token_budget": "Quest, token budget",
    "double_sparsity": "Double Sparsity",
    "triton_total": "ours",
    "triton_filter16": "ours, filter_dims=16",
    "triton_mixed": "ours, 4 and 2 bits, 8 bytes",
    "triton_mixed_filter24": "ours, 4 and 2 bits, level 1 reads 8 of 16 bytes",
    "triton_blocks_only": "ours, blocks only",
    "flex_total": "ours, flex",
}
PANEL_BATCH_SIZES = (1, 16)


def table(rows: Sequence[Row]) -> str:
    """Markdown: microseconds with their spread, floor, ratio to the best dense torch kernel of the case, errors."""
    lines = [
        "| case | provider | stage | median us | p10 - p90 | floor us | dense / this | rel. error "
        "| dense's on the same tokens | runs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        dense = _best_dense([other for other in rows if (other.case, other.inputs) == (row.case, row.inputs)])
        ratio = f"{dense / row.median_us:.1f}x" if dense else ""
        case = row.case if row.inputs == "rotated" else f"{row.case}, inputs {row.inputs}"
        theirs = "" if row.rel_error_dense is None else f"{row.rel_error_dense:.1e}"
        lines.append(
            f"| {case} | {row.provider} | {row.stage} | {row.median_us:.1f} | {row.p10_us:.1f} - {row.p90_us:.1f} "
            f"| {row.floor_us:.1f} | {ratio} | {row.rel_error:.1e} | {theirs} | {row.runs} |"
        )
    return "\n".join(lines)


def draw_all(rows: Sequence[Row], path: Path) -> list[Path]:
    """Every picture that the rows are enough for; returns their paths. Rows of repeated inputs are only in the table.

    ``path``: bars of the default suite's cases, or of the first two. Beside it, named after it: ``-lengths-MODEL``,
    times and speed-up over S; ``-budgets-MODEL``, times over each budget at one S.
    """
    rows = [row for row in rows if row.inputs == "rotated"]
    pictures: list[tuple[str, Callable[[], Figure]]] = []
    models = dict.fromkeys(_model(row) for row in rows)
    for model in models:
        mine = _of_one_block_size([row for row in rows if _model(row) == model])
        usual = [row for row in mine if not _other_budgets(row)]
        swept = [b for b in PANEL_BATCH_SIZES if len({row.S for row in usual if b == row.B}) > 2]
        if swept:
            pictures.append((f"-lengths-{model}", lambda rows=usual, b=swept: _lengths(rows, b)))  # type: ignore[misc]
        length = max((row.S for row in mine if _other_budgets(row)), default=None)
        if length is not None:
            chosen = [row for row in mine if length == row.S]
            pictures.append((f"-budgets-{model}", lambda rows=chosen: _budgets(rows)))  # type: ignore[misc]
    known = dict.fromkeys(row.case for row in rows)
    barred = [case for case in SUITES["default"].cases if case in known] or list(known)[:2]
    pictures.insert(0, ("", lambda: _cases([row for row in rows if row.case in barred])))
    written = []
    for ending, draw in pictures if rows else ():
        target = path.with_stem(path.stem + ending)
        save(draw(), target)
        written.append(target)
    return written


def _cases(rows: Sequence[Row]) -> Figure:
    """One panel of bars a case."""
    names = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(6.4 * len(names), 5.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        ordered = sorted((row for row in rows if row.case == name), key=lambda row: -row.median_us)
        _bars(axes, ordered)
        axes.set_title(f"{name}: {_shape(ordered[0])}", fontsize=9)
    return _signed(figure, "One decoded token's attention", rows)


def _lengths(rows: Sequence[Row], batch_sizes: Sequence[int]) -> Figure:
    """Times above, speed-up over dense cuDNN below, a column for each batch size."""
    figure = Figure(figsize=(7.2 * len(batch_sizes), 9.0), layout="constrained")
    grid = figure.subplots(2, len(batch_sizes), squeeze=False, sharex=True)
    for column, b in enumerate(batch_sizes):
        lines = _lines([row for row in rows if b == row.B], "S")
        times, ratios = grid[0][column], grid[1][column]
        _draw(times, {name: [(row.S, row.median_us) for row in line] for name, line in lines.items()})
        times.set_ylabel("us, median")
        times.set_title(f"B {b}, {_shape(rows[0])}", fontsize=9)
        dense = {row.S: row.median_us for row in lines.get("sdpa_cudnn", [])}
        # Where a curve crosses this line a method begins to pay
        ratios.axhline(1.0, color=COLOURS["sdpa_cudnn"], lw=1)
        ratios.annotate(
            "as fast as dense cuDNN", (0.99, 1.0), (0, -8), ("axes fraction", "data"), "offset points", fontsize=7,
            ha="right", va="top",
        )  # fmt: skip
        _draw(
            ratios,
            {
                name: [(row.S, dense[row.S] / row.median_us) for row in line if row.S in dense]
                for name, line in lines.items()
                if name != "sdpa_cudnn"
            },
        )
        ratios.set_ylabel("times faster than dense cuDNN")
        ratios.set_xlabel("cached tokens (S)")
        lengths = sorted({row.S for line in lines.values() for row in line})
        ratios.set_xticks(lengths, [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
        ratios.minorticks_off()
    return _signed(figure, "One decoded token's attention over the context length, default budgets", rows)


def _budgets(rows: Sequence[Row]) -> Figure:
    """Times over the block budget on the left, over the token budget on the right; a row for each batch size."""
    batch_sizes = sorted({row.B for row in rows if _other_budgets(row)})
    figure = Figure(figsize=(14.4, 4.6 * len(batch_sizes)), layout="constrained")
    grid = figure.subplots(len(batch_sizes), 2, squeeze=False)
    for i, b in enumerate(batch_sizes):
        mine = [row for row in rows if b == row.B]
        for axes, varied, fixed, value in zip(
            grid[i], ("block_budget", "token_budget"), ("token_budget", "block_budget"), (1024, 8192), strict=True
        ):
            lines = _lines([row for row in mine if getattr(row, fixed) == value], varied)
            _draw(axes, {n: [(getattr(row, varied), row.median_us) for row in line] for n, line in lines.items()})
            ticks = sorted({getattr(row, varied) for line in lines.values() for row in line})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel(f"{varied}, tokens; {fixed} {value}")
            axes.set_ylabel("us, median")
            axes.set_title(f"B {b}, S {mine[0].S}, {_shape(mine[0])}", fontsize=9)
    return _signed(figure, "One decoded token's attention over the budgets", rows)


def _lines(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """The rows of each curve, ordered by ``field``; a dense kernel's best form at each point."""
    lines: dict[str, list[Row]] = {}
    for name in CURVES:
        best: dict[int, Row] = {}
        for row in rows:
            if row.provider == name or row.provider == f"{name}_gqa":
                x = getattr(row, field)
                best[x] = min(best.get(x, row), row, key=lambda row: row.median_us)
        if best:
            lines[name] = [best[x] for x in sorted(best)]
    return lines


def _draw(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Log-log curves, each named at its right end."""
    lines = {name: points for name, points in lines.items() if points}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for name, points in lines.items():
        colour = COLOURS.get(name, OTHER)
        width = 2.2 if name == "triton_total" else 1.2
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, lw=width, color=colour)
    axes.grid(alpha=0.25)
    ends = {name: points[-1] for name, points in lines.items()}
    ordered = sorted(ends, key=lambda name: ends[name][1])
    low, high = axes.get_ylim()
    # Names a line's height apart at least, as shares of the axis
    places = [math.log(ends[name][1] / low) / math.log(high / low) for name in ordered]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + 0.045)
    for name, place in zip(ordered, places, strict=True):
        axes.annotate(
            f"{CURVES[name]} {_three_digits(ends[name][1])}",
            (1.01, place),
            xycoords="axes fraction",
            fontsize=7.5,
            va="center",
            color=COLOURS.get(name, OTHER),
            annotation_clip=False,
        )


def _three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _bars(axes: Axes, ordered: Sequence[Row]) -> None:
    place = range(len(ordered))
    below = [max(0.0, row.median_us - row.p10_us) for row in ordered]
    above = [max(0.0, row.p90_us - row.median_us) for row in ordered]
    median = [row.median_us for row in ordered]
    axes.barh(place, median, xerr=[below, above], color=[_colour(row) for row in ordered], capsize=2)
    axes.scatter([row.floor_us for row in ordered], place, marker="|", s=90, color="black", label="byte floor")
    for i, row in zip(place, ordered, strict=True):
        axes.annotate(f" {row.median_us:.1f}", (row.p90_us, i), va="center", fontsize=7)
    axes.set_yticks(place, [f"{row.provider} ({row.stage})" for row in ordered], fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(f"us, S = {ordered[0].S}; whiskers p10 to p90")
    axes.legend(fontsize=7, loc="lower right")


def _signed(figure: Figure, title: str, rows: Sequence[Row]) -> Figure:
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(provenance(rows), fontsize=7)
    return figure


def _model(row: Row) -> str:
    """``qwen3-8b`` of ``qwen3-8b-b1-96k``."""
    return re.split(r"-b\d+", row.case)[0]


def _other_budgets(row: Row) -> bool:
    """Whether the case is of the sweep of budgets: its name has them."""
    return row.case.removesuffix(f"-block{row.block_size}").endswith(f"-{row.block_budget}-{row.token_budget}")


def _of_one_block_size(rows: Sequence[Row]) -> list[Row]:
    """Those in blocks of the size that most lengths were measured with, since no curve is over block sizes."""
    lengths: dict[int, set[int]] = {}
    for row in rows:
        lengths.setdefault(row.block_size, set()).add(row.S)
    most = max(lengths, key=lambda size: (len(lengths[size]), -size))
    return [row for row in rows if row.block_size == most]


def _shape(row: Row) -> str:
    return f"HQ {row.HQ}, HKV {row.HKV}, D {row.D}, blocks of {row.block_size}, {row.dtype}"


def _colour(row: Row) -> str:
    name = row.provider.partition("[")[0]
    return COLOURS.get(name.removesuffix("_gqa"), OTHER)


def _best_dense(rows: Sequence[Row]) -> float | None:
    return min((row.median_us for row in rows if row.provider.startswith("sdpa_")), default=None)


def provenance(rows: Sequence[Measured]) -> str:
    """Where, when and on what the rows were measured, for below a picture."""
    newest = max(rows, key=lambda row: row.date)
    commits = ", ".join(dict.fromkeys(row.commit[:9] + ("+changes" if row.dirty else "") for row in rows))
    runs = [row.runs for row in rows if isinstance(row, (Row, ModelRow))]
    return (
        f"{newest.gpu}, driver {newest.driver}, torch {newest.torch}, triton {newest.triton}; commit {commits}; "
        f"{newest.date[:10]}" + (f"; medians of at least {min(runs)} runs" if runs else "")
    )
