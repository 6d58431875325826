"""The operator bench: one decoded token's attention, by every provider, case by case."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .cases import Case
from .inputs import InputSet, make_inputs
from .providers import PROVIDERS, Job, Provider
from .rows import Machine, Row
from .timing import Recording, interleave, n_passes, record

# Microseconds on one H100 80GB, inputs rotated
TARGETS_US = {
    ("qwen3-8b-b1-96k", "triton_total"): 17.0,
    ("qwen3-8b-b16-96k", "triton_total"): 85.0,
    **{("qwen3-8b-b1-96k-block64", name): 16.0 for name in ("flex_given_selection", "flex_given_tokens")},
    **{("qwen3-8b-b16-96k-block64", name): 210.0 for name in ("flex_given_selection", "flex_given_tokens")},
}


def variants(providers: Iterable[Provider], splits: Sequence[int]) -> list[tuple[str, Provider, int | None]]:
    """Every provider with the options that the package chooses, and those that can with each number of splits."""
    found: list[tuple[str, Provider, int | None]] = []
    for provider in providers:
        found.append((provider.name, provider, None))
        if provider.splits:
            found += [(f"{provider.name}[split_kv={n}]", provider, n) for n in splits]
    return found


def why_not(case: Case, device: torch.device, n_sets: int) -> str | None:
    """What keeps the case from the device's memory; None if nothing does."""
    if device.type != "cuda":
        return None
    release(device)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    needed_bytes = case.needed_bytes(n_sets)
    if needed_bytes <= free_bytes:
        return None
    return f"needs about {needed_bytes / 1e9:.0f} GB for {n_sets} input sets, {free_bytes / 1e9:.0f} GB are free"


def run_case(
    case: Case,
    device: torch.device,
    machine: Machine,
    *,
    providers: Sequence[str],
    splits: Sequence[int],
    runs: int,
    bytes_per_us: float,
    n_sets: int,
    repeat_inputs: bool = False,
) -> tuple[list[Row], list[str]]:
    """Measure one case. Returns its rows and the names of the providers that failed, their traces printed."""
    sets = make_inputs(case, device, n_sets)
    chosen = [p for name in providers if (p := PROVIDERS[name]).runs_here(case, device)]
    jobs: dict[str, tuple[Provider, Job]] = {}
    recordings: dict[str, Recording] = {}
    failed = []
    for name, provider, split_kv in variants(chosen, splits):
        print(f"  {case.name}: preparing {name}", flush=True)
        try:
            job = provider.make(case, sets, split_kv)
            recordings[name] = record(job.calls, device, n_passes(n_sets, repeat_inputs))
            jobs[name] = provider, job
        except Exception:  # noqa: BLE001 - one provider that cannot run must not cost the others their figures
            traceback.print_exc()
            failed.append(name)
        release(device)
    rows = []
    for name, spread in interleave(recordings, device, runs).items():
        provider, job = jobs[name]
        error = checked_error(recordings[name], sets, job.masks)
        if not math.isfinite(error):
            print(f"  {case.name}: {name} left output unwritten, or wrote NaN")
            failed.append(name)
            continue
        row = Row(
            bench="operator",
            **case.fields,
            provider=name,
            stage=provider.stage,
            inputs="repeated" if repeat_inputs else "rotated",
            floor_us=job.must_read_bytes / bytes_per_us,
            rel_error=error,
            rel_error_dense=dense_error(sets, job.masks) if provider.stage != "attention" else None,
            **spread._asdict(),
            **machine._asdict(),
        )
        rows.append(row)
    return rows, failed


def relative_error(out: Tensor, inputs: InputSet, mask: Tensor | None) -> float:
    """||out - ref|| / ||ref|| with ref in float64 over the tokens of ``mask`` bool [B, HKV, S], head by head.

    ``out`` is [B, HQ, 1, D] or folded, [B, HKV, G, D].
    """
    b, hkv, _, d = inputs.k.shape
    out, q = (x.reshape(b, hkv, -1, d) for x in (out, inputs.q))
    # Summed on the device: one wait for all heads
    wrong, size = (torch.zeros((), dtype=torch.float64, device=q.device) for _ in range(2))
    for row in range(b):
        for head in range(hkv):
            k, v = inputs.k[row, head], inputs.v[row, head]
            if mask is not None:
                seen = mask[row, head].nonzero()[:, 0]
                k, v = k[seen], v[seen]
            weights = (q[row, head].double() @ k.double().T / math.sqrt(d)).softmax(-1)
            ref = weights @ v.double()
            wrong += (out[row, head].double() - ref).square().sum()
            size += ref.square().sum()
    return math.sqrt(float(wrong / size))


def dense_error(sets: Sequence[InputSet], masks: Sequence[Tensor | None]) -> float:
    """Worst error of the input sets of torch's flash attention over the tokens of ``masks``."""
    return max(relative_error(dense_over(i, mask), i, mask) for i, mask in zip(sets, masks, strict=True))


def dense_over(inputs: InputSet, mask: Tensor | None) -> Tensor:
    """[B, HKV, G, D]: torch's flash attention, in the inputs' dtype, over the tokens of ``mask`` bool [B, HKV, S]."""
    b, hkv, _, d = inputs.k.shape
    q = inputs.q.view(b, hkv, -1, d)
    out = torch.empty_like(q)
    for row in range(b):
        for head in range(hkv):
            seen = slice(None) if mask is None else mask[row, head]
            k, v = (x[None, None, row, head, seen] for x in (inputs.k, inputs.v))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out[row, head] = scaled_dot_product_attention(q[None, None, row, head], k, v)[0, 0]
    return out


def checked_error(recording: Recording, sets: Sequence[InputSet], masks: Sequence[Tensor | None]) -> float:
    """Worst error of the input sets after one more replay over poisoned outputs: NaN if anything was not written."""
    for out in recording.outputs:
        out.fill_(math.nan)
    recording.replay()
    errors = [relative_error(*given) for given in zip(recording.outputs, sets, masks, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def release(device: torch.device) -> None:
    """Give back what the device holds for nobody."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
