"""Named sets of methods: the comparison, the ablation of every component, and the frontier of index bytes."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TLSConfig
from .methods import DENSE, Method, make_method

BASE = "ours"

COMPARISON = (
    BASE, "blocks", "tokens", "quest", "quest_wide", "quest_labels", "double_sparsity", "quest_double_sparsity", "h2o",
    "window", "oracle", "oracle_blocks", "oracle_tokens",
)  # fmt: skip

# One component after the other, everything else as in "ours"; what equals "ours" falls out
ABLATION: dict[str, tuple[str, ...]] = {
    "index": ("index=oracle", "index=box", "index=quest:group_reduce=max", "index=mean"),
    "label channels": tuple(f"label_dims={n}" for n in (8, 16, 24, 32, 48, 64)),
    "label bits": (
        "label_bits=2",
        "label_bits=4",
        "label_bits=8",
        "label_bits=4+2",
        "label_bits=4+4+2+2",
        "label_bits=4+2+2+2:filter_dims=24",
    ),
    "label basis": ("label_basis=channels",),
    "channels that level 1 reads": ("filter_dims=8", "filter_dims=16", "filter_dims=24"),
    "block size": ("block_size=16", "block_size=32", "block_size=64", "block_size=128"),
    "block score": ("block_reduce=logsumexp",),
    "group reduction": ("group_reduce=softmax_max", "group_reduce=max", "group_reduce=mean"),
    "block budget": ("block_budget=x1/2", "block_budget=x2", "block_budget=x4"),
    "token budget": ("token_budget=x1/4", "token_budget=x1/2", "token_budget=x2", "token_budget=None"),
    "sinks": ("sink_tokens=0", "sink_tokens=4", "sink_tokens=32", "sink_tokens=128"),
    "recent window": ("recent_tokens=1", "recent_tokens=32", "recent_tokens=128"),
    "dense layers": ("dense_layers=0", "dense_layers=1", "dense_layers=0+8", "dense_layers=4"),
}

# Bytes of the index against what is lost, at equal budgets
FRONTIER = (
    *(f"ours:label_dims={dims}:label_bits={bits}" for dims in (8, 16, 24, 32, 48, 64) for bits in (2, 4, 8)),
    *(f"ours:label_dims={dims}:block_size={size}" for dims in (8, 16, 24, 32, 48, 64) for size in (32, 64)),
    *(f"ours:label_dims={dims}:block_reduce=logsumexp" for dims in (8, 16, 24, 32, 48, 64)),
    *(f"ours:label_dims={dims}:label_basis=channels" for dims in (8, 16, 32, 64)),
    *(
        f"ours:index={kind}:label_dims={dims}"
        for kind in ("quest:group_reduce=max", "box", "mean")
        for dims in (8, 16, 32)
    ),
    *(f"ours:label_bits={bits}" for bits in ("4+2", "4+4+2", "4+2+2+2", "4+4+2+2", "4+2:block_size=32")),
    "ours:label_bits=4+2+2+2:filter_dims=24",
    "quest_double_sparsity",
    "oracle",
)

SETS: dict[str, tuple[str, ...]] = {
    "comparison": (DENSE, *COMPARISON),
    "ablation": (DENSE, BASE, *(f"{BASE}:{change}" for changes in ABLATION.values() for change in changes)),
    "frontier": (DENSE, *FRONTIER),
}


def make_methods(
    specs: Sequence[str], cfgs: Sequence[TLSConfig], context_tokens: int
) -> tuple[list[Method], list[str]]:
    """Every method under every configuration, named sets taken apart; and what of the sets does not go with one.

    Args:
        specs: as in :func:`.methods.make_method`, or names of :data:`SETS`.
        cfgs: budgets and block size.
        context_tokens: as in :func:`.methods.make_method`.

    Returns:
        The methods, of members of a set that come to the same configuration the first alone; and reasons why members of
        a set were left out (a token budget beyond the block budget, say).

    Raises:
        ValueError: a spec that names no set and cannot be made.
    """
    found: dict[tuple[str, TLSConfig | None, bool], Method] = {}
    left_out = []
    for cfg in cfgs:
        for spec in specs:
            for name in SETS.get(spec, (spec,)):
                try:
                    method = make_method(name, cfg, context_tokens)
                except ValueError as error:
                    if spec not in SETS:
                        raise
                    left_out.append(f"{name}: {error}")
                    continue
                found.setdefault(("" if spec in SETS else name, method.cfg, method.evicts), method)
    return list(found.values()), left_out


def ablation_of(base: Method, methods: Sequence[Method]) -> dict[str, dict[str, Method]]:
    """Of ``methods`` those that change one component of ``base``, in the order of :data:`ABLATION`.

    Returns:
        By component and change.
    """
    assert base.cfg is not None
    ours = {method.cfg: method for method in methods if method.name.split(":")[0] == BASE}
    found: dict[str, dict[str, Method]] = {}
    for component, changes in ABLATION.items():
        for change in changes:
            method = ours.get(_changed(f"{BASE}:{change}", base.cfg))
            if method is not None and method.cfg != base.cfg:
                found.setdefault(component, {})[change] = method
    return found


def _changed(spec: str, cfg: TLSConfig) -> TLSConfig | None:
    try:
        return make_method(spec, cfg, 1).cfg
    except ValueError:
        return None
