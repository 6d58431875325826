"""Every method that is compared is a ``TLSConfig``, run by the same operator; dense is the model's own attention."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..config import TLSConfig

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """One column of a comparison. ``name``: as it was asked for; ``cfg``: None for dense attention."""

    name: str
    cfg: TLSConfig | None

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration as plain values."""
        return None if self.cfg is None else asdict(self.cfg)


def kept_tokens(cfg: TLSConfig) -> int:
    """Tokens that a KV head attends to once the context is longer: what budgets of methods are made equal in."""
    return cfg.block_budget if cfg.token_budget is None else cfg.token_budget


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


# From the user's configuration and the longest context to the method's own configuration
METHODS: dict[str, Callable[[TLSConfig, int], TLSConfig]] = {
    "ours": _ours,
    "blocks": _blocks,
    "tokens": _tokens,
    "quest": _quest,
    "quest_wide": _quest_wide,
    "quest_labels": lambda cfg, _: replace(cfg, index="quest"),
    "window": _window,
    "oracle": _oracle,
    "oracle_blocks": lambda cfg, n: _oracle(_blocks(cfg, n), n),
    "oracle_tokens": lambda cfg, n: _oracle(_tokens(cfg, n), n),
}


def make_method(spec: str, cfg: TLSConfig, context_tokens: int) -> Method:
    """A method by name, with settings if wanted: ``"quest"``, ``"ours:label_dims=16:label_bits=8"``.

    Args:
        spec: a name of :data:`METHODS` or ``"dense"``, then fields of :class:`flex_tls.TLSConfig` to change in it.
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
    known = {field.name for field in fields(TLSConfig)}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key not in known or not equals:
            raise ValueError(
                f"method: expected settings FIELD=VALUE of TLSConfig ({', '.join(known)}), got {setting!r}"
            )
        changes[key] = _value(text)
    return Method(spec, replace(METHODS[name](cfg, context_tokens), **changes))


def _value(text: str) -> object:
    """A number or None as Python writes it; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
