"""Where blocks sit when keys and values are a pool of block slots instead of the whole cache."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import BlockSelection, TokenSelection


class Pages(NamedTuple):
    """The page table of a pool [B, HKV, P * BLOCK, D], both ways; see :class:`flex_tls.offload.DevicePool`.

    Attributes:
        slot_of_block: int32 [B, HKV, N]; -1 for a block that is not in the pool.
        block_of_slot: int32 [B, HKV, P]; -1 for an empty slot.
        block_size: tokens per block.
    """

    slot_of_block: Tensor
    block_of_slot: Tensor
    block_size: int

    @property
    def n_slots(self) -> int:
        """P."""
        return self.block_of_slot.shape[2]

    def place_blocks(self, blocks: BlockSelection) -> BlockSelection:
        """A selection of blocks that are all in the pool, as a selection of slots."""
        slot = F.pad(self.slot_of_block, (0, 1), value=self.n_slots)[:, :, None].expand(
            -1, -1, blocks.indices.shape[2], -1
        )
        return BlockSelection(
            slot.gather(3, blocks.indices.long()), blocks.counts, self.n_slots, self.block_size, blocks.group,
            self.n_slots * self.block_size,
        )  # fmt: skip

    def place_tokens(self, tokens: TokenSelection) -> TokenSelection:
        """A selection of tokens in the pool's order; those of blocks that are not in the pool are left out."""
        words = tokens.words
        in_block = self.block_size // tokens.word_tokens
        block = self.block_of_slot
        where = block.clamp_min(0).long()[..., None] * in_block + torch.arange(in_block, device=words.device)
        taken = words.gather(3, where.flatten(2)[:, :, None].expand(-1, -1, words.shape[2], -1))
        taken = taken.masked_fill((block < 0)[..., None].expand_as(where).flatten(2)[:, :, None], 0)
        return replace(tokens, words=taken, n_slots=self.n_slots * self.block_size)

    def gathered(self, pool: Tensor) -> Tensor:
        """The pool's keys or values [B, HKV, P * BLOCK, D] in logical order, [B, HKV, N * BLOCK, D].

        Zeros for blocks that are not in the pool.
        """
        token = torch.arange(self.block_size, device=pool.device)
        place = self.slot_of_block.clamp_min(0).long()[..., None] * self.block_size + token
        gathered = pool.gather(2, place.flatten(2)[..., None].expand(-1, -1, -1, pool.shape[3]))
        return gathered.masked_fill((self.slot_of_block < 0).repeat_interleave(self.block_size, 2)[..., None], 0.0)
