"""Pictures into files: the same picture is the same file."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_UNTIMED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` (PNG, SVG or PDF by its ending), whose folder is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # By default an SVG has other names in it every time
    with mpl.rc_context({"svg.hashsalt": "flex_tls"}):
        figure.savefig(path, dpi=150, metadata=_UNTIMED.get(path.suffix))
    plt.close(figure)
