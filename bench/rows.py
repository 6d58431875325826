"""One schema for every measured figure. A row says what was timed, where, on which commit, and how sure it is."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin, get_type_hints

import torch

from flex_tls import jsonl
from flex_tls.device import driver_version

ROOT = Path(__file__).resolve().parent.parent


R = TypeVar("R", bound="Measured")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What every row says: which bench, which case, who was measured, where and on which commit."""

    bench: str
    case: str
    B: int
    provider: str
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: bool
    date: str

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            plain = get_origin(kind) if get_origin(kind) in (dict, list) else kind
            fits = type(value) is int if plain is int else isinstance(value, plain)
            if not fits:
                raise TypeError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")

    @classmethod
    def from_dict(cls: type[R], found: dict[str, Any]) -> R:
        """The row of these fields; raises ValueError for unknown ones, and for missing ones that have no default."""
        fields = dataclasses.fields(cls)
        names = {field.name for field in fields}
        by_default = {f.name for f in fields if (f.default, f.default_factory) != (dataclasses.MISSING,) * 2}
        missing, unknown = sorted(names - by_default - found.keys()), sorted(found.keys() - names)
        if missing or unknown:
            raise ValueError(f"missing {missing}, unknown {unknown}")
        return cls(**found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed(Measured):
    """Microseconds of one kernel or operator, and its error."""

    dtype: str
    median_us: float
    p10_us: float
    p90_us: float
    # Samples behind the three figures; one sample is one replay of a graph, see timing.py
    runs: int
    # ||out - ref|| / ||ref||, ref in float64 over the same tokens; the worst of the input sets
    rel_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseRow(Timed):
    """A time in one case. B, HQ, HKV, D, S as in docs/design.md; budgets in tokens per KV head."""

    HQ: int
    HKV: int
    D: int
    S: int
    block_size: int
    block_budget: int
    token_budget: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(CaseRow):
    """One provider's time."""

    # "attention": the selection is given; "total": it is part of what is timed; "level 2 and attention": level 1's is
    # given. Of the index: "build", "fit", "append", "audit"
    stage: str
    # "rotated": no call is served from cache; "repeated": every call has the same inputs, in L2 where they fit
    inputs: str
    # Fewest bytes that the task must read, over the read bandwidth measured in the same run
    floor_us: float
    # As rel_error, of torch's flash attention over the same tokens, gathered; where the provider chooses them
    rel_error_dense: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductRow(Timed):
    """One matrix product of a step of model ``case``: B rows of inputs, ``K`` long, with weights [N, K]."""

    product: str
    N: int
    K: int
    # Bytes of the weights over the read bandwidth measured in the same run
    floor_us: float


def blocks_of(provider: str, block_size: int | None) -> int | None:
    """``block_size`` where a step of ``provider`` selects blocks, else None."""
    return None if provider.startswith(("dense", "transformers")) else block_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRow(Measured):
    """One provider's time for a whole model: a decode step (bench "decode") or a prompt (bench "prefill").

    ``case`` is the model, ``context`` the tokens that are cached, or read.
    """

    n_layers: int
    context: int
    # Tokens that our cache was made for, and its budgets per KV head
    max_len: int
    block_budget: int
    token_budget: int | None
    dense_layers: int
    dtype: str
    ms_median: float
    ms_p10: float
    ms_p90: float
    ms_p99: float
    runs: int
    # Decoded or read, all rows together
    tokens_per_second: float
    # Bytes of the weights that one token reads, over the read bandwidth measured in the same run; None in older rows
    weights_floor_ms: float | None
    # Until the provider could be timed: compilation and capture
    build_seconds: float
    # Of the process, while this case's providers were built and timed together
    peak_bytes: int
    # None in older rows: 32, and 64 up to 4b3bc33
    block_size: int | None = None
    # Of an offloaded step, which selects by a trace as local as real text ("made", trace.py) and not by its random
    # weights: the trace's blocks that the last 1, 4 and 16 steps had too, the selected ones that were on the device,
    # bytes that one step fetched. None and empty of other steps, and in older rows
    trace: str | None = None
    overlap_1_4_16: list[float] = dataclasses.field(default_factory=list)
    hit_rate: float | None = None
    fetched_bytes: float | None = None

    @property
    def blocks_of(self) -> int | None:
        """Tokens a block where the provider selects any; None of dense ones, and in older rows."""
        return blocks_of(self.provider, self.block_size)

    @property
    def key(self) -> tuple[object, ...]:
        """Two rows of one key measured the same thing on the same commit."""
        return (
            self.gpu, self.commit, self.bench, self.case, self.n_layers, self.B, self.context, self.blocks_of,
            self.block_budget, self.token_budget, self.provider,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstTokenRow(Measured):
    """Seconds from calling ``tls.generate`` to a token. ``provider``: "cold" or "warm" caches of compiled code."""

    n_layers: int
    context: int
    block_budget: int
    token_budget: int | None
    dtype: str
    # To the token after the prompt, which no compiled step brings
    prompt_seconds: float
    # To the first token of the compiled step
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRow(Measured):
    """Where the time of one decode step goes, by the profiler."""

    n_layers: int
    context: int
    # Microseconds and kernels of each stage in one step, means over several
    stage_us: dict[str, float]
    stage_kernels: dict[str, float]
    # The kernels of one layer in the middle: stage, start and duration in microseconds
    layer: list[list[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneRow(CaseRow):
    """One setting of the fused kernel in one comparison. ``provider``: "rule", or where the setting differs from it."""

    # What was compared, "table", a coordinate or "confirm": a case's settings of one step were replayed in turn
    step: str
    tiles: dict[str, int]


class Machine(NamedTuple):
    """The fields of a row that are the same in a whole run."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: bool
    date: str


def append(path: Path, rows: Iterable[Measured]) -> None:
    """Add rows to a JSONL file; makes its folder."""
    jsonl.append(path, rows)


def read(path: Path, kind: type[R] = Row) -> list[R]:  # type: ignore[assignment]
    """Every row of a JSONL file, in order, none if there is no file; a bad line is named in the error."""
    return jsonl.read(path, kind.from_dict, f"expected the fields of bench.rows.{kind.__name__}")


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each (gpu, case, provider, stage, inputs), in the order of first appearance."""
    newest: dict[tuple[str, str, str, str, str], Row] = {}
    for row in rows:
        newest[row.gpu, row.case, row.provider, row.stage, row.inputs] = row
    return list(newest.values())


def most_sampled(rows: Iterable[Row]) -> list[Row]:
    """One row of each (gpu, commit, case, provider, stage, inputs): of several processes', the one of most samples."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.gpu, row.commit, row.case, row.provider, row.stage, row.inputs)
        found[key] = max(found.get(key, row), row, key=lambda row: row.runs)
    return list(found.values())


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


def _git_state() -> tuple[str, bool]:
    try:
        commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
        # The rows themselves may be uncommitted: they change nothing that is timed
        changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"commit: git does not say ({error}); pass --commit HASH, and --dirty if it is") from error
    return commit, bool(changed)


def _driver() -> str:
    # A container may lack the tool; the run is still worth its row
    return driver_version() or "unknown"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
