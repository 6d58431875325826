"""Functions compiled once for each layout of tensors, each configuration, and each pair of a user's mods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._code import with_own_code
from .mods import MaskMod, ScoreMod

# Distinct pairs of user mods that one process may compile. More means that a mod is made anew in every step.
MAX_MODS = 64

_compiled: dict[tuple[object, ...], Callable[..., Any]] = {}


def compiled(
    function: Callable[..., Any], tensors: Sequence[Tensor], settings: tuple[object, ...], score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
) -> Callable[..., Any]:  # fmt: skip
    """``function`` compiled for these tensors' layouts, settings and mods, which are all that it may depend on.

    What a user's mods capture is looked at anew in every call.
    """
    layouts = tuple((x.dtype, x.shape, x.stride(), x.is_inference()) for x in tensors)
    device = tensors[0].device
    state = (device, layouts, torch.is_autocast_enabled(device.type))
    key = (function, state, settings, score_mod, mask_mod)
    run = _compiled.get(key)
    if run is None:
        _check_mods(score_mod, mask_mod)
        run = _compiled[key] = _compile(function, guarded=score_mod is not None or mask_mod is not None)
    return run


def _compile(function: Callable[..., Any], guarded: bool) -> Callable[..., Any]:
    """A compiled copy of ``function``, one for each key: compiled once, for good.

    Unless ``guarded`` Dynamo looks at nothing before it runs the graph: the key says it all, and guards took 0.17 ms of
    a layer's 1.1 on a CPU.
    """
    return torch.compile(
        with_own_code(function), fullgraph=True, dynamic=False,
        options={} if guarded else {"guard_filter_fn": _no_guards},
    )  # fmt: skip


def _no_guards(guards: Sequence[object]) -> list[bool]:
    return [False] * len(guards)


def _check_mods(score_mod: ScoreMod | None, mask_mod: MaskMod | None) -> None:
    known = {key[-2:] for key in _compiled}
    if (score_mod, mask_mod) not in known and len(known) >= MAX_MODS:
        raise RuntimeError(
            f"score_mod, mask_mod: {MAX_MODS} distinct pairs were compiled already; define a mod once and let it "
            "read tensors that you update in place, instead of making a new function in every step"
        )
