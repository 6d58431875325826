"""A cache on disk: read a long document once, answer questions about it from many processes later.

A folder: ``cache.json`` says what it is, ``rows.safetensors`` which columns are tokens, ``layer_00012.safetensors``
holds a layer's keys, values and index. Layers are written and read one by one. Every file bears the cache's id and its
own name, so that another's is known. What numbers the tensors hold is not checked.

Keys and values are in the model's dtype, whatever held them: those of an int8 store go back into one unchanged.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._check import FLOATS, dtype_name
from .attention import Backend
from .cache_layer import TLSLayer
from .config import TLSConfig
from .index import KVIndex
from .model_config import ModelShape, read_model_config
from .offload import OffloadConfig
from .offloaded_layer import OffloadedLayer

if TYPE_CHECKING:
    from .cache import TLSCache

FORMAT = "flex_tls.TLSCache"
# 2: files bear the id of their cache
VERSION = 2
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
    identity = uuid4().hex

    def write(tensors: dict[str, Tensor], name: str) -> None:
        save_file(tensors, part / name, _marks(identity, name))

    try:
        described = {
            "format": FORMAT,
            "version": VERSION,
            "id": identity,
            "config": asdict(cache.cfg),
            "shape": _shape(cache.shape),
            "dtype": dtype_name(cache.dtype),
            "batch_size": cache.batch_size,
            "max_len": cache.max_len,
            "columns": cache.get_seq_length(),
            "lens": cache.seq_lens,
            "indexes": [None if x.index is None else {n: getattr(x.index, n) for n in _COUNTS} for x in layers],
        }
        write(cache.progress.tensors(), "rows.safetensors")
        for layer in layers:
            write(_state(layer, max(cache.seq_lens)), _name(layer.layer_idx))
        (part / "cache.json").write_text(json.dumps(described, indent=1))
        part.rename(path)
    except (OSError, SafetensorError) as error:
        # A full disk is the one or the other, by who was writing
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(
    kind: type[TLSCache], path: str | Path, model_config: Any, *, max_len: int | None, device: torch.device | str,
    backend: Backend, offload: OffloadConfig | None,
) -> TLSCache:  # fmt: skip
    """See :meth:`.cache.TLSCache.load`. What can be told beforehand is, and nothing stays open, whatever stops it."""
    found = _describe(path)
    _check_model(found, read_model_config(model_config))
    cfg = _config_of(path, found)
    room = max_len or found["max_len"]
    if room < found["columns"]:
        raise ValueError(f"max_len: expected at least {found['columns']}, the saved columns, got {max_len}")
    if offload is not None:
        cfg = replace(cfg, sparse_from_tokens=0)
    cache = kind(
        model_config, cfg, batch_size=found["batch_size"], max_len=room, dtype=getattr(torch, found["dtype"]),
        device=device, backend=backend, offload=offload,
    )  # fmt: skip
    try:
        with torch.no_grad():
            _fill(cache, path, found)
    except BaseException:
        cache.close()
        raise
    return cache


def _describe(path: str | Path) -> dict[str, Any]:
    """What ``cache.json`` says, checked.

    Raises:
        ValueError: no folder that :func:`save` wrote, or by another version, or not as it was written.
    """
    file = Path(path) / "cache.json"
    try:
        found: Any = json.loads(file.read_text())
        known = isinstance(found, dict) and found.get("format") == FORMAT
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"path: expected a folder that TLSCache.save wrote, got {path} ({error})") from error
    if not known:
        raise ValueError(f"path: expected a folder that TLSCache.save wrote, got {path}, whose cache.json is another's")
    if "version" in found and found["version"] != VERSION:
        raise ValueError(
            f"path: expected version {VERSION} in {file}, got {found['version']}; update flex_tls, or save the "
            "cache again if it is older"
        )
    # In this order: each may rely on those before it
    for key, (expected, holds) in _KEYS.items():
        if key not in found or not holds(found[key], found):
            raise _damaged(file, key, expected, repr(found[key]) if key in found else "nothing")
    result: dict[str, Any] = found
    return result


def _check_model(found: dict[str, Any], shape: ModelShape) -> None:
    """Raise ValueError unless the cache that ``found`` describes is of a model of this shape."""
    if found["shape"] != _shape(shape):
        raise ValueError(
            f"model_config: expected the model that the cache was saved with, {found['shape']}, got {_shape(shape)}"
        )


def _config_of(path: str | Path, found: dict[str, Any]) -> TLSConfig:
    """The configuration that was saved. Raises ValueError if it is none, or not that of the saved indexes."""
    file, given = Path(path) / "cache.json", found["config"]
    try:
        cfg = TLSConfig(**given)
    except (TypeError, ValueError) as error:
        raise _damaged(file, "config", "TLSConfig's fields", f"{given} ({error})") from error
    fields = json.loads(json.dumps(asdict(cfg)))
    for name, value in fields.items():
        if name not in given or given[name] != value:
            raise _damaged(file, f"{name} of config", "a value of TLSConfig's", repr(given.get(name, "nothing")))
    n_layers = found["shape"]["layers"]
    if cfg.block_shares is not None and len(cfg.block_shares) != n_layers:
        raise _damaged(file, "block_shares of config", f"{n_layers} numbers, one a layer", repr(cfg.block_shares))
    dense, without = [cfg.is_dense(i) for i in range(n_layers)], [x is None for x in found["indexes"]]
    if dense != without:
        raise _damaged(file, "indexes", f"null where dense_layers={cfg.dense_layers} says so", repr(found["indexes"]))
    return cfg


def _fill(cache: TLSCache, path: str | Path, found: dict[str, Any]) -> None:
    """Read the folder into ``cache``, which is empty, allocated, and made as ``found`` says.

    Raises:
        ValueError: a file that is missing, damaged, another's, or not what ``cache.json`` says.
    """
    path = Path(path)
    n, lens = max(found["lens"]), torch.tensor(found["lens"])
    rows = _read(path / "rows.safetensors", found["id"])
    _check_rows(path / "rows.safetensors", rows, found["columns"], found["lens"])
    cache.progress.restore(found["columns"], found["lens"], rows)
    for layer, counts in zip(cache.tls_layers, found["indexes"], strict=True):
        file = path / _name(layer.layer_idx)
        saved = _read(file, found["id"])
        held = layer.on_device()[0]
        like = held.new_empty(*held.shape[:2], n, held.shape[3], device="meta")
        views = _views(layer.index, n)
        _check_layer(file, saved, {"keys": like, "values": like, **views})
        if counts is not None and counts["fitted_tokens"] and not torch.equal(saved["seq_lens"], lens):
            raise _damaged(file, "seq_lens", f"{found['lens']}, as in cache.json", repr(saved["seq_lens"].tolist()))
        layer.restore(saved["keys"], saved["values"])
        for name, buffer in views.items():
            buffer.copy_(saved[name])
        for name, value in (counts or {}).items():
            setattr(layer.index, name, value)
        if isinstance(layer, OffloadedLayer) and "last_queries" in saved:
            layer.remember(saved["last_queries"].to(held.device), float(saved["scale"]))


def _check_rows(file: Path, rows: dict[str, Tensor], columns: int, lens: list[int]) -> None:
    """Raise ValueError unless ``rows`` say which of the columns are the rows' tokens."""
    marked = rows.get("columns")
    if marked is None:
        marked = torch.ones(len(lens), columns, dtype=torch.bool)
    if (
        rows.keys() - {"columns"}
        or (marked.dtype, marked.shape) != (torch.bool, (len(lens), columns))
        or marked.sum(1).tolist() != lens
    ):
        got = {name: f"{x.dtype} {tuple(x.shape)}, {x.sum().item()} in all" for name, x in rows.items()}
        raise _damaged(
            file, "columns", f"{lens} tokens in {columns} columns, as in cache.json", repr(got or "no padding")
        )


def _check_layer(file: Path, saved: dict[str, Tensor], like: dict[str, Tensor]) -> None:
    """Raise ValueError unless ``saved`` holds tensors as ``like``, and maybe a prompt's last queries."""
    for name, want in like.items():
        new = saved.get(name)
        if new is None or new.shape != want.shape or new.dtype != want.dtype:
            got = "nothing" if new is None else f"{new.dtype} {tuple(new.shape)}"
            raise _damaged(file, name, f"{want.dtype} {tuple(want.shape)}", got)
    more = {name: x for name, x in saved.items() if name not in like}
    if not more:
        return
    b, hkv, _, d = like["keys"].shape
    q, scale = more.get("last_queries"), more.get("scale")
    if (
        len(more) != 2 or q is None or scale is None or q.dim() != 4
        or (q.shape[0], q.shape[1] % hkv, q.shape[3]) != (b, 0, d) or not q.numel() or not q.is_floating_point()
        or (scale.dtype, scale.shape) != (torch.float64, ())
    ):  # fmt: skip
        there = {name: f"{x.dtype} {tuple(x.shape)}" for name, x in more.items()}
        raise _damaged(file, "the rest", f"last_queries [{b}, HQ, T, {d}] and scale, or nothing", repr(there))


def _is_count(x: Any, least: int = 0) -> bool:
    return type(x) is int and x >= least


def _is_shape(x: Any) -> bool:
    counts = ("layers", "kv_heads", "head_dim")
    return (
        isinstance(x, dict)
        and x.keys() == {*counts, "windows"}
        and all(_is_count(x[name], 1) for name in counts)
        and isinstance(x["windows"], list)
        and len(x["windows"]) == x["layers"]
        and all(window is None or _is_count(window, 1) for window in x["windows"])
    )


def _is_index(x: Any, lens: list[int], columns: int) -> bool:
    """Whether these are the counts of an index of rows of ``lens``: fitted, unless a row is empty."""
    if x is None:
        return True
    if not isinstance(x, dict) or x.keys() != set(_COUNTS) or not all(map(_is_count, x.values())):
        return False
    least = max(lens) if x["fitted_tokens"] else 0
    return (x["fitted_tokens"] > 0 or min(lens) == 0) and least <= x["max_len"] <= columns


# What is expected of each entry of cache.json, in words and as a test of it and, where others matter, of all
_KEYS: dict[str, tuple[str, Callable[[Any, dict[str, Any]], bool]]] = {
    "version": (f"{VERSION}", lambda x, _: _is_count(x)),
    "id": ("a name that the other files bear", lambda x, _: isinstance(x, str) and x != ""),
    "config": ("TLSConfig's fields", lambda x, _: isinstance(x, dict)),
    "shape": ("layers, kv_heads, head_dim and a window or null for each layer", lambda x, _: _is_shape(x)),
    "dtype": (f"one of {', '.join(map(dtype_name, FLOATS))}", lambda x, _: x in map(dtype_name, FLOATS)),
    "batch_size": ("a number of rows, at least 1", lambda x, _: _is_count(x, 1)),
    "columns": ("a number of columns", lambda x, _: _is_count(x)),
    "max_len": ("at least columns, and 1", lambda x, of: _is_count(x, max(of["columns"], 1))),
    "lens": (
        "batch_size numbers of at most columns tokens",
        lambda x, of: isinstance(x, list) and len(x) == of["batch_size"]
        and all(_is_count(n) and n <= of["columns"] for n in x),
    ),
    "indexes": (
        f"null or {', '.join(_COUNTS)}, which go with lens, for each layer",
        lambda x, of: isinstance(x, list) and len(x) == of["shape"]["layers"]
        and all(_is_index(one, of["lens"], of["columns"]) for one in x),
    ),
}  # fmt: skip


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


def _shape(shape: ModelShape) -> dict[str, Any]:
    return {
        "layers": shape.n_layers,
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "windows": list(shape.windows),
    }


def _name(layer_idx: int) -> str:
    return f"layer_{layer_idx:05d}.safetensors"


def _marks(identity: str, name: str) -> dict[str, str]:
    return {"cache": identity, "file": name}


def _damaged(file: Path, what: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"path: expected {what} in {file} to be {expected}, got {got}; the file is damaged or of another cache, save "
        "the cache again"
    )


def _read(file: Path, identity: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            marks, names = opened.metadata() or {}, opened.keys()
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: expected {file} to be whole, got {error}; save the cache again") from error
    want = _marks(identity, file.name)
    if marks != want:
        raise ValueError(
            f"path: expected {file} to be marked {want}, got {marks}; it is of another cache or layer, or cache.json "
            "is: put the file back that was saved, or save the cache again"
        )
    return tensors
