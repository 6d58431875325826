"""The index's own cost: labels of a prompt's keys, the fit before them, one token's append, and a layer's audit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import attend
from flex_tls.audit import compare
from flex_tls.device import why_not_here
from flex_tls.labels import TokenLabels, label_keys
from flex_tls.static import append_tokens

from .cases import Case
from .rows import Machine, Row
from .timing import Recording, Spread, interleave, record, samples, spread

CASES = ("qwen3-8b-b1-96k", "qwen3-8b-b4-96k", "qwen3-8b-b1-256k")


def measure(case: Case, device: torch.device, machine: Machine, runs: int, bytes_per_us: float) -> list[Row]:
    """Rows of one case: ``label_keys``, the kernel; ``label_keys_eager``; ``append``, captured; ``fit``, which waits;
    ``audit``, what the drift monitor adds to a step: the selection, and its comparison with exact attention.

    Keys are larger than the L2 cache from 64k tokens on, and need no rotation. ``floor_us`` counts the bytes read; for
    fit and audit once, though they read the keys more often. ``rel_error`` is of the codes that were written, against
    float64's; 0 for fit and audit. On a CPU the kernels run interpreted, or not at all.
    """
    torch.manual_seed(0)
    k, v = (torch.randn(case.B, case.HKV, case.S, case.D, dtype=case.dtype, device=device) for _ in range(2))
    q = torch.randn(case.B, case.HQ, 4096 if case.S > 4096 else case.S, case.D, dtype=case.dtype, device=device)
    index = tls.KVIndex(
        case.config(), batch_size=case.B, n_kv_heads=case.HKV, head_dim=case.D, capacity_tokens=case.S,
        dtype=case.dtype, device=device,
    )  # fmt: skip
    index.fit(k, q=q)
    index.append(k)
    labels = index.labels
    assert labels.words is not None
    to_codes = labels.codes, labels.to_code, labels.offset, labels.words
    start, end = (torch.full((case.B,), at, dtype=torch.int64, device=device) for at in (0, case.S - 1))

    def by_kernel() -> Tensor:
        label_keys(k, start, None, *to_codes)
        return labels.codes[..., : case.S]

    def by_eager() -> Tensor:
        return labels.encode(k)

    def append() -> Tensor:
        append_tokens(k[:, :, -1:], v[:, :, -1:], end, k, v, *to_codes)
        return labels.codes[..., case.S - 1 : case.S]

    def audit() -> Tensor:
        one, cfg = q[:, :, -1:], index.cfg
        tokens = attend(one, k, v, index, cfg, backend="triton").tokens
        assert tokens is not None
        return compare(one, k, tokens, cfg, scale=case.D**-0.5)

    calls: dict[str, Callable[[], Tensor]] = {"label_keys_eager": by_eager}
    eager: dict[str, Callable[[], object]] = {"fit": partial(index.fit, k, q=q)}
    if why_not_here(device) is None:
        calls |= {"label_keys": by_kernel, "append": append}
        eager["audit"] = audit
    recordings: dict[str, Recording] = {name: record([call], device, 4) for name, call in calls.items()}
    taken: dict[str, Spread] = interleave(recordings, device, runs)
    for name, times in samples(eager, device, max(2, runs // 5)).items():
        taken[name] = spread(times)
    one_token = 2.0 * case.rows * case.D * case.dtype.itemsize
    floors = {"append": one_token + labels.to_code.nbytes}
    return [
        Row(
            bench="index", **case.fields, provider=name,
            stage="build" if name.startswith("label_keys") else name, inputs="repeated",
            floor_us=floors.get(name, k.nbytes) / bytes_per_us,
            rel_error=code_error(labels, codes := calls[name](), k[:, :, -codes.shape[3] :]) if name in calls else 0.0,
            **figures._asdict(), **machine._asdict(),
        )
        for name, figures in taken.items()
    ]  # fmt: skip


def code_error(labels: TokenLabels, codes: Tensor, k: Tensor) -> float:
    """||codes - ref|| / ||ref|| over all channels and tokens, ref rounded from float64."""
    got = labels.unpack(codes, labels.low.shape[-1])
    wrong, size = 0.0, 0.0
    for row in range(k.shape[0]):
        for head in range(k.shape[1]):
            exact = k[row, head].double() @ labels.to_code[row, head].double() + labels.offset[row, head].double()
            exact = exact.round().clamp_min(0).minimum(labels.levels)
            wrong += float((got[row, head].T - exact).square().sum())
            size += float(exact.square().sum())
    return float((wrong / size) ** 0.5)
