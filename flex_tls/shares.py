"""How the layers of a model should share out their block budgets, measured on a text.

Some layers attend to a few blocks, others to many. One threshold of estimated attention, for blocks of all layers, has
.7 times the KL of equal budgets at the same total (docs/design.md, section 6), and what it gives a layer depends more
on the model than on the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import TLSCache
from .config import TLSConfig
from .index import KVIndex
from .integrations.huggingface import enabled
from .mods import MaskMod
from .prefill import read_prompt
from .record import Recorder
from .selection import BlockSelection, TokenSelection, block_ranks, block_scores, level_scores

# Shares are multiples of 1 / STEPS: a compiled backend compiles for every number of blocks that it meets
STEPS = 4
# Of the equal budget: what the default pool of an offloaded cache holds
MOST = 2.0


def measure_block_shares(
    model: Any, input_ids: Tensor, cfg: TLSConfig, *, last_tokens: int = 64, progress: bool = False
) -> tuple[float, ...]:
    """``TLSConfig.block_shares`` for ``model``, from what the last tokens of a long text ask for.

    Decodes the last tokens, teacher-forced, with ``cfg``; measure on a text like those to come, at their length, or
    average over several.

    Args:
        model: a Hugging Face model that :func:`flex_tls.enable` takes.
        input_ids: int64 [B, S], without padding.
        cfg: the budgets to come; its own ``block_shares`` count for nothing.
        last_tokens: tokens that are decoded.
        progress: show a bar while the text is read.

    Returns:
        A multiple of 1/4 for every layer, between 1/4 and 2, with mean 1 over the layers that are not dense; 1 for
        those that are.

    Raises:
        ValueError: a text that the budgets hold whole, or fewer than two tokens to decode.
    """
    b, n = input_ids.shape
    if last_tokens < 2 or n - last_tokens <= cfg.dense_up_to_tokens:
        raise ValueError(
            f"input_ids: expected more than {cfg.dense_up_to_tokens + max(last_tokens, 2):,} tokens, what the budgets "
            f"hold and at least 2 last_tokens, got {n:,} and last_tokens={last_tokens}"
        )
    cfg = replace(cfg, block_shares=None)
    device = input_ids.device
    cache = TLSCache(
        model.config, cfg, batch_size=b, max_len=n, dtype=model.dtype, device=device,
        backend="auto" if device.type == "cuda" else "reference",
    )  # fmt: skip
    notes = _Notes(cfg)
    try:
        with torch.no_grad(), enabled(model):
            read_prompt(model, cache, input_ids[:, :-last_tokens], progress=progress)
            cache.recorder = notes
            read_prompt(model, cache, input_ids, chunk_tokens=cfg.sparse_query_tokens)
    finally:
        cache.close()
    layers = [i for i in range(cache.shape.n_layers) if not cfg.is_dense(i)]
    shares = dict(zip(layers, share_out([notes.mass[i] for i in layers], cfg.kept_blocks), strict=True))
    return tuple(shares.get(i, 1.0) for i in range(cache.shape.n_layers))


def share_out(mass: Sequence[Sequence[Tensor]], kept_blocks: int) -> list[float]:
    """A share for each layer, with mean 1, of estimated attention [..., N] of its blocks, +inf where always kept.

    The threshold is the one above which layers have ``kept_blocks`` blocks on average.
    """
    most = int(MOST * kept_blocks)

    def counts(threshold: float) -> list[float]:
        return [
            sum(float((x >= threshold).sum(-1).clamp(max=most).double().sum()) for x in layer)
            / sum(x[..., 0].numel() for x in layer)
            for layer in mass
        ]

    low, high = -40.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = sum(counts(2.0**middle)) >= kept_blocks * len(mass)
        low, high = (middle, high) if enough else (low, middle)
    exact = [x * STEPS / kept_blocks for x in counts(2.0**low)]
    steps = [min(max(int(x), 1), int(MOST * STEPS)) for x in exact]
    # What rounding took goes to the layers that it took most from, what it gave comes from where it gave most
    while (left := STEPS * len(mass) - sum(steps)) != 0:
        sign = 1 if left > 0 else -1
        free = [i for i, x in enumerate(steps) if 1 <= x + sign <= MOST * STEPS]
        steps[max(free, key=lambda i: (sign * (exact[i] - steps[i]), -i))] += sign
    return [x / STEPS for x in steps]


class _Notes(Recorder):
    """Keeps each layer's estimated attention by block, float32 [B, HKV, T, N]."""

    def __init__(self, cfg: TLSConfig) -> None:
        super().__init__()
        # Shares of attention, which layers can be compared by
        self._cfg = replace(cfg, group_reduce="softmax_mean")
        self.mass: dict[int, list[Tensor]] = {}

    def add_sparse(
        self, layer: int, q: Tensor, k: Tensor, index: KVIndex, blocks: BlockSelection, tokens: TokenSelection, *,
        n_tokens: int, scale: float, mask_mod: MaskMod | None = None,
    ) -> None:  # fmt: skip
        cfg = self._cfg
        few = None if index.summary is not None else level_scores(q, index, cfg, None, mask_mod, scale)[1]
        scores = block_scores(q, index, cfg, few, mask_mod, scale)
        self.mass.setdefault(layer, []).append(block_ranks(scores, index, cfg))
