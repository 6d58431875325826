"""Markdown from figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, the first row its head."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def link(path: Path, base: Path) -> str:
    """``path`` as a page in folder ``base`` links to it."""
    return Path(os.path.relpath(path, base)).as_posix()
