"""Pictures: what one decoding kept, and how far methods are from dense attention at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from ..evaluate.summary import PplSummary
from ..record import Record
from .figures import save


def plot_record(record: Record, path: Path, title: str) -> None:
    """Draw ``record`` into ``path`` (PNG, SVG or PDF by its ending)."""
    layers = record.layers
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    figure, axes = plt.subplots(1 + len(shown), 1, figsize=(10, 3 + 2.2 * len(shown)), layout="constrained")
    figure.suptitle(title)
    masses = [record.kept_mass[layer].flatten().numpy() for layer in layers]
    axes[0].boxplot(masses, positions=list(layers), widths=0.6, showfliers=False)
    axes[0].set(xlabel="layer", ylabel="kept attention mass", ylim=(None, 1.0))
    axes[0].set_title("share of full attention's mass that lies on the selected tokens (box: quartiles over steps)")
    for axis, layer in zip(axes[1:], shown, strict=True):
        blocks = record.block_map(layer).numpy()
        image = axis.imshow(
            blocks, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest", origin="lower"
        )
        axis.set(ylabel="decode step")
        axis.set_title(f"layer {layer}: share of KV heads that selected a block")
    axes[-1].set_xlabel(f"block of {record.block_size} tokens")
    figure.colorbar(image, ax=list(axes[1:]), label="share of KV heads")
    save(figure, path)


def plot_accuracy(lines: Sequence[PplSummary], path: Path) -> None:
    """KL over kept tokens for every method, a panel for each model and context; bars are 95% intervals."""
    panels = list(dict.fromkeys((line.model, line.span) for line in lines))
    names = list(dict.fromkeys(line.method for line in lines))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [line for line in lines if (line.model, line.span) == panel]
        for i, name in enumerate(names):
            curve = sorted((x for x in shown if x.method == name), key=lambda x: (x.kept_tokens, -x.kl.mean))
            kl = [x.kl.mean for x in curve]
            # A resample's percentiles need not lie on both sides of the mean
            below = [max(0.0, x.kl.mean - x.kl.low) for x in curve]
            above = [max(0.0, x.kl.high - x.kl.mean) for x in curve]
            # Side by side within half an octave: equal budgets would draw every bar on one line
            aside = 2 ** (0.5 * (i / max(len(names) - 1, 1) - 0.5))
            kept = [aside * x.kept_tokens for x in curve]
            axis.errorbar(
                kept, kl, yerr=[below, above], marker="osD^v"[i // 10 % 5], ms=4, capsize=2, lw=1, color=f"C{i % 10}",
                label=name,
            )  # fmt: skip
        n_documents = sorted({line.n_documents for line in shown})
        axis.set_title(f"{Path(panel[0]).name}, {panel[1][0]:,} tokens; {', '.join(map(str, n_documents))} documents")
        axis.set(yscale="log", xlabel="tokens attended to, per KV head (methods side by side)")
        ticks = sorted({x.kept_tokens for x in shown})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axis.minorticks_off()
    axes[0][0].set_ylabel("KL(dense || method) per token; bars 95% intervals")
    axes[0][-1].legend(fontsize=8)
    save(figure, path)
