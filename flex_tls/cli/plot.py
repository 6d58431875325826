"""A comparison as a picture: kept mass of every layer, and which blocks each step selected."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

from ..record import Record


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
    figure.savefig(path, dpi=130)
    plt.close(figure)
