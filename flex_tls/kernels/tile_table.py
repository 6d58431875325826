"""Tile settings that were measured, by GPU and shape: looked up, never searched for, when a kernel is launched.

``tiles.json`` is a list of :class:`Entry`, written by ``python -m bench tune operator``. Where it has none,
:func:`.rule` decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .tiles import INTERPRETED, MOST_PROGRAMS, Tiles, n_processors, padded, rule

TABLE = Path(__file__).with_name("tiles.json")

# Of one chunk: keep_best.py counts fewer than 2**15
MOST_CHOSEN_FROM = 2**14
_POWERS_OF_TWO = ("warps", "score_words", "rank_words", "attend_tile", "choose")
_forced: Tiles | None = None


class Entry(NamedTuple):
    """The fastest settings of one shape on one GPU.

    Attributes:
        gpu, processors: its name and its streaming multiprocessors.
        head_bytes: of one key.
        group: G, query heads of a KV head.
        kept_tokens: of the kept blocks, among which level 2 chooses; rounded up to a power of two, as the kernel does.
        rows: selections, B * HKV * T.
        tiles: the settings.
    """

    gpu: str
    processors: int
    head_bytes: int
    group: int
    kept_tokens: int
    rows: int
    tiles: Tiles


def why_invalid(tiles: Tiles, *, rows: int, processors: int) -> str | None:
    """What keeps ``tiles`` from being launched for ``rows`` on a GPU of so many processors; None if nothing does."""
    for name, value in tiles._asdict().items():
        if type(value) is not int or value < 1:
            return f"{name}: expected a positive integer, got {value!r}"
        if name in _POWERS_OF_TWO and value != padded(value):
            return f"{name}: expected a power of two, got {value}"
    if tiles.attend_tile < 16:
        return f"attend_tile: expected at least 16, the least of a matrix product, got {tiles.attend_tile}"
    if not 256 * tiles.warps <= tiles.choose <= MOST_CHOSEN_FROM:
        least = 256 * tiles.warps
        return f"choose: expected {least}, 8 a thread of {tiles.warps} warps, to {MOST_CHOSEN_FROM}, got {tiles.choose}"
    if tiles.programs > 1 and tiles.programs * rows > processors:
        return (
            f"programs: {tiles.programs} for each of {rows} rows wait for one another, and only {processors} run at "
            f"once, one a processor; expected at most {max(1, processors // rows)}"
        )
    return None


def read_table(path: Path) -> list[Entry]:
    """Every entry of a table, in order.

    Raises:
        ValueError: an entry with other fields, settings that cannot be launched, or two for one shape.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of entries, got {type(found).__name__}")
    entries: dict[tuple[object, ...], Entry] = {}
    for number, given in enumerate(found, start=1):
        try:
            entry = _entry(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: entry {number}: {error}; write it by python -m bench tune operator") from error
        if entry[:-1] in entries:
            raise ValueError(f"{path}: entry {number}: expected one a shape, got a second of {entry[:-1]}")
        entries[entry[:-1]] = entry
    return list(entries.values())


def find(
    entries: Iterable[Entry], *, gpu: str, processors: int, head_bytes: int, group: int, rows: int, kept_tokens: int
) -> Tiles | None:
    """The settings measured for this GPU, head, group and kept tokens; None if none were.

    Between the fewest and the most rows that were measured, all rounded up to powers of two, those of the nearest
    (ties: more rows) serve; programs are then as many in all as measured, within the rule's limits.
    """
    asked = (gpu, processors, head_bytes, group, padded(kept_tokens))
    near = {entry.rows: entry for entry in entries if entry[:5] == asked}
    if rows in near:
        return near[rows].tiles
    if not near or not padded(min(near)) <= padded(rows) <= padded(max(near)):
        return None
    entry = min(near.values(), key=lambda e: (abs(_doublings(e.rows) - _doublings(rows)), -e.rows))
    programs = min(entry.tiles.programs * entry.rows, processors) // rows
    return entry.tiles._replace(programs=max(1, min(MOST_PROGRAMS, programs)))


def tiles_for(device: torch.device, *, head_bytes: int, group: int, rows: int, kept_tokens: int) -> Tiles:
    """Settings of :mod:`.two_level`: measured, or by the rule. Arguments as in :class:`Entry`."""
    if _forced is not None:
        return _forced
    if device.type != "cuda":
        return INTERPRETED
    # Integers: a traced size has no hash
    return _tiles_on(device, int(head_bytes), int(group), int(rows), int(kept_tokens))


@contextmanager
def forced(tiles: Tiles) -> Iterator[None]:
    """Launch with ``tiles``, whatever the shape: for benches and tests."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


@cache
def _tiles_on(device: torch.device, head_bytes: int, group: int, rows: int, kept_tokens: int) -> Tiles:
    gpu, processors = torch.cuda.get_device_name(device), n_processors(device)
    measured = find(
        _shipped(), gpu=gpu, processors=processors, head_bytes=head_bytes, group=group, rows=rows,
        kept_tokens=kept_tokens,
    )  # fmt: skip
    return measured or rule(processors, head_bytes=head_bytes, rows=rows)


@cache
def _shipped() -> list[Entry]:
    return read_table(TABLE)


def _doublings(n: int) -> int:
    return padded(n).bit_length()


def _entry(given: Any) -> Entry:
    fields = _exactly(given, Entry._fields, "entry")
    entry = Entry(**{**fields, "tiles": Tiles(**_exactly(fields["tiles"], Tiles._fields, "tiles"))})
    if not isinstance(entry.gpu, str):
        raise TypeError(f"gpu: expected a name, got {entry.gpu!r}")
    for name, value in zip(Entry._fields[1:-1], entry[1:-1], strict=True):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if entry.kept_tokens != padded(entry.kept_tokens):
        raise ValueError(f"kept_tokens: expected a power of two, got {entry.kept_tokens}")
    if reason := why_invalid(entry.tiles, rows=entry.rows, processors=entry.processors):
        raise ValueError(reason)
    return entry


def _exactly(given: Any, names: Iterable[str], what: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise TypeError(f"{what}: expected an object, got {given!r}")
    missing, unknown = sorted(set(names) - given.keys()), sorted(given.keys() - set(names))
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing}, unknown {unknown}")
    return given
