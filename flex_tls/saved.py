"""A cache on disk: read a long document once, answer questions about it from many processes later.

A folder: ``cache.json`` says what it is, ``rows.safetensors`` which columns are tokens, ``layer_00012.safetensors``
holds a layer's keys, values and index. Layers are written and read one by one.

Keys and values are in the model's dtype, whatever held them: those of an int8 store go back into one unchanged.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cache_layer import TLSLayer
from .config import TLSConfig
from .index import KVIndex
from .offloaded_layer import OffloadedLayer

if TYPE_CHECKING:
    from .cache import TLSCache

FORMAT = "flex_tls.TLSCache"
VERSION = 1
_COUNTS = ("max_len", "fitted_tokens", "observed_tokens")


def save(cache: TLSCache, path: str | Path) -> None:
    """Write ``cache`` to the folder ``path``, which must not be there yet and appears when it is whole."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"path: expected a name that is free, got {path}, which exists; remove it or choose another")
    layers = cache.tls_layers
    if not all(layer.is_initialized for layer in layers):
        raise ValueError("cache: expected one that holds tokens, got one without buffers; read a prompt first")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        described = {
            "format": FORMAT,
            "version": VERSION,
            "config": asdict(cache.cfg),
            "shape": _shape(cache),
            "dtype": str(cache.dtype).removeprefix("torch."),
            "batch_size": cache.batch_size,
            "max_len": cache.max_len,
            "columns": cache.get_seq_length(),
            "lens": cache.seq_lens,
            "indexes": [None if x.index is None else {n: getattr(x.index, n) for n in _COUNTS} for x in layers],
        }
        save_file(cache.progress.tensors(), part / "rows.safetensors")
        for layer in layers:
            save_file(_state(layer, max(cache.seq_lens)), part / _name(layer.layer_idx))
        (part / "cache.json").write_text(json.dumps(described, indent=1))
        part.rename(path)
    except SafetensorError as error:
        # What the library makes of a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def describe(path: str | Path) -> dict[str, Any]:
    """What ``cache.json`` says, checked.

    Raises:
        ValueError: no folder that :func:`save` wrote, or by a later version.
    """
    path = Path(path)
    try:
        found: Any = json.loads((path / "cache.json").read_text())
        known = isinstance(found, dict) and found.get("format") == FORMAT
    except (OSError, ValueError) as error:
        raise ValueError(f"path: expected a folder that TLSCache.save wrote, got {path} ({error})") from error
    if not known:
        raise ValueError(f"path: expected a folder that TLSCache.save wrote, got {path}, whose cache.json is another's")
    if found["version"] != VERSION:
        raise ValueError(f"path: expected version {VERSION} of the format, got {found['version']}; update flex_tls")
    result: dict[str, Any] = found
    return result


def fill(cache: TLSCache, path: str | Path, found: dict[str, Any]) -> None:
    """Read the folder into ``cache``, which is empty, allocated, and of the model and batch size that was saved.

    Raises:
        ValueError: another model, a file that is missing, damaged or not what ``cache.json`` says.
    """
    path = Path(path)
    shape = _shape(cache)
    if found["shape"] != shape:
        raise ValueError(
            f"model_config: expected the model that the cache was saved with, {found['shape']}, got {shape}"
        )
    n = max(found["lens"])
    cache.progress.restore(found["columns"], found["lens"], _read(path / "rows.safetensors"))
    for layer, counts in zip(cache.tls_layers, found["indexes"], strict=True):
        file = path / _name(layer.layer_idx)
        saved = _read(file)

        def checked(name: str, like: Tensor, saved: dict[str, Tensor] = saved, file: Path = file) -> Tensor:
            new = saved.get(name)
            if new is None or new.shape != like.shape or new.dtype != like.dtype:
                got = "nothing" if new is None else f"{new.dtype} {tuple(new.shape)}"
                raise ValueError(
                    f"path: expected {name} {like.dtype} {tuple(like.shape)} in {file}, got {got}; the file is "
                    "damaged or of another cache"
                )
            return new

        held = layer.on_device()[0]
        like = held.new_empty(*held.shape[:2], n, held.shape[3], device="meta")
        layer.restore(checked("keys", like), checked("values", like))
        for name, buffer in _views(layer.index, n).items():
            buffer.copy_(checked(name, buffer))
        for name, value in (counts or {}).items():
            setattr(layer.index, name, value)
        if isinstance(layer, OffloadedLayer) and "last_queries" in saved:
            layer.remember(saved["last_queries"].to(layer.on_device()[0].device), float(saved["scale"]))


def config_of(found: dict[str, Any]) -> TLSConfig:
    """The configuration that was saved."""
    return TLSConfig(**found["config"])


def _state(layer: TLSLayer, n_tokens: int) -> dict[str, Tensor]:
    keys, values = layer.held(n_tokens)
    views = {"keys": keys, "values": values, **_views(layer.index, n_tokens)}
    state = {name: x.contiguous() for name, x in views.items()}
    if isinstance(layer, OffloadedLayer) and layer.last_queries is not None:
        state["last_queries"] = layer.last_queries.contiguous()
        state["scale"] = torch.tensor(layer.scale, dtype=torch.float64)
    return state


def _views(index: KVIndex | None, n_tokens: int) -> dict[str, Tensor]:
    """The part of the index's every buffer that ``n_tokens`` tokens fill."""
    if index is None:
        return {}
    labels = index.labels.tensors
    views = {f"labels.{name}": x[..., :n_tokens] if name == "codes" else x for name, x in labels.items()}
    views["seq_lens"] = index.seq_lens
    if index.summary is not None:
        n_blocks = -(-n_tokens // index.cfg.block_size)
        views |= {f"summary.{name}": x[:, :, :n_blocks] for name, x in index.summary.tensors.items()}
    return views


def _shape(cache: TLSCache) -> dict[str, Any]:
    shape = cache.shape
    return {
        "layers": shape.n_layers,
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "windows": list(shape.windows),
    }


def _name(layer_idx: int) -> str:
    return f"layer_{layer_idx:05d}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: expected {file} to be whole, got {error}; save the cache again") from error
    return tensors
