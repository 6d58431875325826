"""What one step does with a pool of block slots: hits, misses, victims, and the blocks to attend to, in one launch.

The oracle is ``flex_tls.offload.residency``; the result is the same, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded

# Of heads and blocks: what a few warps hold in registers
SCORES_AT_ONCE = 4096


@triton.jit
def plan_residency(
    ids, scores, start, seq_lens, slot_of_block, block_of_slot, last_used, arrived, clock, begins, lens,
    fetch_block, fetch_slot, fetch_count, waits, counters, missing_mass, attended, attended_count,
    n_heads, W, N, P, A, R, score_stride, n_ahead, waits_above,
    BLOCK_SIZE: tl.constexpr, WP: tl.constexpr, OPEN: tl.constexpr, PP: tl.constexpr, SCORED: tl.constexpr,
    RP: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Program ``row`` plans for one row and KV head."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(start + row // n_heads).to(tl.int32)
    end = tl.load(seq_lens + row // n_heads).to(tl.int32)
    now = tl.load(clock + row) + 1
    slot_of_block += row * N
    block_of_slot += row * P
    last_used += row * P
    arrived += row * P
    fetch_block += row * P
    fetch_slot += row * P
    # Asked for early: nothing below writes it before it is used, and a way to memory is long
    s = tl.arange(0, PP)
    held = tl.load(block_of_slot + s, s < P, other=-1)
    which = tl.arange(0, 8)
    counters += row * 6 + which
    counted, lost_before = tl.load(counters, which < 6, other=0), tl.load(missing_mass + row)
    # Needed blocks: the selected ones, and behind them those of new tokens that are not among them
    lane = tl.arange(0, WP)
    block = tl.load(ids + row * W + lane, lane < W, other=N)
    selected = block < N
    last = tl.minimum((end + n_ahead - 1) // BLOCK_SIZE, N - 1)
    for i in tl.static_range(OPEN):
        opened = begin // BLOCK_SIZE + i
        known = tl.sum((block == opened).to(tl.int32), 0)
        block = tl.where((lane == W + i) & (opened <= last) & (known == 0), opened, block)
    needed = block < N
    slot = tl.load(slot_of_block + block, needed, other=-1)
    lost = 0.0
    if SCORED:
        for first in range(0, R, RP):
            r = first + tl.arange(0, RP)
            mine = (r < R)[:, None] & selected[None]
            score = tl.load(scores + (row * R + r)[:, None] * score_stride + block[None], mine, other=float("-inf"))
            top = tl.max(score, 1)
            weight = tl.exp(score - tl.where(top == float("-inf"), 0.0, top)[:, None])
            gone = tl.sum(tl.where((slot < 0)[None], weight, 0.0), 1)
            lost += tl.sum(gone / tl.maximum(tl.sum(weight, 1), 1.1754944e-38), 0)
        lost = lost / R
    hit = needed & (slot >= 0)
    absent = needed & (slot < 0)
    n_absent = tl.sum(absent.to(tl.int32), 0)
    # A slot that is used now is no victim
    tl.store(last_used + slot, now, hit)
    tl.debug_barrier()
    used = tl.load(last_used + s, s < P, other=0)
    free = (s < P) & (used != now)
    age = tl.where(held < 0, -1, used)
    # The oldest slots: fewer than n_absent are as old as ``low``, at least as many as ``edge``
    low = -2
    edge = now
    while edge - low > 1:
        middle = (low + edge) >> 1
        enough = tl.sum((free & (age <= middle)).to(tl.int32), 0) >= n_absent
        edge = tl.where(enough, middle, edge)
        low = tl.where(enough, low, middle)
    older = free & (age < edge)
    same = (free & (age == edge)).to(tl.int32)
    room = n_absent - tl.sum(older.to(tl.int32), 0)
    victim = older | ((same != 0) & (tl.cumsum(same, 0) <= room))
    nth = tl.cumsum(victim.to(tl.int32), 0) - 1
    tl.store(fetch_slot + nth, s, victim)
    tl.store(fetch_block + tl.cumsum(absent.to(tl.int32), 0) - 1, block, absent)
    tl.store(slot_of_block + held, -1, victim & (held >= 0))
    tl.debug_barrier()
    new_block = tl.load(fetch_block + lane, lane < n_absent, other=0)
    new_slot = tl.load(fetch_slot + lane, lane < n_absent, other=0)
    tl.store(slot_of_block + new_block, new_slot, lane < n_absent)
    tl.store(block_of_slot + new_slot, new_block, lane < n_absent)
    tl.store(last_used + new_slot, now, lane < n_absent)
    tl.store(arrived + new_slot, now, lane < n_absent)

    # An integer: the interpreter has no conjunction of a number's truth with a vector's
    wait = tl.where(lost > waits_above, 1, 0)
    n_selected = tl.sum(selected.to(tl.int32), 0)
    n_missing = tl.sum((absent & selected).to(tl.int32), 0)
    tl.store(waits + row, wait)
    tl.store(fetch_count + row, n_absent)
    tl.store(clock + row, now)
    tl.store(begins + row, begin)
    tl.store(lens + row, end)
    count = tl.where(which == 0, tl.minimum(n_selected, 1), tl.where(which == 1, n_selected, 0))
    count = tl.where(which == 2, n_missing, tl.where(which == 3, n_absent, count))
    count = tl.where(which == 4, wait * tl.minimum(n_missing, 1), tl.where(which == 5, end - begin, count))
    tl.store(counters, counted + count, which < 6)
    tl.store(missing_mass + row, lost_before + lost)

    attended += row * A
    if RESIDENT:
        # A victim's slot has a new block: for who waits for it
        came = tl.load(fetch_block + nth, tl.where(victim, wait, 0) > 0, other=N)
        held = tl.where(victim, came, held)
        keep = (held >= 0) & (held <= (end - 1) // BLOCK_SIZE)
        kept, entry = tl.where(keep, held, N), s
    else:
        keep = selected & ((hit.to(tl.int32) + wait) > 0)
        kept, entry = tl.where(keep, block, N), lane
    tl.store(attended + entry, tl.sort(kept), entry < A)
    tl.store(attended_count + row, tl.sum(keep.to(tl.int32), 0))


def launch_plan_residency(
    ids: Tensor, scores: Tensor | None, start: Tensor, seq_lens: Tensor, slot_of_block: Tensor, block_of_slot: Tensor,
    last_used: Tensor, arrived: Tensor, clock: Tensor, begins: Tensor, lens: Tensor, fetch_block: Tensor,
    fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, counters: Tensor, missing_mass: Tensor,
    *, n_open: int, n_ahead: int, block_size: int, waits_above: float, resident_too: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plan ids int32 [B, HKV, W]; see ``flex_tls.offload.residency.plan_step`` for what is read and written.

    Returns the blocks to attend to, int32 [B, HKV, A], for one query token, the last; and their counts [B, HKV].
    A is W, or the number of slots with ``resident_too``.
    """
    b, hkv, w = ids.shape
    n, p = slot_of_block.shape[2], block_of_slot.shape[2]
    a = p if resident_too else w
    attended, counts = ids.new_empty(b, hkv, a), ids.new_empty(b, hkv)
    lanes, n_scored = padded(w + n_open), 1 if scores is None else scores.shape[2]
    plan_residency[(b * hkv,)](
        ids, missing_mass if scores is None else scores, start, seq_lens, slot_of_block, block_of_slot, last_used,
        arrived, clock, begins, lens, fetch_block, fetch_slot, fetch_count, waits, counters, missing_mass, attended,
        counts, hkv, w, n, p, a, n_scored, n if scores is None else scores.shape[3], n_ahead, waits_above,
        BLOCK_SIZE=block_size, WP=lanes, OPEN=n_open, PP=padded(p), SCORED=scores is not None,
        RP=min(padded(n_scored), max(1, SCORES_AT_ONCE // lanes)), RESIDENT=resident_too,
        num_warps=4 if max(lanes, padded(p)) <= 2048 else 8,
    )  # fmt: skip
    return attended, counts
