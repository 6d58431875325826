"""What the cache needs to know of a Hugging Face model's configuration, and which models it can serve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

SUPPORTED = "llama, qwen2, qwen3, mistral and other decoder models of the GQA family"


class ModelShape(NamedTuple):
    """A decoder's attention layers. ``windows[i]``: layer i's sliding window in tokens, None for full attention."""

    model_type: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    dtype: torch.dtype


def read_model_config(config: Any) -> ModelShape:
    """Shape of the model that ``config`` (transformers' ``PreTrainedConfig``) describes.

    Raises:
        ValueError: a model that two-level attention cannot serve; says which it is, why, and what is supported.
    """
    model_type = str(getattr(config, "model_type", None) or type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise unsupported(model_type, "is an encoder-decoder")
    if hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config:
        raise unsupported(model_type, "holds several models (vision, audio); their language model alone may do")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise unsupported(model_type, "caches latents (multi-head latent attention)")
    for field in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"):
        if not isinstance(getattr(config, field, None), int):
            raise unsupported(model_type, f"has no {field} in its configuration")
    if getattr(config, "num_kv_shared_layers", None):
        raise unsupported(model_type, "shares keys and values between layers")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise unsupported(model_type, "caps its attention scores")
    n_layers = config.num_hidden_layers
    return ModelShape(
        model_type=model_type,
        n_layers=n_layers,
        n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        windows=_windows(config, model_type, n_layers),
        dtype=getattr(config, "dtype", None) or torch.get_default_dtype(),
    )


def unsupported(model_type: str, why: str) -> ValueError:
    """The error for a model that cannot be served."""
    return ValueError(f"model: expected one of {SUPPORTED}, got {model_type!r}, which {why}")


def _windows(config: Any, model_type: str, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        # Mistral: one window for all layers, or none
        types = ["full_attention" if window is None else "sliding_attention"] * n_layers
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    if other:
        raise unsupported(model_type, f"has layers of other kinds ({', '.join(other)})")
    if "sliding_attention" in types and not isinstance(window, int):
        raise unsupported(model_type, f"has sliding layers without a window (sliding_window={window!r})")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
