"""Random inputs of a case, with the index that our providers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import flex_tls as tls

from .cases import Case

# Keys that are indexed at once: fitting copies them, in float32 and more than once
CHUNK_BYTES = 2**29


class InputSet(NamedTuple):
    """Inputs of one call: q [B, HQ, 1, D], k and v [B, HKV, S, D], their index, and a random selection to be given."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: tls.KVIndex
    blocks: tls.BlockSelection
    tokens: tls.TokenSelection


def make_inputs(case: Case, device: torch.device, n_sets: int) -> list[InputSet]:
    """Random input sets: normal q, k, v; K random blocks, and inside them ``token_budget`` random tokens."""
    torch.manual_seed(0)
    return [_input_set(case, device) for _ in range(n_sets)]


def selection(case: Case, numbers: Tensor) -> tls.BlockSelection:
    """Block numbers [B, HKV, K], ascending, as a selection for one query token."""
    indices = numbers[:, :, None].to(torch.int32).contiguous()
    counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32, device=indices.device)
    return tls.BlockSelection(indices, counts, case.n_blocks, case.block_size, case.group, case.S)


def _input_set(case: Case, device: torch.device) -> InputSet:
    rows = (case.B, case.HKV)
    q = torch.randn(case.B, case.HQ, 1, case.D, dtype=case.dtype, device=device)
    k, v = (torch.randn(*rows, case.S, case.D, dtype=case.dtype, device=device) for _ in range(2))
    numbers = torch.rand(*rows, case.n_blocks, device=device).topk(case.kept_blocks).indices.sort().values
    slots = (numbers[..., None] * case.block_size + torch.arange(case.block_size, device=device)).flatten(2)
    chosen = torch.rand(slots.shape, device=device).topk(case.token_budget).indices
    mask = torch.zeros(*rows, case.S, dtype=torch.bool, device=device)
    mask = mask.scatter(2, slots.gather(2, chosen), True)[:, :, None].contiguous()
    last = torch.full((case.B, 1), case.S - 1, device=device)
    tokens = tls.TokenSelection.from_mask(mask, last, case.group)
    return InputSet(q, k, v, build_index(k, case.config()), selection(case, numbers), tokens)


def build_index(k: Tensor, cfg: tls.TLSConfig) -> tls.KVIndex:
    """Index of all of k; rows do not depend on one another, and are built a few at a time to spare memory."""
    b, hkv, s, d = k.shape
    index = tls.KVIndex(
        cfg, batch_size=b, n_kv_heads=hkv, head_dim=d, capacity_tokens=s, dtype=k.dtype, device=k.device
    )
    some = max(1, CHUNK_BYTES // k[0].nbytes)
    for first in range(0, b, some):
        part = tls.KVIndex.build(k[first : first + some], cfg)
        for ours, theirs in ((index.labels, part.labels), (index.summary, part.summary)):
            for name, buffer in theirs.tensors.items() if theirs is not None else ():
                ours.tensors[name][first : first + some] = buffer
    index.seq_lens.fill_(s)
    index.max_len = s
    return index
