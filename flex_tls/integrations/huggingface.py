"""``enable(model)`` and ``disable(model)``: two-level attention in a Hugging Face decoder.

The model's attention implementation becomes ``"flex_tls"``, and a hook before its decoder's forward tells the
:class:`flex_tls.TLSCache` which tokens come (:meth:`flex_tls.TLSCache.begin`). No class is patched: other models, and
this one after :func:`disable`, are as before. No mask function is registered under the name: transformers then makes no
mask, the cache reads padding from the 2-D mask itself.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from ..cache import TLSCache
from ..cache_layer import TLSLayer
from ..model_config import read_model_config, unsupported
from ..step import STEP
from .automatic import CompiledForward

NAME = "flex_tls"

# Keyword arguments by which models ask for attention that is not softmax(scale * q k); None or absent elsewhere
FOREIGN = ("softcap", "s_aux", "position_bias")


@dataclass
class _Enabled:
    """What :func:`disable` needs."""

    previous: str
    handle: RemovableHandle
    # Attributes of the model that generates, as they were; None: of its class
    overridden: dict[str, Any]


def enable(model: PreTrainedModel) -> None:
    """Let ``model`` decode with two-level attention whenever it is given a :class:`flex_tls.TLSCache`.

    Prompts attend densely and causally; the cache's configuration says what is sparse. Until :func:`disable` the model
    needs a ``TLSCache`` in every forward. Does nothing if it is enabled already.

    On CUDA ``model.generate`` decodes by a compiled, captured step, in which forward hooks of your own run only while
    it is captured; ``disable_compile=True`` leaves it out.

    Raises:
        ValueError: a model that is not supported, or the decoder inside of one that generates; names it, and says what
            is expected.
    """
    decoder = _decoder(model)
    if not model.can_generate():
        raise ValueError(
            f"model: expected one that generates (...ForCausalLM), got {type(model).__name__}; enable the whole model"
        )
    if _state(decoder) is not None:
        return
    shape = read_model_config(model.config)
    layers: list[Any] = [
        m.layer_idx for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
    ]
    if sorted(layers) != list(range(shape.n_layers)) or not model._can_set_attn_implementation():
        raise unsupported(shape.model_type, "does not compute its attention through transformers' AttentionInterface")
    AttentionInterface.register(NAME, attention)
    previous = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    handle = decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    # What ``generate`` asks the model for where a cache is compileable
    own = {"get_compiled_call": _CompiledCall(model), "create_masks_for_generate": _padding_mask}
    overridden = {name: vars(model).get(name) for name in own}
    object.__setattr__(decoder, "_flex_tls", _Enabled(previous, handle, overridden))
    for name, value in own.items():
        object.__setattr__(model, name, value)


def disable(model: PreTrainedModel) -> None:
    """Give the model back as it was before :func:`enable`; does nothing if it is not enabled."""
    decoder = _decoder(model)
    state = _state(decoder)
    if state is None:
        return
    state.handle.remove()
    object.__delattr__(decoder, "_flex_tls")
    model.set_attn_implementation(state.previous)
    for name, value in state.overridden.items():
        vars(model).pop(name, None)
        if value is not None:
            object.__setattr__(model, name, value)


def end_of_sequence_ids(model: PreTrainedModel) -> list[int]:
    """The model's end-of-sequence tokens."""
    stop: Any = model.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


@contextmanager
def enabled(model: PreTrainedModel) -> Iterator[None]:
    """Enable ``model`` for a while, if it is not enabled already."""
    was = _state(_decoder(model)) is not None
    enable(model)
    try:
        yield
    finally:
        if not was:
            disable(model)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the name ``"flex_tls"``. query [B, HQ, T, D]; key is what the cache returned.

    Returns:
        Output [B, T, HQ, D], and no weights.
    """
    step = kwargs.get(STEP)
    layer = getattr(key, "_tls_layer", None) if step is None else step.layers[module.layer_idx]
    if not isinstance(layer, TLSLayer):
        raise RuntimeError("past_key_values: expected a TLSCache, got keys of another cache; call tls.disable(model)")
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: expected a 2-D padding mask, got {attention_mask.dim()} dimensions; two-level attention "
            "is causal and makes its own mask"
        )
    for name in FOREIGN:
        if kwargs.get(name) is not None:
            raise unsupported(layer.shared.shape.model_type, f"asks for attention with {name}")
    if dropout:
        raise RuntimeError(f"dropout: expected 0, got {dropout}; call model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, scale) if step is None else step.attend(layer, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


class _CompiledCall:
    """``get_compiled_call`` of a model, which it does not keep alive; a copy of the model gets one of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __call__(self, compile_config: Any) -> CompiledForward:
        """Of transformers' ``CompileConfig`` only Inductor's options say anything."""
        return CompiledForward(self._model(), None if compile_config is None else compile_config.options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _CompiledCall, (self._model(),)


def _padding_mask(*, attention_mask: Tensor, **_: Any) -> Tensor:
    """The 2-D mask as it is: the cache reads it."""
    return attention_mask


def _before_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the decoder."""
    if kwargs.get(STEP) is not None:
        return
    given = kwargs
    if args:
        given = {**kwargs, **inspect.signature(decoder.forward).bind_partial(*args).arguments}
    cache = given.get("past_key_values")
    if not isinstance(cache, TLSCache):
        raise RuntimeError(
            f"past_key_values: expected a TLSCache, got {type(cache).__name__}; pass "
            "past_key_values=tls.TLSCache(model.config, cfg, max_len=...), or call tls.disable(model)"
        )
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        # The model itself says what is missing
        return
    mask = given.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor [B, S] or None, got {type(mask).__name__}")
    if decoder.training and torch.is_grad_enabled():
        raise RuntimeError("model: expected evaluation, got training mode; call model.eval() or tls.disable(model)")
    cache.begin(mask, tokens.shape[1], tokens.shape[0])


def _decoder(model: PreTrainedModel) -> nn.Module:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    decoder = model.base_model
    assert isinstance(decoder, nn.Module)
    return decoder


def _state(decoder: nn.Module) -> _Enabled | None:
    state = getattr(decoder, "_flex_tls", None)
    return state if isinstance(state, _Enabled) else None
