"""Timing that does not flatter: CUDA graphs over rotated inputs, providers in turn, ceilings from the same run.

One recording is a graph that calls a provider once for each input set, up to four times over. What is read of all
sets together is far larger than the L2 cache, so that no call finds its input there. One sample is one replay,
divided by its calls; providers take turns, so that a change of the clock or a neighbour's load meets all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 3
# Calls in one graph share a replay's own latency, some microseconds. Few input sets are large ones, and four passes do
CALLS = 32
MAX_PASSES = 4


class Recording(NamedTuple):
    """Something to replay. ``outputs`` hold one tensor for each input set, rewritten by every replay."""

    replay: Callable[[], None]
    outputs: list[Tensor]
    n_calls: int


class Spread(NamedTuple):
    """Microseconds of one call over ``runs`` samples."""

    median_us: float
    p10_us: float
    p90_us: float
    runs: int


def n_passes(n_sets: int, repeat_inputs: bool) -> int:
    """How many times a graph calls a provider for each input set."""
    passes = -(-CALLS // n_sets)
    return passes if repeat_inputs else min(MAX_PASSES, passes)


def record(calls: Sequence[Callable[[], Tensor]], device: torch.device, passes: int) -> Recording:
    """Warm up, then capture ``passes`` times ``calls`` in a CUDA graph; on CPU there is nothing to capture."""
    if device.type != "cuda":
        outputs = [call() for call in calls]

        def again() -> None:
            outputs[:] = [call() for call in calls]

        return Recording(again, outputs, len(calls))
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            outputs = [call() for call in calls]
    return Recording(graph.replay, outputs, passes * len(calls))


def interleave(recordings: Mapping[str, Recording], device: torch.device, runs: int) -> dict[str, Spread]:
    """Replay all recordings in turn, ``runs`` times each."""
    taken = samples({name: recording.replay for name, recording in recordings.items()}, device, runs)
    return {name: spread([us / recordings[name].n_calls for us in each]) for name, each in taken.items()}


def samples(calls: Mapping[str, Callable[[], object]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Microseconds of each call, warmed up and then made in turn, ``runs`` times each."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    return (_samples_cuda if device.type == "cuda" else _samples_cpu)(calls, runs)


def spread(samples_us: Sequence[float]) -> Spread:
    """Median, first and last decile of at least two samples."""
    deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
    return Spread(statistics.median(samples_us), deciles[0], deciles[-1], len(samples_us))


def read_bytes_per_us(device: torch.device) -> float:
    """The read bandwidth to compare with: the better of a large copy (read plus written bytes) and a large sum."""
    size_bytes = 2**31 if device.type == "cuda" else 2**27
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: target.copy_(source), 2 * size_bytes),
        "sum": (lambda: source.sum(), size_bytes),
    }
    best = 0.0
    for call, moved_bytes in ways.values():
        best = max(best, moved_bytes / statistics.median(samples({"": call}, device, 20)[""]))
    return best


def _samples_cuda(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    # The host runs ahead: no sample waits for it
    for _ in range(runs):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e3 for start, end in pairs] for name, pairs in events.items()}


def _samples_cpu(calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e6)
    return taken
