"""One schema for every measured figure. A row says what was timed, where, on which commit, and how sure it is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One provider's time in one case. B, HQ, HKV, D, S as in docs/design.md; budgets in tokens per KV head."""

    bench: str
    case: str
    B: int
    HQ: int
    HKV: int
    D: int
    S: int
    block_size: int
    block_budget: int
    token_budget: int | None
    dtype: str
    provider: str
    # "attention": the selection is given; "total": it is part of what is timed
    stage: str
    median_us: float
    p10_us: float
    p90_us: float
    # "rotated": no call is served from cache; "repeated": every call has the same inputs, in L2 where they fit
    inputs: str
    # Samples behind the three figures; one sample is one replay of a graph, see timing.py
    runs: int
    # Fewest bytes that the task must read, over the read bandwidth measured in the same run
    floor_us: float
    # ||out - ref|| / ||ref||, ref in float64 over the same tokens; the worst of the input sets
    rel_error: float
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: bool
    date: str

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Row).items():
            value = getattr(self, name)
            fits = type(value) is int if kind is int else isinstance(value, kind)
            if not fits:
                raise TypeError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of one JSON line; raises ValueError for fields that are missing or unknown."""
        found: dict[str, Any] = json.loads(line)
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - found.keys()), sorted(found.keys() - names)
        if missing or unknown:
            raise ValueError(f"row: expected the fields of bench.rows.Row, missing {missing}, unknown {unknown}")
        return cls(**found)

    def to_json(self) -> str:
        """The row as one JSON line, without the line's end."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


class Machine(NamedTuple):
    """The fields of a row that are the same in a whole run."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: bool
    date: str


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a JSONL file; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Every row of a JSONL file, in order; a bad line is named in the error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (gpu, case, provider, stage, inputs), in the order of first appearance."""
    newest: dict[tuple[str, str, str, str, str], Row] = {}
    for row in rows:
        newest[row.gpu, row.case, row.provider, row.stage, row.inputs] = row
    return list(newest.values())


def machine(device: torch.device, commit: str | None = None, dirty: bool = False) -> Machine:
    """Where and on what a run happens. ``commit`` and ``dirty`` are asked of git unless ``commit`` is given."""
    if commit is None:
        commit, dirty = _git_state()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    on_cuda = device.type == "cuda"
    return Machine(
        gpu=torch.cuda.get_device_name(device) if on_cuda else "cpu",
        driver=_driver() if on_cuda else platform.machine(),
        torch=torch.__version__,
        triton=triton,
        commit=commit,
        dirty=dirty,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _parsed(line: str, place: str) -> Row:
    try:
        return Row.from_json(line)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def _git_state() -> tuple[str, bool]:
    try:
        commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
        # The rows themselves may be uncommitted: they change nothing that is timed
        changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"commit: git does not say ({error}); pass --commit HASH, and --dirty if it is") from error
    return commit, bool(changed)


def _driver() -> str:
    try:
        return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        # A container may lack the tool; the run is still worth its row
        return "unknown"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
