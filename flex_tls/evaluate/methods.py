"""Every method that is compared, as a ``TLSConfig``: run by the same operator, but for dense attention and eviction."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Any, NamedTuple

from ..config import TLSConfig

DENSE = "dense"
EVICTION = "h2o"


@dataclass(frozen=True)
class Method:
    """One column of a comparison.

    Attributes:
        name: as it was asked for.
        cfg: None for dense attention.
        evicts: what falls out of the token budget is gone for good (see :mod:`.eviction`).
    """

    name: str
    cfg: TLSConfig | None
    evicts: bool = False

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration as plain values."""
        return None if self.cfg is None else asdict(self.cfg)


def kept_tokens(cfg: TLSConfig) -> int:
    """Tokens that a KV head attends to once the context is longer: what budgets of methods are made equal in."""
    return cfg.block_budget if cfg.token_budget is None else cfg.token_budget


class Cost(NamedTuple):
    """Bytes of a sparse layer as shares of the bytes of its keys and values, all in 16 bits; labels as they are.

    Attributes:
        index_share: what is held to select.
        read_share: what one decode step reads: index, and keys and values of the tokens attended to.
    """

    index_share: float
    read_share: float


def cost(method: Method, head_dim: int, context_tokens: int) -> Cost:
    """What a method holds and reads at a context of this length, by counting; every score it needs is read once.

    An oracle reads all keys. Labels of candidates are read again at level 2. H2O's running weights, one number a token,
    and which tokens are kept are not counted.
    """
    cfg = method.cfg
    if cfg is None:
        return Cost(0.0, 1.0)
    key, token = 2 * head_dim, 4 * head_dim
    exact = cfg.index == "oracle"
    label = key if exact else label_bytes(cfg, cfg.label_channels, head_dim)
    per_block = {"quest": 2 * key, "box": 2 * key, "mean": key}.get(cfg.index)
    coarse = label_bytes(cfg, cfg.filter_dims or cfg.label_channels, head_dim) if per_block is None else 0.0
    coarse = key if exact else coarse if per_block is None else per_block / cfg.block_size
    forced_alone = method.evicts or cfg.token_budget == cfg.sink_tokens + cfg.recent_tokens
    has_level_1 = cfg.block_budget < context_tokens and not forced_alone
    has_level_2 = cfg.token_budget is not None and cfg.token_budget < cfg.block_budget and not forced_alone
    candidates = min(cfg.block_budget, context_tokens)
    by_labels = per_block is None
    held = (label if has_level_2 or (has_level_1 and by_labels) else 0.0) + (
        coarse if has_level_1 and not by_labels else 0.0
    )
    read = (coarse * context_tokens if has_level_1 else 0.0) + (label * candidates if has_level_2 else 0.0)
    read += token * min(kept_tokens(cfg), context_tokens)
    return Cost(held / token, read / (token * context_tokens))


def label_bytes(cfg: TLSConfig, dims: int, head_dim: int) -> int:
    """Bytes of the first ``dims`` channels of a label, in whole 32-bit words."""
    return len(cfg.label_words(min(dims, head_dim))) * 4


def _ours(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """The configuration as given."""
    return cfg


def _tokens(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Level 2 alone: every block passes level 1."""
    return replace(cfg, block_budget=context_tokens, token_budget=kept_tokens(cfg))


def _blocks(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Level 1 alone, at the token budget; never fewer blocks than sinks and recent window touch."""
    least = cfg.forced_blocks * cfg.block_size
    return replace(cfg, block_budget=max(kept_tokens(cfg), least), token_budget=None)


def _oracle(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Exact scores at both levels: what the proxies could reach at most, near enough."""
    return replace(cfg, index="oracle")


def _quest(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Quest (arXiv 2406.10774): whole blocks by the min/max bound. Its best group reduction here is the maximum."""
    return replace(_blocks(cfg, context_tokens), index="quest", group_reduce="max")


def _quest_wide(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Quest at the block budget: it attends to more tokens than the others."""
    return replace(cfg, index="quest", group_reduce="max", token_budget=None)


def _window(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Sinks and the newest tokens alone (StreamingLLM, arXiv 2309.17453): the window takes the whole token budget."""
    kept = kept_tokens(cfg)
    # Replaced one by one each would break the rules of the others
    window = replace(cfg, block_budget=context_tokens, token_budget=kept, recent_tokens=kept - cfg.sink_tokens)
    return replace(window, block_budget=window.forced_blocks * window.block_size)


def _double_sparsity(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Double Sparsity (arXiv 2408.07092): every token by its heaviest channels, here fitted on the prompt."""
    return replace(_tokens(cfg, context_tokens), label_basis="channels")


def _quest_double_sparsity(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """Quest's blocks, then Double Sparsity's tokens inside them: the literature's two levels.

    Half the label's channels, since blocks have bytes of their own (with heads of 64 and blocks of 32 as many).
    """
    return replace(
        cfg, index="quest", group_reduce="max", label_basis="channels", label_dims=max(cfg.label_channels // 2, 1)
    )


def _h2o(cfg: TLSConfig, context_tokens: int) -> TLSConfig:
    """H2O (arXiv 2306.14048): half the budget for the newest tokens, half for those attended to most so far."""
    kept = kept_tokens(cfg)
    halves = replace(cfg, block_budget=context_tokens, token_budget=kept, sink_tokens=0, recent_tokens=kept // 2)
    return replace(halves, block_budget=max(context_tokens, halves.forced_blocks * cfg.block_size))


# From the user's configuration and the longest context to the method's own configuration
METHODS: dict[str, Callable[[TLSConfig, int], TLSConfig]] = {
    "ours": _ours,
    "blocks": _blocks,
    "tokens": _tokens,
    "quest": _quest,
    "quest_wide": _quest_wide,
    "quest_labels": lambda cfg, _: replace(cfg, index="quest"),
    "double_sparsity": _double_sparsity,
    "quest_double_sparsity": _quest_double_sparsity,
    EVICTION: _h2o,
    "window": _window,
    "oracle": _oracle,
    "oracle_blocks": lambda cfg, n: _oracle(_blocks(cfg, n), n),
    "oracle_tokens": lambda cfg, n: _oracle(_tokens(cfg, n), n),
}


def make_method(spec: str, cfg: TLSConfig, context_tokens: int) -> Method:
    """A method by name, with settings if wanted: ``"quest"``, ``"ours:label_dims=16:label_bits=8"``.

    Args:
        spec: a name of :data:`METHODS` or ``"dense"``, then fields of :class:`flex_tls.TLSConfig` to change in it. A
            value such as ``x2`` or ``x1/2`` is a multiple of the method's own.
        cfg: the budgets, and everything that the method leaves as it is.
        context_tokens: longest context that will be met.

    Raises:
        ValueError: names the unknown method or setting, or what the configuration says of itself.
    """
    name, *settings = spec.split(":")
    if name == DENSE and not settings:
        return Method(DENSE, None)
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join((DENSE, *METHODS))}, got {name!r}")
    # Of blocks that a method is made for: a window's budget is whole blocks
    size = next((x.partition("=")[2] for x in settings if x.startswith("block_size=")), "")
    made = METHODS[name](replace(cfg, block_size=int(size)) if size.isdigit() else cfg, context_tokens)
    known = {field.name for field in fields(TLSConfig)}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"method: expected settings FIELD=VALUE of TLSConfig ({', '.join(known)}), got {setting!r}"
            )
        changes[key] = _value(text, getattr(made, key))
    return Method(spec, replace(made, **changes), evicts=name == EVICTION)


def _value(text: str, before: object) -> object:
    """A number or None as Python writes it, numbers as ``0+8``, a multiple of the number before; else it is a word."""
    parts = text.split("+")
    if len(parts) > 1 and all(part.replace(".", "", 1).isdigit() for part in parts):
        return tuple(map(ast.literal_eval, parts))
    if text.startswith("x") and isinstance(before, int):
        try:
            return int(before * Fraction(text[1:]))
        except (ValueError, ZeroDivisionError):
            return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
