"""Tuning: which settings of the fused kernel are fastest for a shape, and the table that the package looks them up in.

Coordinate by coordinate, from the rule's setting: each coordinate's values are timed in turn with the best so far and
with the rule, inputs rotated, in CUDA graphs. What wins in the end meets the rule once more, alone. A search over all
combinations would compile for hours.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flex_tls.device import why_not_here
from flex_tls.kernels.tile_table import TABLE, Entry, forced, read_table, why_invalid
from flex_tls.kernels.tiles import Tiles, n_processors, padded, rule

from . import rows
from .cases import Case
from .inputs import InputSet, make_inputs
from .operator import checked_error, release, why_not
from .providers import PROVIDERS
from .providers.registry import Call
from .timing import Recording, Spread, interleave, n_passes, record

# In the order of the search; of programs, half and double
COORDINATES: dict[str, tuple[int, ...]] = {
    "programs": (),
    "warps": (4, 8),
    "score_words": (4096, 8192, 16384),
    "score_stages": (2, 3, 4),
    "rank_words": (2048, 4096, 8192),
    "attend_tile": (32, 64, 128),
    "attend_stages": (2, 3),
    "choose": (8192, 16384),
}
# Shares of the time: what a step must win to be taken, and all of them to be written
WORTH_A_STEP, WORTH_AN_ENTRY = 0.005, 0.02
# Of the rule's tokens, and of the output's size: ties that other roundings break, and bfloat16
MOST_FLIPPED, MOST_ERROR = 0.01, 0.02
# Interpreted programs run one by one, and a dry run wants few
DRY_PROCESSORS = 2


class Trial(NamedTuple):
    """A setting, recorded. ``masks`` bool [B, HKV, S], of each input set: what it attends to."""

    tiles: Tiles
    recording: Recording
    masks: list[Tensor | None]
    rel_error: float


class Outcome(NamedTuple):
    """What beat the rule, if anything did, and whether every coordinate was tried."""

    tiles: Tiles | None
    finished: bool


class Clock:
    """Time until ``seconds`` from now, in which another trial is thought to take as long as the longest did."""

    def __init__(self, seconds: float | None) -> None:
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.longest_s = 0.0

    def has_time(self, trials: int = 1) -> bool:
        """Whether so many would likely end in time."""
        return time.monotonic() + trials * self.longest_s < self.end

    def took(self, start: float) -> float:
        """Seconds since ``start``, of one trial."""
        took_s = time.monotonic() - start
        self.longest_s = max(self.longest_s, took_s)
        return took_s


def tune(
    cases: Sequence[Case], device: torch.device, machine: rows.Machine, *, coordinates: Sequence[str], runs: int,
    clock: Clock, table: Path, out: Path,
) -> int:  # fmt: skip
    """Tune case by case; rows go to ``out``, what won to ``table``, which begins as the package's. Returns a status."""
    if reason := why_not_here(device):
        raise ValueError(f"device: {reason}; a dry run on a CPU needs TRITON_INTERPRET=1")
    processors = n_processors(device) if device.type == "cuda" else DRY_PROCESSORS
    entries = {entry[:-1]: entry for entry in read_table(table if table.exists() else TABLE)}
    failed = 0
    for case in cases:
        # A case's start, and a trial or two
        if not clock.has_time(3):
            print(f"stopping in time; left: {' '.join(each.name for each in cases[cases.index(case) :])}")
            break
        if reason := why_not(case, device, case.n_sets(device)):
            print(f"skipping {case.name}: {reason}", flush=True)
            continue
        head_bytes = case.D * case.dtype.itemsize
        shape = (machine.gpu, processors, head_bytes, case.group, padded(case.block_budget), case.rows)
        present = entries[shape].tiles if shape in entries else None
        default = rule(processors, head_bytes=head_bytes, rows=case.rows)
        print(f"{case.name}: the rule's is {default}", flush=True)
        try:
            outcome = tune_case(
                case, device, machine, default, present, processors=processors, coordinates=coordinates, runs=runs,
                clock=clock, out=out,
            )  # fmt: skip
        except Exception:  # noqa: BLE001 - a case that cannot run must not cost the others their figures
            traceback.print_exc()
            failed += 1
            continue
        if outcome.tiles:
            entries[shape] = Entry(*shape, outcome.tiles)
        elif outcome.finished:
            entries.pop(shape, None)
        write_table(table, entries.values())
    print(f"{len(entries)} entries in {table}, rows appended to {out}")
    return 1 if failed else 0


def tune_case(
    case: Case, device: torch.device, machine: rows.Machine, default: Tiles, present: Tiles | None, *, processors: int,
    coordinates: Sequence[str], runs: int, clock: Clock, out: Path,
) -> Outcome:  # fmt: skip
    """Search from ``default``, and from ``present``, the table's, where that is faster; rows of each comparison."""
    start = time.monotonic()
    sets = make_inputs(case, device, case.n_sets(device))
    base = best = prepare(case, sets, device, default, None)
    print(f"  rule: ready in {clock.took(start):.1f} s", flush=True)
    finished = True

    def compare(step: str, trials: dict[str, Trial]) -> dict[str, Spread]:
        spreads = interleave({name: trial.recording for name, trial in trials.items()}, device, runs)
        rows.append(out, [_row(case, machine, step, name, trials[name], spread) for name, spread in spreads.items()])
        medians = ", ".join(f"{name} {spread.median_us:.2f}" for name, spread in spreads.items())
        print(f"  {step}, us: {medians}", flush=True)
        return spreads

    for step in ("table", *coordinates):
        if step == "table":
            settings = [present] if present and present != default else []
        else:
            settings = variants(best.tiles, step, rows=case.rows, processors=processors)
        now = differs(best.tiles, default)
        trials = {"rule": base, now: best}
        for tiles in settings:
            if not clock.has_time():
                finished = False
                break
            name, start = differs(tiles, default), time.monotonic()
            try:
                trials[name] = prepare(case, sets, device, tiles, base)
            except Exception as error:  # noqa: BLE001 - a setting that cannot run is one of the answers
                print(f"  {name}: skipped, {type(error).__name__}: {error}", flush=True)
            else:
                print(f"  {name}: ready in {clock.took(start):.1f} s", flush=True)
            release(device)
        if len(trials) > len({"rule", now}):
            spreads = compare(step, trials)
            fastest = min(spreads, key=lambda name: spreads[name].median_us)
            if spreads[fastest].median_us <= (1 - WORTH_A_STEP) * spreads[now].median_us:
                best = trials[fastest]
        if not finished:
            print(f"  cut short at {step}: no time for another setting", flush=True)
            break
    name = differs(best.tiles, default)
    if best is base:
        print("  the rule stays", flush=True)
        return Outcome(None, finished)
    spreads = compare("confirm", {"rule": base, name: best})
    won = 1 - spreads[name].median_us / spreads["rule"].median_us
    print(f"  {name}: {won:.1%} less than the rule{', too little' * (won < WORTH_AN_ENTRY)}", flush=True)
    return Outcome(best.tiles if won >= WORTH_AN_ENTRY else None, finished)


def variants(tiles: Tiles, coordinate: str, *, rows: int, processors: int) -> list[Tiles]:
    """``tiles`` with other values of one coordinate, those that can be launched."""
    values = COORDINATES[coordinate] or (tiles.programs // 2, tiles.programs * 2)
    found = [tiles._replace(**{coordinate: value}) for value in values]
    return [each for each in found if each != tiles and why_invalid(each, rows=rows, processors=processors) is None]


def differs(tiles: Tiles, default: Tiles) -> str:
    """Where ``tiles`` differ from the rule's, or "rule"."""
    pairs = zip(Tiles._fields, tiles, default, strict=True)
    return ",".join(f"{name}={value}" for name, value, other in pairs if value != other) or "rule"


def prepare(case: Case, sets: list[InputSet], device: torch.device, tiles: Tiles, base: Trial | None) -> Trial:
    """Compile and record one setting.

    Raises:
        ValueError: its output is not its selection's, or it selects other tokens than ``base``.
    """
    with forced(tiles):
        job = PROVIDERS["triton_total"].make(case, sets, None)
    # On a CPU nothing is captured: every call must be made under its own setting
    calls = [partial(_under, tiles, call) for call in job.calls]
    recording = record(calls, device, n_passes(len(sets), repeat_inputs=False))
    error = checked_error(recording, sets, job.masks)
    if not error <= MOST_ERROR:
        raise ValueError(f"an error of {error:.3g} against float64")
    if base is not None and (share := flipped(job.masks, base.masks)) > MOST_FLIPPED:
        raise ValueError(f"{share:.1%} of the rule's tokens are others")
    return Trial(tiles, recording, job.masks, error)


def flipped(masks: Iterable[Tensor | None], of: Iterable[Tensor | None]) -> float:
    """The largest share of a selection that is not in the other one."""
    pairs = [(a, b) for a, b in zip(masks, of, strict=True) if a is not None and b is not None]
    return max(float((b & ~a).sum() / b.sum()) for a, b in pairs)


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """An entry a line, sorted, so that a difference is what changed."""
    lines = [json.dumps({**entry._asdict(), "tiles": entry.tiles._asdict()}) for entry in sorted(entries)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[" + ",".join(f"\n  {line}" for line in lines) + "\n" * bool(lines) + "]\n", encoding="utf-8")


def _under(tiles: Tiles, call: Call) -> Tensor:
    with forced(tiles):
        return call()


def _row(case: Case, machine: rows.Machine, step: str, name: str, trial: Trial, spread: Spread) -> rows.TuneRow:
    return rows.TuneRow(
        bench="tune",
        **case.fields,
        provider=name,
        step=step,
        tiles=trial.tiles._asdict(),
        rel_error=trial.rel_error,
        **spread._asdict(),
        **machine._asdict(),
    )
