"""Token selection -> ``score_mod``, composed with a user's own mods in logical coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mods import MaskMod, ScoreMod
from ..pages import Pages
from ..selection import TokenSelection


def token_score_mod(
    tokens: TokenSelection, base: ScoreMod | None = None, mask_mod: MaskMod | None = None, pages: Pages | None = None
) -> ScoreMod:
    """A ``score_mod`` for folded queries that keeps the selected tokens and sends every other score to -inf.

    It is -inf outside the selected blocks too, so that eager ``flex_attention``, which ignores block lists, agrees
    with the compiled kernels. ``base(score, b, h, q_idx, kv_idx)`` and ``mask_mod(b, h, q_idx, kv_idx)`` see the
    logical query head, query position and key position, whatever the folding. With ``pages`` keys are a pool's, and
    ``tokens`` come from :meth:`flex_tls.pages.Pages.place_tokens`; the mods see logical key positions all the same.
    Call it inside your compiled step: its closure then costs no recompile.
    """
    words, positions, group, n_slots = tokens.words, tokens.positions, tokens.group, tokens.n_slots
    n_tokens, size = words.shape[2], 1 if pages is None else pages.block_size
    shift, within = tokens.word_tokens.bit_length() - 1, tokens.word_tokens - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # Kernels evaluate mods on lanes past the last row and slot too: clamp, then mask
        token = q_idx % n_tokens
        slot = kv_idx.clamp(max=n_slots - 1)
        keep = (((words[b, h, token, slot >> shift] >> (slot & within)) & 1) != 0) & (kv_idx < n_slots)
        if base is not None or mask_mod is not None:
            head = h * group + (q_idx // n_tokens).clamp(max=group - 1)
            position = positions[b, token].clamp(min=0)
            if pages is not None:
                slot = pages.block_of_slot[b, h, slot // size].clamp(min=0) * size + slot % size
            if base is not None:
                score = base(score, b, head, position, slot)
            if mask_mod is not None:
                keep = keep & mask_mod(b, head, position, slot)
        return torch.where(keep, score, -torch.inf)

    return score_mod
