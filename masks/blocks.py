"""Block selection -> ``BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..selection import BlockSelection

# Query rows per mask row: FlexAttention's default, and what its decode kernel expects
QUERY_BLOCK = 128


def block_mask(blocks: BlockSelection) -> BlockMask:
    """The selection as a ``BlockMask`` for folded queries [B, HKV, G * T, D] over keys [B, HKV, S, D].

    A chunk of T query tokens shares one list, the union of its selections; :func:`token_score_mod` cuts each query
    to its own. All blocks are listed as partial, none as full: the decode kernel splits over the partial list only.
    Builds index tensors on the device, without synchronising; cheap enough for every step.
    """
    indices, counts = union(blocks)
    rows = -(-blocks.group * blocks.indices.shape[2] // QUERY_BLOCK)
    return BlockMask.from_kv_blocks(
        counts[:, :, None].expand(-1, -1, rows).contiguous(),
        indices[:, :, None].expand(-1, -1, rows, -1).contiguous(),
        BLOCK_SIZE=(QUERY_BLOCK, blocks.block_size),
        seq_lengths=(blocks.group * blocks.indices.shape[2], blocks.capacity_tokens),
        compute_q_blocks=False,
    )


def union(blocks: BlockSelection) -> tuple[Tensor, Tensor]:
    """Blocks that any query token of the chunk keeps: int32 [B, HKV, width], ascending, and their counts [B, HKV]."""
    n, t = blocks.n_blocks, blocks.indices.shape[2]
    if t == 1:
        indices, counts = blocks.indices[:, :, 0], blocks.counts[:, :, 0]
    else:
        kept = blocks.kept().any(2)
        number = torch.arange(n, dtype=torch.int32, device=kept.device)
        width = min(n, t * blocks.indices.shape[3])
        indices = torch.where(kept, number, n).sort(-1).values[..., :width]
        counts = kept.sum(-1, dtype=torch.int32)
    if not indices.is_cuda:
        # The C++ template reads lists of the full width; the Triton one takes narrow lists, and is faster with them
        indices = torch.nn.functional.pad(indices, (0, n - indices.shape[-1]), value=n)
    return indices, counts
