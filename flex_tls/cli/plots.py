"""Pictures of evaluations, from rows: ablation, frontier, what selections catch, and where needles lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FuncFormatter

from ..config import TLSConfig
from ..evaluate.bootstrap import Interval
from ..evaluate.methods import Method
from ..evaluate.rows import AttentionRow, Row
from ..evaluate.sets import BASE, ablation_of
from ..evaluate.summary import PplSummary, RetrievalSummary, kl_ratio, mean_over_documents, summarise_ppl
from .figures import save

# A component, the change, the changed line, and its KL as a multiple of the base's
Change = tuple[str, str, PplSummary, Interval]


def ablations(rows: Sequence[Row]) -> list[tuple[PplSummary, list[Change]]]:
    """Lines of "ours" that have lines with one component changed, with those.

    Of lines that differ in their blocks alone, one: that of the most changes.
    """
    lines = [line for line in summarise_ppl(rows) if line.config is not None]
    found: dict[tuple[object, ...], tuple[PplSummary, list[Change]]] = {}
    for base in lines:
        if not re.fullmatch(rf"{BASE}(:block_size=\d+)?", base.method):
            continue
        beside = {_method(x): x for x in lines if (x.model, x.span) == (base.model, base.span)}
        changes: list[Change] = [
            (component, change, beside[method], kl_ratio(rows, beside[method], base))
            for component, methods in ablation_of(_method(base), list(beside)).items()
            for change, method in methods.items()
        ]
        assert base.config is not None
        key = (base.model, base.span, base.config["block_budget"], base.config["token_budget"])
        if len(changes) > len(found[key][1] if key in found else ()):
            found[key] = base, changes
    return list(found.values())


def plot_ablation(base: PplSummary, changes: Sequence[Change], path: Path) -> None:
    """KL of each change as a multiple of the base's, with its interval; right of 1 is worse."""
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.24 * len(changes)), layout="constrained")
    components = list(dict.fromkeys(component for component, *_ in changes))
    for place, (component, _, _, ratio) in enumerate(changes):
        colour = f"C{components.index(component) % 10}"
        axis.plot([ratio.low, ratio.high], [place, place], color=colour, lw=1.5)
        axis.plot(ratio.mean, place, "o", ms=4, color=colour)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(changes)), [f"{component}: {change}" for component, change, *_ in changes], fontsize=7)
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="KL as a multiple of the unchanged configuration's; bars 95% intervals")
    assert base.config is not None
    axis.set_title(_budgets(base), fontsize=9)
    save(figure, path)


def plot_frontier(lines: Sequence[PplSummary], path: Path) -> None:
    """KL over bytes held and over bytes read, at equal budgets; the line joins what nothing beats in both."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    families = list(dict.fromkeys(family(line) for line in lines))
    for axis, field in zip(axes, ("index_share", "read_share"), strict=True):
        for i, name in enumerate(families):
            shown = [line for line in lines if family(line) == name]
            axis.scatter(
                [100 * getattr(x, field) for x in shown], [x.kl.mean for x in shown], s=22, color=f"C{i % 10}",
                marker="osD^vP*X<>"[i // 10 % 10], label=name,
            )  # fmt: skip
        best = pareto(lines, field)
        axis.plot([100 * getattr(x, field) for x in best], [x.kl.mean for x in best], color="black", lw=0.8, zorder=0)
        axis.set(xscale="log", yscale="log")
        for part in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            part(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel(f"bytes {'held to select' if field == 'index_share' else 'read by a step'}, % of the KV bytes")
    axes[0].set_ylabel("KL(dense ||) per token")
    axes[1].legend(fontsize=7)
    axes[0].set_title(_budgets(lines[0]), fontsize=9)
    save(figure, path)


def pareto(lines: Sequence[PplSummary], field: str) -> list[PplSummary]:
    """Lines that no other beats in ``field`` and KL, by ``field``."""
    best: list[PplSummary] = []
    for line in sorted(lines, key=lambda x: (getattr(x, field), x.kl.mean)):
        if not best or line.kl.mean < best[-1].kl.mean:
            best.append(line)
    return best


def family(line: PplSummary) -> str:
    """What a line of the frontier has in common with others but for the size of its labels."""
    name, *settings = line.method.split(":")
    return ":".join([name, *(x for x in settings if not x.startswith(("label_dims=", "label_bits=")))])


def plot_attention(rows: Sequence[AttentionRow], path: Path) -> None:
    """Heat maps over layers and query heads of one method's shares, mean over documents."""
    fields = {
        "heavy_blocks": "heavy tokens in kept blocks", "heavy_tokens": "heavy tokens kept",
        "mass_blocks": "mass in kept blocks", "mass_tokens": "mass on kept tokens",
    }  # fmt: skip
    figure, axes = plt.subplots(1, 5, figsize=(15, 5), layout="constrained", width_ratios=[1, 1, 1, 1, 0.6])
    layers = rows[0].layers
    for axis, (field, title) in zip(axes, fields.items(), strict=False):
        values = mean_over_documents([getattr(row, field) for row in rows])
        image = axis.imshow(values.numpy(), aspect="auto", vmin=0.5, vmax=1, cmap="viridis", interpolation="nearest")
        axis.set_title(f"{title}\nmean {float(values.mean()):.1%}", fontsize=9)
        axis.set_xlabel("query head")
        axis.set_yticks(range(0, len(layers), 4), [str(layer) for layer in layers[::4]])
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes[:4]), label="share", shrink=0.8)
    axes[4].plot(torch.tensor([row.locality for row in rows]).mean(0).numpy(), range(len(layers)), marker="o", ms=3)
    axes[4].set(ylim=(len(layers) - 0.5, -0.5), xlim=(0, 1), yticks=[], xlabel="share of blocks")
    axes[4].set_title("locality: selected\nby the token before too", fontsize=9)
    figure.suptitle(f"{rows[0].method}, {rows[0].context_tokens:,} tokens, {len(rows)} documents", fontsize=10)
    save(figure, path)


def plot_depths(lines: Sequence[RetrievalSummary], path: Path) -> None:
    """Scores over needle depth and context, a panel a method and share of the context kept; only lines with a depth."""
    lines = [line for line in lines if line.depth is not None]
    methods = list(dict.fromkeys(_kept_share(line) for line in lines))
    lengths, depths = (sorted({getattr(x, f) for x in lines}) for f in ("length_tokens", "depth"))
    figure, axes = plt.subplots(
        1, len(methods), figsize=(1.6 + 2.6 * len(methods), 3.4), squeeze=False, layout="constrained"
    )
    for axis, method in zip(axes[0], methods, strict=True):
        shown = [x for x in lines if _kept_share(x) == method]
        table = torch.full((len(depths), len(lengths)), torch.nan)
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                scores = [x.score.mean for x in shown if (x.depth, x.length_tokens) == (depth, length)]
                if scores:
                    table[i, j] = sum(scores) / len(scores)
        image = axis.imshow(table.numpy(), aspect="auto", vmin=0, vmax=1, cmap="RdYlGn", interpolation="nearest")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=7)
        axis.set_title(f"{method[0]}, 1/{method[1]} kept" if method[1] > 1 else method[0], fontsize=8)
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(axes[0]), label="score")
    save(figure, path)


def _kept_share(line: RetrievalSummary) -> tuple[str, int]:
    """A method and one over the share of the context that it keeps: budgets are shares of each length."""
    return line.method, round(line.length_tokens / line.kept_tokens)


def _method(line: PplSummary) -> Method:
    return Method(line.method, None if line.config is None else TLSConfig(**line.config))


def _budgets(line: PplSummary) -> str:
    assert line.config is not None
    blocks, tokens = line.config["block_budget"], line.config["token_budget"]
    kept = "all of their tokens" if tokens is None else f"{tokens:,} tokens"
    name = Path(line.model).name
    return f"{name}, {line.context_tokens:,} tokens; {blocks:,} in blocks, {kept}; {line.n_documents} documents"
