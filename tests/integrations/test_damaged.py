"""A saved cache that is damaged or of somebody else: refused by name, with nothing left open or locked."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import flex_tls as tls
from flex_tls import saved
from tests.integrations.models import SPARSE, make, prompts
from tests.offload.registry import Registry, count_page_locked

OFFLOAD = tls.OffloadConfig(policy="exact")
NOTHING = object()
# What no entry may be, whatever it means; True is 1 in a configuration
GARBAGE = (NOTHING, "x", "", -1, 1.5, [], {}, [[]], {"x": 1}, None, True)


class Document(NamedTuple):
    model: Any
    path: Path
    # Of another prompt of the same lengths
    other: Path
    registry: Registry


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Left-padded rows, read with offload, so that there are last queries too."""
    folder = tmp_path_factory.mktemp("saved")
    model, inputs = make("qwen3"), prompts(90, 41)
    tls.enable(model)
    for name, ids in (("document", inputs["input_ids"]), ("other", inputs["input_ids"].flip(1))):
        cache = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=160, backend="reference", offload=OFFLOAD)
        with torch.no_grad():
            model(ids, attention_mask=inputs["attention_mask"], past_key_values=cache)
        cache.save(folder / name)
    return model, folder


@pytest.fixture
def document(saved_twice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Document:
    model, folder = saved_twice
    shutil.copytree(folder, tmp_path / "saved")
    return Document(model, tmp_path / "saved/document", tmp_path / "saved/other", count_page_locked(monkeypatch, "cpu"))


def load(document: Document) -> tls.TLSCache:
    return tls.TLSCache.load(document.path, document.model.config, backend="reference", offload=OFFLOAD)


def attempt(document: Document) -> tls.TLSCache | str:
    """The cache, or why not: then nothing stays locked while the error lives, nor open afterwards."""
    try:
        return load(document)
    except ValueError as error:
        text, held = str(error), dict(document.registry.held)
    assert held == {}
    if sys.platform == "linux":
        assert str(document.path) not in Path("/proc/self/maps").read_text()
    return text


def refusal(document: Document) -> str:
    text = attempt(document)
    assert isinstance(text, str)
    return text


def damaged(described: Any, *keys: Any) -> Iterator[tuple[Any, Any]]:
    """(value, description with it) for the entry that ``keys`` lead to."""
    for value in GARBAGE:
        changed = copy.deepcopy(described)
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        if value is NOTHING:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        yield value, changed


def test_every_entry_that_is_missing_or_garbage_is_named(document: Document) -> None:
    file = document.path / "cache.json"
    described = json.loads(file.read_text())
    places = [
        *((key,) for key in described), *(("shape", key) for key in described["shape"]),
        *(("indexes", 1, key) for key in described["indexes"][1]), ("lens", 0), ("indexes", 1), ("shape", "windows", 0),
    ]  # fmt: skip
    for place in places:
        for value, changed in damaged(described, *place):
            if value is None and place == ("shape", "windows", 0):
                # As it was: no window
                continue
            file.write_text(json.dumps(changed))
            text = refusal(document)
            assert str(document.path) in text or "model_config: expected the model" in text, (place, value, text)
            if len(place) == 1 and place[0] not in ("format", "version", "id"):
                assert f"{place[0]} in {file} to be " in text, (place, value, text)


def test_a_configuration_is_taken_as_it_was_written_or_not_at_all(document: Document) -> None:
    file = document.path / "cache.json"
    described = json.loads(file.read_text())
    assert described["config"] == json.loads(json.dumps(asdict(SPARSE)))
    for key in (*described["config"], "new_in_the_next_version"):
        described["config"].setdefault(key, 0)
        for value, changed in damaged(described, "config", key):
            if value is True or (value is NOTHING and key.startswith("new")):
                continue
            file.write_text(json.dumps(changed))
            found = attempt(document)
            if isinstance(found, str):
                assert str(document.path) in found, (key, value, found)
            else:
                assert json.loads(json.dumps(asdict(found.cfg))) == changed["config"], (key, value)
                found.close()
        described["config"].pop("new_in_the_next_version", None)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("columns", 91, r"expected columns in .*rows.* to be \[90, 41\] tokens in 91 columns.*\(2, 90\), 131 in all"),
        ("columns", 89, "expected lens .* at most columns tokens, got"),
        ("lens", [90, 42], r"expected columns in .*rows.* to be \[90, 42\] tokens in 90 columns"),
        ("lens", [41, 90], r"expected columns in .*rows.* to be \[41, 90\] tokens"),
        ("lens", [90], "expected lens .* batch_size numbers"),
        ("batch_size", 3, "expected lens .* batch_size numbers"),
        ("max_len", 89, "expected max_len .* at least columns"),
        (
            "dtype",
            "float16",
            r"expected keys in .*layer_00000.* torch\.float16 \(2, 2, 90, 16\), got torch\.float32",
        ),
        ("dtype", "nn", "expected dtype .* one of float16, bfloat16, float32, float64, got 'nn'"),
        ("id", "0", "rows.safetensors to be marked .*'cache': '0'.*put the file back"),
        ("version", 1, "expected version 2 in .*cache.json, got 1; update flex_tls, or save"),
        ("indexes", [None, None, None], "expected indexes .* null where dense_layers=1 says so"),
    ],
)
def test_a_wrong_entry_is_told_from_the_right_one(document: Document, entry: str, value: Any, text: str) -> None:
    file = document.path / "cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), entry: value}))
    assert re.search(text, refusal(document))


NAMES = ["cache.json", "rows.safetensors", *(f"layer_{i:05d}.safetensors" for i in range(3))]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_damaged_or_of_another_cache_is_named(document: Document, name: str) -> None:
    """The other cache has the same shapes, lengths and configuration."""
    file = document.path / name
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], whole[:9], b"PNG" * 100, b"\xff" * 64, b"[" * 99_999):
        file.write_bytes(content)
        assert str(document.path) in refusal(document)
    shutil.copy(document.other / name, file)
    assert "to be marked" in refusal(document)
    file.unlink()
    assert str(file) in refusal(document)
    file.mkdir()
    assert str(file) in refusal(document)
    file.rmdir()
    file.write_bytes(whole)
    load(document).close()


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_tensor_that_is_missing_or_changed_is_named(document: Document, name: str) -> None:
    file = document.path / name
    # Copies: those of load_file keep the file open
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    marks = saved._marks(json.loads((document.path / "cache.json").read_text())["id"], name)
    whole = file.read_bytes()
    for changed in tensors:
        x = tensors[changed]
        rest = {k: v for k, v in tensors.items() if k != changed}
        for other in (
            rest, {**rest, changed: x.to(torch.int16)}, {**rest, changed: x[None].contiguous()},
            {**rest, f"{changed}s": x}, {**tensors, "more": x.clone()},
        ):  # fmt: skip
            save_file(other, file, marks)
            assert str(file) in refusal(document)
    if "seq_lens" in tensors:
        save_file({**tensors, "seq_lens": tensors["seq_lens"] - 1}, file, marks)
        assert f"expected seq_lens in {file} to be [90, 41], as in cache.json, got [89, 40]" in refusal(document)
    file.write_bytes(whole)
    load(document).close()


def state(cache: tls.TLSCache) -> list[Any]:
    tensors = [x for layer in cache.tls_layers for x in layer.held(90)]
    tensors += [x for layer in cache.tls_layers if layer.index is not None for x in layer.index._tensors()]
    tensors += [layer.last_queries for layer in cache.offloaded_layers if layer.last_queries is not None]
    scales = [layer.scale for layer in cache.offloaded_layers]
    return [cache.seq_lens, cache.get_seq_length(), scales, [(x.shape, x.tolist()) for x in tensors]]


@given(st.sampled_from(NAMES[1:]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_no_flipped_bit_of_a_header_is_read_as_something_else(
    saved_twice: Any, name: str, where: float, bit: int
) -> None:
    model, folder = saved_twice
    file = folder / "document" / name
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[int(where * (8 + int.from_bytes(whole[:8], "little")))] ^= 1 << bit
    wanted = state(tls.TLSCache.load(file.parent, model.config, backend="reference", offload=OFFLOAD))
    found = None
    try:
        file.write_bytes(changed)
        with suppress(ValueError):
            found = tls.TLSCache.load(file.parent, model.config, backend="reference", offload=OFFLOAD)
    finally:
        file.write_bytes(whole)
    # Such as another white space
    assert found is None or state(found) == wanted


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_stops_a_load_no_memory_stays_locked(
    document: Document, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = saved._read

    def stopped(file: Path, identity: str) -> Any:
        if "00002" in file.name:
            raise error("stopped")
        return read(file, identity)

    monkeypatch.setattr(saved, "_read", stopped)
    with pytest.raises(error, match="stopped") as caught:
        load(document)
    assert document.registry.asked == 2
    assert document.registry.held == {}
    del caught
