"""What two-level attention keeps, and how its index is built: one frozen, validated object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

IndexKind = Literal["lowrank", "box", "quest", "mean", "oracle"]
LabelBasis = Literal["lowrank", "channels"]
GroupReduce = Literal["softmax_mean", "softmax_max", "max", "mean"]
BlockReduce = Literal["max", "logsumexp"]

# A label channel's bits
LABEL_BITS = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class TLSConfig:
    """Settings of two-level attention. Every budget counts tokens per KV head and query token.

    Attributes:
        block_size: tokens per block; 16, 32, 64 or 128. Twice as many lose some 1.6 times as much (KL), and spare each
            layer a microsecond at batch size 1, eight at 16 (docs/design.md).
        block_budget: tokens kept by the block filter (level 1), sinks and recent window included.
        token_budget: tokens kept inside those blocks (level 2), sinks and recent window included;
            ``None`` keeps every token of the kept blocks.
        sink_tokens: first tokens of the sequence, always kept.
        recent_tokens: newest tokens, the query's own included, always kept; at least 1.
        index: how level 1 scores a block. ``"lowrank"``: best label score of its tokens (default);
            ``"quest"``: upper bound from per-channel min and max (Quest, arXiv 2406.10774);
            ``"box"``: the same with the radius damped by ``box_radius``; ``"mean"``: mean key;
            ``"oracle"``: exact keys kept as labels, for tests and upper bounds.
        label_dims: channels of a token label, if they have one width; a label takes whole 32-bit words.
        label_bits: bits per label channel, 2, 4 or 8; or those of each 32-bit word, which are full then, whatever
            ``label_dims``: ``(4, 2)`` is 8 channels of 4 bits and then 16 of 2, in 8 bytes. The leading channels weigh
            most, and are worth more bits. Never more channels (C) than the head dimension.
        label_basis: what a label's channels are. ``"lowrank"``: directions fitted to keys and queries (default);
            ``"channels"``: the key's own channels of the largest products with queries (Double Sparsity,
            arXiv 2408.07092, with the prompt for calibration).
        filter_dims: leading channels of a label that level 1 reads, whole 32-bit words; all (None) by default. Half of
            them halve the bytes of level 1, which reads every label; level 2 reads whole labels of few tokens.
        block_reduce: how ``"lowrank"`` and ``"oracle"`` turn token scores into a block score.
        box_radius: share of a box's half-width that counts; 1 is Quest's bound, 0 its mid-point.
        group_reduce: how the query heads of one KV head agree. ``"softmax_mean"``/``"softmax_max"``: mean or largest of
            the heads' softmax; ``"max"``/``"mean"``: of the raw scores.
        dense_layers: layers of a model that stay dense: how many of the first, or which ones (used by ``TLSCache``, not
            by the operator).
        block_shares: what each layer of a model keeps of ``block_budget``, relative to the others, a number for every
            layer; 1 everywhere (None) by default. Measured by :func:`flex_tls.measure_block_shares`; used by
            ``TLSCache``, the operator takes ``cfg.for_layer(layer)``. A compiled backend compiles for every number of
            blocks that it meets.
        sparse_query_tokens: chunks of more query tokens than this attend densely in a model (prefill).
        sparse_from_tokens: contexts of fewer tokens attend densely in a model, whatever the budgets; in short ones
            reading everything is faster (up to some 20,000 tokens at batch size 1 on an H100; docs/design.md). Used by
            ``TLSCache``, without offload.
    """

    block_size: int = 16
    block_budget: int = 8192
    token_budget: int | None = 1024
    sink_tokens: int = 64
    recent_tokens: int = 64
    index: IndexKind = "lowrank"
    label_dims: int = 32
    label_bits: int | tuple[int, ...] = 4
    label_basis: LabelBasis = "lowrank"
    filter_dims: int | None = None
    block_reduce: BlockReduce = "max"
    box_radius: float = 0.35
    group_reduce: GroupReduce = "softmax_mean"
    dense_layers: int | tuple[int, ...] = 2
    block_shares: tuple[float, ...] | None = None
    sparse_query_tokens: int = 16
    sparse_from_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "block_budget", "token_budget", "filter_dims"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name in ("token_budget", "filter_dims")):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
        self._choice("block_size", (16, 32, 64, 128))
        self._check_labels()
        self._choice("index", get_args(IndexKind))
        self._choice("label_basis", get_args(LabelBasis))
        self._choice("group_reduce", get_args(GroupReduce))
        self._choice("block_reduce", get_args(BlockReduce))
        self._at_least("sink_tokens", 0)
        self._at_least("recent_tokens", 1)
        self._check_dense_layers()
        self._check_block_shares()
        self._at_least("sparse_query_tokens", 1)
        self._at_least("sparse_from_tokens", 0)
        if not 0.0 <= self.box_radius <= 1.0:
            raise ValueError(f"box_radius: expected a share between 0 and 1, got {self.box_radius}")
        least = self.forced_blocks * self.block_size
        if self.block_budget < least:
            raise ValueError(
                f"block_budget: expected at least {least} tokens ({self.forced_blocks} blocks of {self.block_size} "
                f"hold sink_tokens={self.sink_tokens} and recent_tokens={self.recent_tokens}), got {self.block_budget}"
                "; raise the budget or keep fewer sinks and recent tokens"
            )
        if self.token_budget is not None:
            forced = self.sink_tokens + self.recent_tokens
            if self.token_budget < forced:
                raise ValueError(
                    f"token_budget: expected at least sink_tokens + recent_tokens = {forced}, got {self.token_budget}; "
                    "raise the budget or keep fewer sinks and recent tokens"
                )
            if self.token_budget > self.block_budget:
                raise ValueError(
                    f"token_budget: expected at most block_budget = {self.block_budget}, got {self.token_budget}; "
                    "level 2 chooses inside what level 1 kept (None keeps all of it)"
                )

    @property
    def label_channels(self) -> int:
        """C, before it is cut to the head dimension."""
        return self.label_dims if isinstance(self.label_bits, int) else sum(32 // bits for bits in self.label_bits)

    def label_words(self, n_channels: int) -> tuple[int, ...]:
        """Bits of a channel in each 32-bit word of a label's leading ``n_channels``."""
        if isinstance(self.label_bits, int):
            return (self.label_bits,) * -(-n_channels * self.label_bits // 32)
        before = accumulate((32 // bits for bits in self.label_bits), initial=0)
        return tuple(bits for bits, begin in zip(self.label_bits, before, strict=False) if begin < n_channels)

    @property
    def forced_blocks(self) -> int:
        """Most blocks that sinks and recent window can touch: the window may straddle one more boundary."""
        sinks = -(-self.sink_tokens // self.block_size)
        return sinks + -(-(self.recent_tokens - 1) // self.block_size) + 1

    @property
    def kept_blocks(self) -> int:
        """K: blocks that the block budget pays for."""
        return self.block_budget // self.block_size

    @property
    def held_tokens(self) -> int:
        """Longest context of which the budgets drop nothing, so that dense attention gives the same result."""
        if self.block_shares is not None:
            layers = [i for i in range(len(self.block_shares)) if not self.is_dense(i)]
            return min((self.for_layer(i).held_tokens for i in layers), default=0)
        held = self.kept_blocks * self.block_size
        return held if self.token_budget is None else min(held, self.token_budget)

    @property
    def dense_up_to_tokens(self) -> int:
        """Longest context that attends densely in a model: held by the budgets, or below ``sparse_from_tokens``."""
        return max(self.held_tokens, self.sparse_from_tokens - 1)

    def is_dense(self, layer: int) -> bool:
        """Whether this layer of a model stays dense."""
        return layer < self.dense_layers if isinstance(self.dense_layers, int) else layer in self.dense_layers

    def for_layer(self, layer: int) -> TLSConfig:
        """The configuration of one layer of a model: its share of the block budget, in whole blocks.

        At least what sinks, recent window and ``token_budget`` need, whatever the share.
        """
        if self.block_shares is None:
            return self
        if not 0 <= layer < len(self.block_shares):
            last = len(self.block_shares) - 1
            raise ValueError(f"layer: expected 0 to {last}, the layers of block_shares, got {layer}")
        blocks = round(self.block_budget * self.block_shares[layer] / self.block_size)
        least = max(self.forced_blocks, -(-(self.token_budget or 0) // self.block_size))
        return replace(self, block_budget=max(blocks, least) * self.block_size, block_shares=None)

    def _check_block_shares(self) -> None:
        if self.block_shares is None:
            return
        shares = tuple(self.block_shares)
        if not shares or any(not isinstance(x, int | float) or not 0 < x < math.inf for x in shares):
            raise ValueError(f"block_shares: expected a number above 0 for every layer, got {self.block_shares!r}")
        # A tuple also if it came from JSON
        object.__setattr__(self, "block_shares", tuple(map(float, shares)))

    def _check_labels(self) -> None:
        given = self.label_bits
        widths = tuple(given) if isinstance(given, tuple | list) else (given,)
        for bits in widths:
            if not isinstance(bits, int) or bits not in LABEL_BITS:
                raise ValueError(f"label_bits: expected one of {', '.join(map(str, LABEL_BITS))}, got {bits!r}")
        if not widths:
            raise ValueError("label_bits: expected the bits of at least one word, got ()")
        # A tuple also if it came from JSON
        object.__setattr__(self, "label_bits", given if isinstance(given, int) else widths)
        self._at_least("label_dims", 1)
        dims = self.label_channels
        ends = tuple(min(end, dims) for end in accumulate(32 // bits for bits in self.label_words(dims)))
        if self.filter_dims is not None and self.filter_dims not in ends:
            raise ValueError(
                f"filter_dims: expected one of {', '.join(map(str, ends))}, the leading of {dims} channels in whole "
                f"32-bit words, got {self.filter_dims}; None reads all of them"
            )

    def _check_dense_layers(self) -> None:
        if isinstance(self.dense_layers, int):
            self._at_least("dense_layers", 0)
            return
        layers = tuple(self.dense_layers)
        if any(not isinstance(x, int) or x < 0 for x in layers):
            raise ValueError(f"dense_layers: expected a count or layer numbers from 0 on, got {self.dense_layers!r}")
        # Sorted, and a tuple also if it came from JSON: equal settings are equal objects
        object.__setattr__(self, "dense_layers", tuple(sorted(set(layers))))

    def _choice(self, field: str, allowed: tuple[object, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{field}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")

    def _at_least(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{field}: expected an integer of at least {least}, got {value!r}")
