"""What one step does with a pool, in plain PyTorch without host synchronisation: the oracle, and the CPU's plan."""

from __future__ import annotations

import torch
from torch import Tensor

from .pool import DevicePool


def open_blocks(n_ahead: int, block_size: int) -> int:
    """Most blocks that up to ``n_ahead`` tokens of a step and the ``n_ahead`` tokens after it can touch."""
    return -(-(2 * n_ahead - 1) // block_size) + 1


def plan_step(
    pool: DevicePool, ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, *, n_ahead: int,
    waits_above: float,
) -> None:  # fmt: skip
    """Give every block that the step needs a slot, and list what has to be fetched; writes the pool's tables.

    Needed are the selected blocks, those of the step's own tokens, and those of the tokens to come, which therefore
    have a slot before they are appended. Needed blocks that have no slot take the slots that are empty or whose block
    was needed longest ago (ties: the lower slot), never one of a needed block. Selected blocks are listed first, then
    those of new tokens; in this order they get these slots in the order of theirs.

    Args:
        pool: whose ``fetch_*``, ``waits`` and counters are written too.
        ids: int32 [B, HKV, W], selected blocks, ascending, N past the last. W and :func:`open_blocks` fit the pool.
        scores: float32 [B, HKV, R, N], level 1's scores of R query heads and tokens, -inf for "no weight"; a selected
            block's share of ``exp(score)`` is its estimated attention mass. None: nothing is estimated.
        start, seq_lens: int64 [B], tokens of each row without and with the step's own, which are at most ``n_ahead``.
        n_ahead: tokens that may be appended before the next plan.
        waits_above: rows and heads whose missing share of the estimated mass is above this wait.
    """
    n, p, size = pool.n_blocks, pool.n_slots, pool.block_size
    check_room(pool, ids, n_ahead)
    device = ids.device
    number, slot = (torch.arange(x, dtype=torch.int32, device=device) for x in (n, p))
    first = start[:, None, None] // size
    last = (seq_lens + n_ahead - 1)[:, None, None] // size
    selected = torch.zeros(*ids.shape[:2], n + 1, dtype=torch.bool, device=device)
    selected = selected.scatter(2, ids.long(), True)[..., :-1]
    needed = selected | (number >= first) & (number <= last)
    resident = pool.slot_of_block >= 0
    missing, absent = selected & ~resident, needed & ~resident
    n_absent = absent.sum(-1, dtype=torch.int32)

    held = pool.block_of_slot
    inside = held.clamp_min(0).long()
    age = torch.where(held < 0, -1, pool.last_used)
    age = torch.where((held >= 0) & needed.gather(2, inside), torch.iinfo(torch.int32).max, age)
    order = age.sort(dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter(2, order, slot.long().expand_as(order))
    victim = rank < n_absent[..., None]

    entry = slot < n_absent[..., None]
    listed = torch.where(absent, number + torch.where(selected, 0, n), 2 * n).sort(-1).values[..., :p]
    pool.fetch_block.copy_(torch.where(entry, listed % n, n))
    pool.fetch_slot.copy_(torch.where(entry, torch.where(victim, slot, p).sort(-1).values, p))
    pool.fetch_count.copy_(n_absent)
    evicted = resident & victim.gather(2, pool.slot_of_block.clamp_min(0).long())
    pool.slot_of_block.copy_(_scattered(pool.slot_of_block.masked_fill(evicted, -1), pool.fetch_block, pool.fetch_slot))
    pool.block_of_slot.copy_(_scattered(pool.block_of_slot, pool.fetch_slot, pool.fetch_block))
    pool.clock += 1
    pool.begins.copy_(start[:, None].expand_as(pool.begins))
    pool.lens.copy_(seq_lens[:, None].expand_as(pool.lens))
    now = pool.clock[..., None]
    in_use = (pool.block_of_slot >= 0) & needed.gather(2, pool.block_of_slot.clamp_min(0).long())
    pool.last_used.copy_(torch.where(in_use, now, pool.last_used))
    pool.arrived.copy_(torch.where(victim, now, pool.arrived))

    lost = _missing_mass(scores, selected, missing)
    pool.waits.copy_(lost > waits_above)
    n_selected, n_missing = selected.sum(-1), missing.sum(-1)
    counted = (n_selected > 0, n_selected, n_missing, n_absent, (pool.waits > 0) & (n_missing > 0))
    pool.counters += torch.stack([x.long() for x in (*counted, pool.lens - pool.begins)], -1)
    pool.missing_mass += lost


def attended_blocks(pool: DevicePool, ids: Tensor, positions: Tensor, *, resident_too: bool) -> tuple[Tensor, Tensor]:
    """Blocks that the planned step attends to: int32 [B, HKV, T, A], ascending, N past the counts [B, HKV, T].

    Those of each query token's selection that were resident when the step began, all of them where the step waits;
    with ``resident_too`` also every other block that was resident and that the step did not evict.

    Args:
        pool: after :func:`plan_step`.
        ids: int32 [B, HKV, T, K], each query token's selection, N past the last.
        positions: int64 [B, T] of the query tokens; blocks after them are left out.
        resident_too: see above; A is then P, else K.
    """
    n = pool.n_blocks
    at = pool.slot_of_block.clamp_min(0).long()
    new = (pool.arrived.gather(2, at) == pool.clock[..., None]) & (pool.waits == 0)[..., None]
    here = ((pool.slot_of_block >= 0) & ~new)[:, :, None]
    if resident_too:
        number = torch.arange(n, dtype=torch.int32, device=ids.device)
        keep = here & (number <= (positions // pool.block_size)[:, None, :, None])
        kept = torch.where(keep, number, n).sort(-1).values[..., : pool.n_slots]
    else:
        here = torch.nn.functional.pad(here, (0, 1)).expand(-1, -1, ids.shape[2], -1)
        kept = torch.where(here.gather(3, ids.long()), ids, n).sort(-1).values
    return kept, (kept < n).sum(-1, dtype=torch.int32)


def check_room(pool: DevicePool, ids: Tensor, n_ahead: int) -> None:
    """Raise unless whatever the step may need fits the pool, so that a victim is always to be had."""
    n_open = open_blocks(n_ahead, pool.block_size)
    if min(ids.shape[-1] + n_open, pool.n_blocks) > pool.n_slots:
        raise ValueError(
            f"ids: expected at most {pool.n_slots - n_open} selected blocks a step (a pool of {pool.n_slots} slots, "
            f"{n_open} of them for new tokens), got {ids.shape[-1]}; take fewer query tokens at once, or "
            "enlarge the pool"
        )


def _scattered(table: Tensor, where: Tensor, what: Tensor) -> Tensor:
    """``table`` [..., X] with ``what`` at ``where``; entries of X, the padding, go nowhere."""
    return torch.nn.functional.pad(table, (0, 1)).scatter(2, where.long(), what)[..., :-1]


def _missing_mass(scores: Tensor | None, selected: Tensor, missing: Tensor) -> Tensor:
    """Float64 [B, HKV]: share of the selected blocks' ``exp(score)`` that is missing, mean over the R queries."""
    if scores is None:
        return torch.zeros(selected.shape[:2], dtype=torch.float64, device=selected.device)
    scores = scores.masked_fill(~selected[:, :, None], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weight = (scores - torch.where(top.isneginf(), 0.0, top)).exp()
    lost = (weight * missing[:, :, None]).sum(-1) / weight.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return lost.mean(-1).double()
