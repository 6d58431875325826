"""Markdown from figures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from flex_tls.evaluate.bootstrap import Interval


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def link(path: Path, base: Path) -> str:
    """``path`` as a page in folder ``base`` links to it."""
    return Path(os.path.relpath(path, base)).as_posix()


def interval(x: Interval, digits: int) -> str:
    """A mean and the ends of its interval, where it has any."""
    mean = f"{x.mean:.{digits}f}"
    return mean if math.isnan(x.low) else f"{mean} ({x.low:.{digits}f}-{x.high:.{digits}f})"


def percent(x: Interval) -> str:
    """As :func:`interval`, of a share."""
    return f"{x.mean:.1%}" if math.isnan(x.low) else f"{x.mean:.1%} ({x.low:.1%} to {x.high:.1%})"


def gpu(name: str) -> str:
    """A device's name without its maker and memory."""
    return name.removeprefix("NVIDIA ").partition(" 80GB")[0]
