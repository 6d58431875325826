"""What a compiled decode step runs on one layer's cache: lengths live on the device, nothing is decided on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TLSConfig
from .fused import attend_fused
from .fused_pool import attend_arrived, attend_chosen, attend_resident, choose_blocks
from .index import KVIndex
from .offload import LayerOffload


def decode_layer(
    q: Tensor, k_new: Tensor, v_new: Tensor, keys: Tensor, values: Tensor, index: KVIndex | None, start: Tensor,
    cfg: TLSConfig, *, scale: float, sparse: bool, arrivals: Tensor,
) -> Tensor:  # fmt: skip
    """Write the step's tokens behind ``start`` int64 [B], then attend to all of them, or to two levels' choice.

    q [B, HQ, T, D], k_new and v_new [B, HKV, T, D], keys and values [B, HKV, S, D] -> [B, HQ, T, D].
    The index's labels are written, its lengths are not: they are the caller's, once a step.
    ``arrivals`` int32 [R]: zeros before and after, R at least B * HKV * T.
    """
    if index is None:
        append_tokens(k_new, v_new, start, keys, values, None, None, None, bits=())
    else:
        labels = index.labels
        assert labels.words is not None
        append_tokens(k_new, v_new, start, keys, values, labels.codes, labels.to_code, labels.offset, labels.words)
    seq_lens = start + q.shape[2]
    if index is None or not sparse:
        out: Tensor = attend_all(q, keys, values, seq_lens, arrivals, scale)
        return out
    return attend_fused(q, keys, values, index, cfg, scale, seq_lens)[0]


def decode_offloaded(
    q: Tensor, k_new: Tensor, v_new: Tensor, engine: LayerOffload, index: KVIndex, start: Tensor, cfg: TLSConfig, *,
    scale: float,
) -> Tensor:  # fmt: skip
    """As :func:`decode_layer` for one token, its keys and values in host memory and the engine's pool.

    Earlier transfers must have been joined, and this step's be joined before the next one. What the step attends to is
    up to the engine's policy; a context that the budgets hold is selected whole.
    """
    labels, pool = index.labels, engine.pool
    assert labels.words is not None
    append_to_pool(
        k_new, v_new, start, pool.slots, pool.slot_of_block, labels.codes, labels.to_code, labels.offset, labels.words,
        pool.scales,
    )  # fmt: skip
    seq_lens = start + 1
    chosen = choose_blocks(q, index, cfg, scale, seq_lens)
    heads = (q.shape[0], pool.slots.shape[1])
    attended, counts = engine.traced_step(
        chosen.blocks.view(*heads, -1), chosen.scores.view(*heads, *chosen.scores.shape[1:]), start, seq_lens
    )
    inside = chosen._replace(blocks=attended.flatten(0, 1), counts=counts.flatten())
    if not engine.config.may_wait:
        return attend_chosen(q, pool, inside, index, cfg, scale, seq_lens)
    # What is there first, while the rest comes
    resident = attend_resident(q, pool, inside, index, cfg, scale, seq_lens)
    engine.traced_arrival()
    return attend_arrived(q, pool, resident, inside, index, scale, seq_lens)


@torch.library.custom_op("flex_tls::append_to_pool", mutates_args=("slots", "codes", "scales"))
def append_to_pool(
    k_new: Tensor, v_new: Tensor, start: Tensor, slots: Tensor, slot_of_block: Tensor, codes: Tensor, to_code: Tensor,
    offset: Tensor, bits: list[int], scales: Tensor | None,
) -> None:  # fmt: skip
    """As :func:`append_tokens`, into slots [B, HKV, P, BLOCK, 2, D] of a pool, by its table.

    With ``scales`` float32 [B, HKV, P, BLOCK, 2] slots are int8.
    """
    from .kernels.append import launch_append

    k_new, v_new = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_new, v_new))
    with torch.cuda.device_of(slots):  # type: ignore[no-untyped-call,unused-ignore]
        launch_append(
            k_new, v_new, start, slots[..., 0, :], slots[..., 1, :], codes, to_code, offset, bits=tuple(bits),
            pages=slot_of_block, scales=scales,
        )  # fmt: skip


@torch.library.custom_op("flex_tls::append_tokens", mutates_args=("keys", "values", "codes"))
def append_tokens(
    k_new: Tensor, v_new: Tensor, start: Tensor, keys: Tensor, values: Tensor, codes: Tensor | None,
    to_code: Tensor | None, offset: Tensor | None, bits: list[int],
) -> None:  # fmt: skip
    """Keys, values and labels of new tokens; see :func:`flex_tls.kernels.append.launch_append`."""
    from .kernels.append import launch_append

    k_new, v_new = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_new, v_new))
    with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call,unused-ignore]
        launch_append(k_new, v_new, start, keys, values, codes, to_code, offset, bits=tuple(bits))


@torch.library.custom_op("flex_tls::attend_all", mutates_args=())
def attend_all(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, arrivals: Tensor, scale: float) -> Tensor:
    """Causal attention of each row's last T tokens to all of the row, split over it: the layers that stay dense."""
    from .kernels.attend import launch_attend
    from .kernels.tiles import tiles_for_all

    q = q if q.stride(-1) == 1 else q.contiguous()
    rows = q.shape[0] * k.shape[1] * q.shape[2]
    tiles = tiles_for_all(q.device, head_bytes=q.shape[3] * q.element_size(), rows=rows)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call,unused-ignore]
        out, _ = launch_attend(
            q, k, v, seq_lens, None, None, arrivals, by_block=False, block_size=1, scale=scale, tiles=tiles
        )
    return out


@attend_all.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor, arrivals: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
