"""Pictures and tables, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import Row

# Ours in warm colours, dense kernels in blues, what is neither in grey
COLOURS = {
    "triton_total": "#9b1d3a",
    "triton_filter16": "#b9476b",
    "triton_blocks_only": "#dd8fa5",
    "flex_total": "#d1495b",
    "flex_given_selection": "#edae49",
    "flex_given_tokens": "#f4d58d",
    "sdpa_cudnn": "#00507a",
    "sdpa_flash": "#4f9ac4",
    "flex_dense": "#a3cbe3",
}


def table(rows: Sequence[Row]) -> str:
    """Markdown: microseconds with their spread, floor, ratio to the best dense torch kernel of the case, error."""
    lines = [
        "| case | provider | stage | median us | p10 - p90 | floor us | dense / this | rel. error | runs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        dense = _best_dense([other for other in rows if other.case == row.case])
        ratio = f"{dense / row.median_us:.1f}x" if dense else ""
        lines.append(
            f"| {row.case} | {row.provider} | {row.stage} | {row.median_us:.1f} | {row.p10_us:.1f} - {row.p90_us:.1f} "
            f"| {row.floor_us:.1f} | {ratio} | {row.rel_error:.1e} | {row.runs} |"
        )
    return "\n".join(lines)


def draw_operator(rows: Sequence[Row], path: Path) -> None:
    """One panel of bars a case; for batch sizes measured at several S, one panel of times over S instead."""
    panels: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        lengths = {other.S for other in rows if other.B == row.B and other.D == row.D}
        swept = len(lengths) > 2
        panels.setdefault((row.B, "" if swept else row.case), []).append(row)
    count = len(panels)
    figure = Figure(figsize=(6.4 * count, 4.8), layout="constrained")
    for axes, (key, chosen) in zip(figure.subplots(1, count, squeeze=False)[0], panels.items(), strict=True):
        (_bars if key[1] else _curves)(axes, chosen)
        first = chosen[0]
        axes.set_title(f"B {first.B}, HQ {first.HQ}, HKV {first.HKV}, D {first.D}, {first.dtype}", fontsize=9)
    figure.suptitle("One decoded token's attention", fontsize=11)
    figure.supxlabel(_provenance(rows), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: -row.median_us)
    place = range(len(ordered))
    below = [max(0.0, row.median_us - row.p10_us) for row in ordered]
    above = [max(0.0, row.p90_us - row.median_us) for row in ordered]
    median = [row.median_us for row in ordered]
    axes.barh(place, median, xerr=[below, above], color=[_colour(row) for row in ordered], capsize=2)
    axes.scatter([row.floor_us for row in ordered], place, marker="|", s=120, color="black", label="byte floor")
    for i, row in zip(place, ordered, strict=True):
        axes.annotate(f" {row.median_us:.1f}", (row.p90_us, i), va="center", fontsize=7)
    axes.set_yticks(place, [f"{row.provider}\n({row.stage})" for row in ordered], fontsize=7)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(f"us, S = {ordered[0].S}; whiskers p10 to p90")
    axes.legend(fontsize=7, loc="lower right")


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    for name in dict.fromkeys(row.provider for row in rows):
        line = sorted((row for row in rows if row.provider == name), key=lambda row: row.S)
        s, colour = [row.S for row in line], _colour(line[0])
        axes.plot(s, [row.median_us for row in line], marker="o", ms=3, color=colour, label=f"{name} ({line[0].stage})")
        axes.fill_between(s, [row.p10_us for row in line], [row.p90_us for row in line], color=colour, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("cached tokens (S)")
    axes.set_ylabel("us; band p10 to p90")
    axes.legend(fontsize=7)


def _colour(row: Row) -> str:
    return COLOURS.get(row.provider.partition("[")[0], "#8d99ae")


def _best_dense(rows: Sequence[Row]) -> float | None:
    return min((row.median_us for row in rows if row.provider.startswith("sdpa_")), default=None)


def _provenance(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row.date)
    commits = ", ".join(dict.fromkeys(row.commit[:9] + ("+changes" if row.dirty else "") for row in rows))
    fewest = min(row.runs for row in rows)
    return (
        f"{newest.gpu}, driver {newest.driver}, torch {newest.torch}, triton {newest.triton}; commit {commits}; "
        f"{newest.date[:10]}; medians of at least {fewest} runs"
    )
