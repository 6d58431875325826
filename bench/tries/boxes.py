"""Boxes in label space: what a block's labels span, read before the labels themselves, or instead of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flex_tls import TLSConfig, selection
from flex_tls.index import KVIndex
from flex_tls.labels import TokenLabels
from flex_tls.mods import query_positions

NAMES = ("boxes", "boxes:x2", "boxes:x4")
_GRAMMAR = re.compile(r"boxes(?::x(\d+(?:\.\d+)?))?(?::r(\d*\.?\d+))?(?::c(\d+))?")


@dataclass(frozen=True)
class Boxes:
    """A filter before level 1, which reads of every block the least and the largest code of each label channel.

    Attributes:
        times: what it lets through, times the block budget. With 1 it is level 1; with more, level 1 goes on as usual
            among the blocks that are left, and reads no other label. Nor does level 2.
        radius: share of a box's half-width that counts, as in the index "box"; 1 bounds the label scores.
        channels: leading channels that boxes have; all of the labels' by default.
    """

    times: float = 1.0
    radius: float = 0.35
    channels: int | None = None

    @classmethod
    def parse(cls, text: str) -> Boxes:
        """``"boxes"``, behind it ``:x2`` for ``times``, ``:r1`` for ``radius``, ``:c16`` for ``channels``."""
        found = _GRAMMAR.fullmatch(text)
        if found is None:
            raise ValueError(f"boxes: expected boxes[:xTIMES][:rRADIUS][:cCHANNELS], such as boxes:x2, got {text!r}")
        times, radius, channels = found.groups()
        if float(times or 1) < 1 or channels == "0":
            raise ValueError(f"boxes: expected TIMES and CHANNELS of at least 1, got {text!r}")
        return cls(float(times or 1), float(radius or cls.radius), int(channels) if channels else None)

    def kept_blocks(self, cfg: TLSConfig, n_blocks: int) -> int:
        """Blocks that are left of ``n_blocks``."""
        return min(round(self.times * cfg.kept_blocks), n_blocks)

    def level1_bytes(self, cfg: TLSConfig, head_dim: int, n_blocks: int, label_bytes: int) -> float:
        """What level 1 reads for a token of a context of ``n_blocks``: its share of a box, and of the labels left."""
        words = cfg.label_words(min(cfg.label_channels, head_dim))
        bits = [bits for bits in words for _ in range(32 // bits)][: self.channels or min(cfg.label_channels, head_dim)]
        read = self.kept_blocks(cfg, n_blocks) / n_blocks if self.times > 1 else 0.0
        return 2 * sum(bits) / 8 / cfg.block_size + read * label_bytes

    def keep(self, q: Tensor, index: KVIndex, cfg: TLSConfig, tokens: Tensor, scale: float | None) -> Tensor:
        """Which blocks are left, sinks and window first: bool [B, HKV, T, N].

        q [B, HQ, T, D]; tokens [B, HKV, G, T, N * block_size]: of label scores, where they are -inf alone.
        """
        b, _, t, d = q.shape
        hkv, group, n = tokens.shape[1], tokens.shape[2], index.n_blocks
        scores = box_scores(
            index.labels, q.reshape(b, hkv, group * t, d), cfg.block_size, radius=self.radius, channels=self.channels
        )
        scores = scores.view(b, hkv, group, t, n) * (d**-0.5 if scale is None else scale)
        own = query_positions(index.seq_lens, t)[:, None, None, :, None] // cfg.block_size
        # The newest block's box may span tokens later than the query: it is kept anyway, so leave it unscored
        unseen = selection.label_block_scores(tokens, cfg).isneginf() | (torch.arange(n, device=q.device) >= own)
        ranks = selection.block_ranks(scores.masked_fill(unseen, -torch.inf), index, cfg)
        best, order = ranks.sort(dim=-1, descending=True, stable=True)
        k = self.kept_blocks(cfg, n)
        return torch.zeros_like(ranks, dtype=torch.bool).scatter(-1, order[..., :k], best[..., :k] > -torch.inf)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside, :func:`flex_tls.selection.select` sees no label of a block that is not left."""
        whole = selection.level_scores

        def level_scores(q: Tensor, index: KVIndex, cfg: TLSConfig, *mods_and_scale: Any) -> tuple[Tensor, Tensor]:
            scores, few = whole(q, index, cfg, *mods_and_scale)
            left = self.keep(q, index, cfg, few, mods_and_scale[-1])[:, :, None].repeat_interleave(cfg.block_size, -1)
            return scores.masked_fill(~left, -torch.inf), few.masked_fill(~left, -torch.inf)

        with patch.object(selection, "level_scores", level_scores):
            yield


def box_scores(
    labels: TokenLabels, q: Tensor, block_size: int, *, radius: float, channels: int | None = None
) -> Tensor:
    """What blocks' boxes promise of their label scores: q [B, HKV, R, D] -> float32 [B, HKV, R, N], unscaled.

    Of what a query asks, a, in the labels' own rounding: ``a . middle + radius * |a| . half-width``. With radius 1 and
    all channels never below the best of :meth:`TokenLabels.scores` in the block, not by one bit: sums of integers.
    """
    base, unit, asked = labels.ask(q)
    base, asked = base[..., :channels].sum(-1, keepdim=True), asked[..., :channels]
    codes = labels.unpack(labels.codes, asked.shape[-1]).float()
    least, most = codes.view(*codes.shape[:-1], -1, block_size).aminmax(dim=-1)
    scores: Tensor = base + unit * (asked @ (least + most) + radius * (asked.abs() @ (most - least))) / 2
    return scores
