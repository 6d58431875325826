"""What the commands' options mean: budgets, configurations, models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..config import TLSConfig
from ..offload import OffloadConfig
from .weights import load_smollm2

BLOCK_SIZE = TLSConfig.block_size
# Sinks, and the recent window: half of TLSConfig's, since demos and evaluations have small budgets
EDGE_TOKENS = 32
BlockSize = Annotated[int, typer.Option(help="Tokens per block: 16, 32, 64 or 128.")]


def budget(text: str, context: int, name: str) -> int:
    """Tokens from a count ('2048') or a share of the context ('1/4', '0.25')."""
    try:
        over, _, under = text.partition("/")
        value = float(over) / float(under) if under else float(text)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"expected a count or a share of the context such as 1/4, got {text!r}", param_hint=name
        ) from None
    tokens = int(value * context) if under or not value.is_integer() else int(value)
    if tokens < 1:
        raise typer.BadParameter(f"expected at least 1 token, got {text!r} of {context}", param_hint=name)
    return tokens


def config(context: int, block_budget: str, token_budget: str, block_size: int) -> TLSConfig:
    """The options as a configuration for a prompt of ``context`` tokens."""
    blocks = budget(block_budget, context, "--block-budget")
    tokens = None if token_budget == "all" else budget(token_budget, context, "--token-budget")
    try:
        return TLSConfig(
            block_size=block_size,
            block_budget=blocks,
            token_budget=tokens,
            sink_tokens=EDGE_TOKENS,
            recent_tokens=EDGE_TOKENS,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def offload_config(
    policy: str, gpu_blocks: int | None, store_dtype: str, transfer: str = "kernel"
) -> OffloadConfig | None:
    """The options as an offload configuration; None for ``"none"``."""
    if policy == "none":
        for hint, is_given in (
            ("--gpu-blocks", gpu_blocks is not None), ("--store-dtype", store_dtype != "model"),
            ("--transfer", transfer != "kernel"),
        ):  # fmt: skip
            if is_given:
                raise typer.BadParameter("expected --offload with it, got none", param_hint=hint)
        return None
    try:
        return OffloadConfig(policy=policy, gpu_blocks=gpu_blocks, store_dtype=store_dtype, transfer=transfer)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--offload") from error


def load_shape(name: str, dtype: str) -> Any:
    """The model that ``name`` (see :func:`load_model`) describes, without its weights: on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, options = _source(name)
    try:
        shape = AutoConfig.from_pretrained(source, **options)
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            return make(shape, dtype=_dtype(dtype) or shape.dtype)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise typer.BadParameter(f"{name!r} could not be loaded: {error}", param_hint="--model") from error


def pick_device(device: str) -> str:
    """``"auto"`` is CUDA where there is any."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a hub id or a GGUF file, in evaluation mode.

    Args:
        name: what transformers' ``from_pretrained`` takes, or a path that ends in ``.gguf``; None for the demo's model.
        device: ``"auto"`` takes CUDA where there is any.
        dtype: ``"auto"`` takes the one that the weights are stored in.
    """
    wanted = _dtype(dtype)
    try:
        model, tokenizer = load_smollm2() if name is None else _from_pretrained(name, dtype)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise typer.BadParameter(f"{name!r} could not be loaded: {error}", param_hint="--model") from error
    model = model.to(pick_device(device))
    return (model if wanted is None else model.to(wanted)).eval(), tokenizer


def _dtype(name: str) -> torch.dtype | None:
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16, float16 or auto, got {name!r}", param_hint="--dtype")
    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})


def scale_rope(model: Any, spec: str) -> None:
    """Let a loaded model see further: ``"yarn:2"`` or ``"linear:4"``, transformers' RoPE scaling and a factor.

    Sparse and dense attention then read the same scaled keys. Only the rotary embedding changes; the weights stay.
    Not "dynamic": its frequencies grow with what was decoded before, so that methods would not meet the same keys.
    """
    kind, _, text = spec.partition(":")
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if kind not in ("yarn", "linear") or factor <= 1:
        raise typer.BadParameter(
            f"expected yarn or linear and a factor above 1, such as yarn:2, got {spec!r}", param_hint="--rope"
        )
    config, decoder = model.config, model.get_decoder()
    if not hasattr(decoder, "rotary_emb") or not isinstance(getattr(config, "rope_parameters", None), dict):
        raise typer.BadParameter("expected a model with one rotary embedding for all layers", param_hint="--rope")
    reach = config.max_position_embeddings
    config.rope_parameters = {
        **config.rope_parameters, "rope_type": kind, "factor": factor, "original_max_position_embeddings": reach,
    }  # fmt: skip
    config.max_position_embeddings = int(factor * reach)
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(model.device)


def _from_pretrained(name: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, options = _source(name)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer
