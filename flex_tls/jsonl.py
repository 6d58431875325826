"""Dataclasses and dicts as lines of JSON in a file that only grows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def append(path: Path, rows: Iterable[Any]) -> None:
    """Add dataclasses or dicts to a file; makes its folder. What an interrupted write left behind is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        found = (row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows)
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in found)
        file.write(lines.encode())


def read(path: Path, parse: Callable[[dict[str, Any]], T], expected: str) -> list[T]:
    """Every whole line of a file, through ``parse``, in order; none if there is no file.

    Raises:
        ValueError: a line that ``parse`` refuses; names it, and says what was ``expected``.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_parsed(line, parse, f"{path}:{number}: {expected}") for number, line in enumerate(lines, start=1)]


def _parsed(line: str, parse: Callable[[dict[str, Any]], T], place: str) -> T:
    try:
        return parse(json.loads(line))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} ({error})") from error
