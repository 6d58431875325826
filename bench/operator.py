"""The operator bench: one decoded token's attention, by every provider, case by case."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flex_tls import TokenSelection
from flex_tls.reference import attention_reference

from .cases import Case, InputSet, make_inputs
from .providers import PROVIDERS, Job, Provider
from .rows import Machine, Row
from .timing import Recording, interleave, record

# Microseconds on one H100 80GB; docs/design.md, section 4
TARGETS_US = {
    (case, name): us
    for case, us in {"qwen3-8b-b1-96k": 16.0, "qwen3-8b-b16-96k": 210.0}.items()
    for name in ("flex_given_selection", "flex_given_tokens")
}


def variants(providers: Iterable[Provider], splits: Sequence[int]) -> list[tuple[str, Provider, int | None]]:
    """Every provider with the options that the package chooses, and those that can with each number of splits."""
    found: list[tuple[str, Provider, int | None]] = []
    for provider in providers:
        found.append((provider.name, provider, None))
        if provider.splits:
            found += [(f"{provider.name}[split_kv={n}]", provider, n) for n in splits]
    return found


def run_case(
    case: Case,
    device: torch.device,
    machine: Machine,
    *,
    providers: Sequence[str],
    splits: Sequence[int],
    runs: int,
    bytes_per_us: float,
) -> tuple[list[Row], list[str]]:
    """Measure one case. Returns its rows and the names of the providers that failed, their traces printed."""
    sets = make_inputs(case, device)
    chosen = [p for name in providers if not ((p := PROVIDERS[name]).cuda_only and device.type != "cuda")]
    jobs: dict[str, tuple[Provider, Job]] = {}
    recordings: dict[str, Recording] = {}
    failed = []
    for name, provider, split_kv in variants(chosen, splits):
        print(f"  {case.name}: preparing {name}", flush=True)
        try:
            job = provider.make(case, sets, split_kv)
            recordings[name] = record(job.calls, device)
            jobs[name] = provider, job
        except Exception:  # noqa: BLE001 - one provider that cannot run must not cost the others their figures
            traceback.print_exc()
            failed.append(name)
        _release(device)
    rows = []
    for name, spread in interleave(recordings, device, runs).items():
        provider, job = jobs[name]
        error = _checked_error(recordings[name], sets, job.masks)
        if not math.isfinite(error):
            print(f"  {case.name}: {name} left output unwritten, or wrote NaN")
            failed.append(name)
            continue
        row = Row(
            bench="operator",
            case=case.name,
            B=case.B,
            HQ=case.HQ,
            HKV=case.HKV,
            D=case.D,
            S=case.S,
            block_size=case.block_size,
            block_budget=case.block_budget,
            token_budget=case.token_budget,
            dtype=str(case.dtype).removeprefix("torch."),
            provider=name,
            stage=provider.stage,
            floor_us=job.must_read_bytes / bytes_per_us,
            rel_error=error,
            **spread._asdict(),
            **machine._asdict(),
        )
        rows.append(row)
    return rows, failed


def relative_error(out: Tensor, inputs: InputSet, mask: Tensor | None) -> float:
    """||out - ref|| / ||ref|| with ref in float64 over the tokens of ``mask`` bool [B, HKV, S], row by row.

    ``out`` is [B, HQ, 1, D] or folded, [B, HKV, G, D].
    """
    b, hq, _, d = inputs.q.shape
    hkv = inputs.k.shape[1]
    wrong, size = 0.0, 0.0
    for row in range(b):
        q, k, v = (x[row : row + 1].double() for x in (inputs.q, inputs.k, inputs.v))
        seen = torch.ones_like(k[..., 0], dtype=torch.bool) if mask is None else mask[row : row + 1, :, : k.shape[2]]
        tokens = TokenSelection.from_mask(seen[:, :, None], inputs.tokens.positions[row : row + 1], hq // hkv)
        ref, _ = attention_reference(q, k, v, tokens, scale=1 / math.sqrt(d))
        wrong += float((out[row].double().reshape(ref[0].shape) - ref[0]).square().sum())
        size += float(ref.square().sum())
    return math.sqrt(wrong / size)


def _checked_error(recording: Recording, sets: Sequence[InputSet], masks: Sequence[Tensor | None]) -> float:
    """Worst error of the input sets after one more replay over poisoned outputs: NaN if anything was not written."""
    for out in recording.outputs:
        out.fill_(math.nan)
    recording.replay()
    errors = [relative_error(*given) for given in zip(recording.outputs, sets, masks, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
