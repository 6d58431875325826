"""Selections as local as real text's: random weights have no locality of their own."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of a step's blocks that were selected in the step before, the last 4 and the last 16 (docs/design.md, section 6)
REAL_TEXT = (0.80, 0.92, 0.975)


def trace(
    n_steps: int, rows: int, n_blocks: int, kept: int, overlap: tuple[float, float, float] = REAL_TEXT,
    device: torch.device | str = "cpu", seed: int = 0,
) -> Tensor:  # fmt: skip
    """Int32 [steps, rows, K], ascending: selections with the given overlap, the newest and the first block in each."""
    generator = torch.Generator(device).manual_seed(seed)
    last = torch.full((rows, n_blocks), -100, device=device)
    steps = []
    # As many steps before the first as the longest overlap looks back
    for now in range(n_steps + 16):
        age = now - last
        ages = [(1, 1), (2, 4), (5, 16), (17, 10**9)]
        shares = [overlap[0], overlap[1] - overlap[0], overlap[2] - overlap[1]]
        chosen = torch.zeros(rows, n_blocks, dtype=torch.bool, device=device)
        chosen[:, [0, -1]] = True
        wanted = 2
        for (low, high), share in zip(ages, [*shares, 1.0], strict=True):
            wanted = min(kept, max(wanted, wanted + round(share * kept) - (2 if low == 1 else 0)))
            fits = (age >= low) & (age <= high)
            chosen = _add(chosen, fits, wanted, generator)
        chosen = _add(chosen, torch.ones_like(chosen), kept, generator)
        last[chosen] = now
        number = torch.arange(n_blocks, device=device)
        steps.append(torch.where(chosen, number, n_blocks).sort(-1).values[:, :kept].int())
    return torch.stack(steps[16:])


def overlaps(ids: Tensor, n_blocks: int) -> tuple[float, float, float]:
    """What :data:`REAL_TEXT` says, of a trace [steps, rows, K] of more than 16 steps."""
    selected = (
        torch.zeros(*ids.shape[:2], n_blocks + 1, device=ids.device).scatter_(2, ids.long(), 1.0)[..., :-1].bool()
    )
    found = []
    for back in (1, 4, 16):
        shares = [
            (selected[t] & selected[t - back : t].any(0)).sum() / selected[t].sum() for t in range(16, len(selected))
        ]
        found.append(float(torch.stack(shares).mean()))
    return found[0], found[1], found[2]


def _add(chosen: Tensor, fits: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """``chosen`` and random blocks of ``fits``, as many as are there, up to ``wanted`` a row."""
    weight = torch.rand(chosen.shape, generator=generator, device=chosen.device)
    weight = torch.where(chosen, 2.0, torch.where(fits, weight, -1.0))
    best = weight.topk(wanted, -1)
    return torch.zeros_like(chosen).scatter(1, best.indices, best.values >= 0)
