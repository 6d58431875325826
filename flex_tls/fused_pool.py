"""The ``triton`` backend over a pool of block slots: level 1, what of its choice is there, and what comes meanwhile.

:func:`choose_blocks`, then somebody plans and starts transfers, then either :func:`attend_chosen`, if all that was
chosen is there, or :func:`attend_resident`, a wait for the transfers, and :func:`attend_arrived`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import TLSConfig
from .fused import labels_of, launch, options_of, tiles_of
from .index import KVIndex
from .offload import DevicePool


class Chosen(NamedTuple):
    """What :func:`choose_blocks` leaves for the others: R = B * HKV * T rows.

    Attributes:
        asked, base, unit, norms: the query in label space and level 1's softmax; see ``kernels/two_level.py``.
        scores: float32 [R, G, N'], label scores of blocks; past the query's own block anything.
        blocks, counts: int32 [R, K], ascending, N past the count; int32 [R].
    """

    asked: Tensor
    base: Tensor
    unit: Tensor
    scores: Tensor
    norms: Tensor
    blocks: Tensor
    counts: Tensor


def choose_blocks(q: Tensor, index: KVIndex, cfg: TLSConfig, scale: float, seq_lens: Tensor) -> Chosen:
    """Level 1 alone, for q [B, HQ, T, D] and rows of ``seq_lens`` int64 [B]."""
    return Chosen(*choose(q, seq_lens, *labels_of(index), **options_of(index, cfg, scale)))


def attend_chosen(
    q: Tensor, pool: DevicePool, chosen: Chosen, index: KVIndex, cfg: TLSConfig, scale: float, seq_lens: Tensor
) -> Tensor:
    """Level 2 and attention inside ``chosen.blocks``, each of which is in the pool; [B, HQ, T, D]."""
    out: Tensor = attend_slots(
        q, pool.slots, pool.scales, pool.slot_of_block, None, None, seq_lens, *labels_of(index), *chosen,
        token_budget=cfg.token_budget, **options_of(index, cfg, scale),
    )[0]  # fmt: skip
    return out


class Resident(NamedTuple):
    """What :func:`attend_resident` leaves for :func:`attend_arrived`.

    Attributes:
        parts, parts_lse: float32 [R, 2 * programs, G, D] and [R, 2 * programs, G]; the first half is written.
        ids, counts: int32 [R, M], all tokens that were chosen, int32 [R]; the blocks, if ``by_block``.
        by_block: whether level 2 had nothing to choose.
    """

    parts: Tensor
    parts_lse: Tensor
    ids: Tensor
    counts: Tensor
    by_block: bool


def attend_resident(
    q: Tensor, pool: DevicePool, chosen: Chosen, index: KVIndex, cfg: TLSConfig, scale: float, seq_lens: Tensor
) -> Resident:
    """Level 2 inside ``chosen.blocks``, each of which has a slot, and attention where that held it before this step.

    Whether a block came with the step is what the pool's tables say after its plan; those that did are not read yet.
    """
    parts, parts_lse, ids, counts = attend_slots(
        q, pool.slots, pool.scales, pool.slot_of_block, pool.arrived, pool.clock, seq_lens, *labels_of(index), *chosen,
        token_budget=cfg.token_budget, **options_of(index, cfg, scale),
    )  # fmt: skip
    if not ids.shape[1]:
        return Resident(parts, parts_lse, chosen.blocks, chosen.counts, by_block=True)
    return Resident(parts, parts_lse, ids, counts, by_block=False)


def attend_arrived(
    q: Tensor, pool: DevicePool, resident: Resident, chosen: Chosen, index: KVIndex, scale: float, seq_lens: Tensor
) -> Tensor:
    """The output [B, HQ, T, D] over all that was chosen, once it is in the pool."""
    out: Tensor = attend_arrived_slots(
        q, pool.slots, pool.scales, pool.slot_of_block, pool.arrived, pool.clock, seq_lens, index.labels.codes,
        index.arrivals, *resident, pool.block_size,
        chosen.blocks.shape[1] * pool.block_size, scale,
    )  # fmt: skip
    return out


@torch.library.custom_op("flex_tls::choose_blocks", mutates_args=())
def choose(
    q: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor, arrivals: Tensor,
    bits: list[int], block_size: int, kept_blocks: int, sinks: int, recent: int, scale: float, filter_dims: int,
    block_reduce: str, group_reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Level 1: the fields of :class:`Chosen`."""
    _, _, work = launch(
        q, None, None, seq_lens, codes, to_query, low, step, arrivals, bits=tuple(bits), block_size=block_size,
        kept_blocks=kept_blocks, token_budget=None, sinks=sinks, recent=recent, scale=scale, filter_dims=filter_dims,
        block_reduce=block_reduce, group_reduce=group_reduce,
    )  # fmt: skip
    return work.asked, work.base, work.unit, work.scores, work.norms, work.blocks, work.block_counts


@choose.register_fake
def _(
    q: Tensor, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor, arrivals: Tensor,
    bits: list[int], block_size: int, kept_blocks: int, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    from .kernels.labels import parts_before

    (b, hq, t, _), hkv, n = q.shape, codes.shape[1], codes.shape[3] // block_size
    rows, group = b * hkv * t, hq // hkv
    kept = min(kept_blocks, n)
    chunk, chunks = tiles_of(q, codes, kept * block_size).chunk(n)
    floats = low.new_empty
    return (
        codes.new_empty(rows, group, parts_before(tuple(bits), len(bits))), floats(rows, group, 2), floats(rows, group),
        floats(rows, group, chunk * chunks), floats(rows, group, 2), codes.new_empty(rows, kept),
        codes.new_empty(rows),
    )  # fmt: skip


@torch.library.custom_op("flex_tls::attend_slots", mutates_args=())
def attend_slots(
    q: Tensor, slots: Tensor, scales: Tensor | None, slot_of_block: Tensor, arrived: Tensor | None,
    clock: Tensor | None, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, asked: Tensor, base: Tensor, unit: Tensor, scores: Tensor, norms: Tensor, blocks: Tensor,
    counts: Tensor, bits: list[int], block_size: int, kept_blocks: int, token_budget: int | None, sinks: int,
    recent: int, scale: float, filter_dims: int, block_reduce: str, group_reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Level 2 and attention over a pool: output and log-sum-exp or, given ``arrived``, :class:`Resident`'s fields."""
    from .kernels.two_level import Work

    given = Work.given(asked, base, unit, scores, norms, blocks, counts)
    out, lse, work = launch(
        q, slots[..., 0, :], slots[..., 1, :], seq_lens, codes, to_query, low, step, arrivals, bits=tuple(bits),
        block_size=block_size, kept_blocks=kept_blocks, token_budget=token_budget, sinks=sinks, recent=recent,
        scale=scale, filter_dims=filter_dims, block_reduce=block_reduce, group_reduce=group_reduce, given=given,
        pages=slot_of_block, scales=scales, arrived=arrived, clock=clock,
    )  # fmt: skip
    return out, lse, work.ids, work.counts


@attend_slots.register_fake
def _(
    q: Tensor, slots: Tensor, scales: Tensor | None, slot_of_block: Tensor, arrived: Tensor | None,
    clock: Tensor | None, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor, step: Tensor,
    arrivals: Tensor, asked: Tensor, base: Tensor, unit: Tensor, scores: Tensor, norms: Tensor, blocks: Tensor,
    counts: Tensor, bits: list[int], block_size: int, kept_blocks: int, token_budget: int | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    (rows, kept), group, d = blocks.shape, unit.shape[1], q.shape[3]
    by_block = token_budget is None or token_budget >= kept * block_size
    ids = blocks.new_empty(rows, 0 if by_block else token_budget or 0)
    if arrived is None:
        return (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            unit.new_empty(q.shape[:3]),
            ids,
            ids.new_empty(rows),
        )
    parts = 2 * tiles_of(q, codes, kept * block_size).programs
    return unit.new_empty(rows, parts, group, d), unit.new_empty(rows, parts, group), ids, ids.new_empty(rows)


@torch.library.custom_op("flex_tls::attend_arrived", mutates_args=("parts", "parts_lse"))
def attend_arrived_slots(
    q: Tensor, slots: Tensor, scales: Tensor | None, slot_of_block: Tensor, arrived: Tensor, clock: Tensor,
    seq_lens: Tensor, codes: Tensor, arrivals: Tensor, parts: Tensor, parts_lse: Tensor, ids: Tensor, counts: Tensor,
    by_block: bool, block_size: int, kept_tokens: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attention over what has come, merged with the parts; see :func:`attend_arrived`."""
    from .kernels.attend_arrived import launch_attend_arrived

    q = q if q.stride(-1) == 1 else q.contiguous()
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call,unused-ignore]
        return launch_attend_arrived(
            q, slots[..., 0, :], slots[..., 1, :], scales, seq_lens, ids, counts, slot_of_block, arrived, clock, parts,
            parts_lse, arrivals, by_block=by_block, block_size=block_size, scale=scale,
            tiles=tiles_of(q, codes, kept_tokens),
        )  # fmt: skip


@attend_arrived_slots.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
