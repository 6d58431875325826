"""A cache on disk: what is loaded goes on as what was saved would have, with and without offload."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flex_tls.offload.int8 import dequantised, quantised
from safetensors import SafetensorError
from torch import Tensor

import flex_tls as tls
from flex_tls import saved
from tests.integrations.models import FULL, SPARSE, make, prompts

EXACT = tls.OffloadConfig(policy="exact")
INT8 = tls.OffloadConfig(policy="exact", store_dtype="int8")


def new_cache(model: Any, cfg: tls.TLSConfig = SPARSE, **kwargs: Any) -> tls.TLSCache:
    return tls.TLSCache(model.config, cfg, **{"max_len": 160, "backend": "reference", **kwargs})


@torch.no_grad()
def go_on(model: Any, cache: tls.TLSCache, n: int = 6) -> Tensor:
    """Logits of ``n`` further tokens."""
    out = []
    for i in range(n):
        position = torch.tensor(cache.seq_lens, device=model.device)[:, None]
        token = torch.full((cache.batch_size, 1), 5 + i, device=model.device)
        out.append(model(token, position_ids=position, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, EXACT), (EXACT, None), (tls.OffloadConfig(), tls.OffloadConfig()), (None, None), (INT8, INT8)],
    ids=["to offload", "from offload", "async", "without", "int8"],
)  # fmt: skip
def test_a_loaded_cache_goes_on_as_the_saved_one(
    before: tls.OffloadConfig | None, after: tls.OffloadConfig | None, tmp_path: Path
) -> None:
    """Left-padded rows; the loaded cache has room for more. Two of four with block summaries."""
    model, inputs = make("qwen3"), prompts(90, 41)
    cfg = dataclasses.replace(SPARSE, index="lowrank" if before is None else "quest")
    tls.enable(model)
    cache = new_cache(model, cfg, batch_size=2, offload=before)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    cache.save(tmp_path / "document")
    assert [x.name for x in tmp_path.iterdir()] == ["document"]
    want = go_on(model, cache)
    for _ in range(2):
        loaded = tls.TLSCache.load(
            tmp_path / "document", model.config, max_len=250, backend="reference", offload=after
        )  # fmt: skip
        assert (loaded.seq_lens, loaded.get_seq_length(), loaded.cfg) == ([90, 41], 90, cfg)
        assert torch.equal(go_on(model, loaded), want)
    # Another turn still knows which columns are padding
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.int64)], 1)
    with torch.no_grad():
        model(torch.tensor([[4], [4]]), attention_mask=mask, past_key_values=loaded)
        with pytest.raises(ValueError, match="expected the 97 cached columns to stay as they were"):
            model(torch.tensor([[4], [4]]), attention_mask=torch.ones(2, 98), past_key_values=loaded)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("offload", "n_before"), [(tls.OffloadConfig(), 0), (EXACT, 5), (INT8, 5)], ids=["async", "exact", "int8"]
)
def test_a_cache_saved_on_a_gpu_goes_on_there(offload: tls.OffloadConfig, n_before: int, tmp_path: Path) -> None:
    """Behind steps too, whose tokens went through the pool. With "async" behind the prompt: a loaded pool is cold."""
    model, inputs = make("qwen3").cuda(), {name: x.cuda() for name, x in prompts(90, 41).items()}
    tls.enable(model)
    cache = new_cache(model, batch_size=2, offload=offload)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    if n_before:
        go_on(model, cache, n_before)
    cache.save(tmp_path / "document")
    want = go_on(model, cache)
    loaded = tls.TLSCache.load(
        tmp_path / "document", model.config, device="cuda", backend="reference", offload=offload
    )  # fmt: skip
    assert loaded.seq_lens == [90 + n_before, 41 + n_before]
    assert torch.equal(go_on(model, loaded), want)
    assert bool(want.isfinite().all())


@pytest.mark.cuda
@pytest.mark.parametrize("after", [None, EXACT], ids=["without", "offload"])
def test_a_cache_saved_on_a_gpu_goes_on_on_a_cpu(after: tls.OffloadConfig | None, tmp_path: Path) -> None:
    """Budgets hold the context: where blocks compete, other rounding may choose another one."""
    model, inputs = make("qwen3").cuda(), {name: x.cuda() for name, x in prompts(90, 41).items()}
    tls.enable(model)
    cache = new_cache(model, FULL, batch_size=2, offload=EXACT)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    go_on(model, cache, 3)
    cache.save(tmp_path / "document")
    want = go_on(model, cache).cpu()
    loaded = tls.TLSCache.load(tmp_path / "document", model.config, backend="reference", offload=after)
    got = go_on(model.cpu(), loaded)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_a_cache_that_began_dense_can_be_loaded_with_offload(tmp_path: Path) -> None:
    model = make("qwen3")
    cfg = dataclasses.replace(SPARSE, sparse_from_tokens=50)
    tls.enable(model)
    cache = new_cache(model, cfg)
    with torch.no_grad():
        model(**prompts(90), past_key_values=cache)
    cache.save(tmp_path / "document")
    want = go_on(model, cache)
    for offload, kept in ((None, 50), (EXACT, 0)):
        loaded = tls.TLSCache.load(tmp_path / "document", model.config, backend="reference", offload=offload)
        assert loaded.cfg.sparse_from_tokens == kept
        assert torch.equal(go_on(model, loaded), want)


def test_a_loaded_cache_holds_what_was_saved_as_its_store_can(tmp_path: Path) -> None:
    """To 8 bits and back: what they stand for stays."""
    model, cache, path = saved_document(tmp_path)
    path = tmp_path / "document"
    for name, offload in (("int8", INT8), ("model", EXACT), ("int8 again", INT8)):
        found = tls.TLSCache.load(path, model.config, backend="reference", offload=offload)
        for layer, before in zip(found.tls_layers, cache.tls_layers, strict=True):
            away = layer in found.offloaded_layers and name == "int8"
            for got, held in zip(layer.buffers(), before.buffers(), strict=True):
                want = dequantised(*quantised(held), held.dtype) if away else held
                assert torch.equal(got[:, :, :90], want[:, :, :90])
        cache, path = found, tmp_path / name
        cache.save(path)


def saved_document(tmp_path: Path, **kwargs: Any) -> tuple[Any, tls.TLSCache, Path]:
    model = make("llama")
    tls.enable(model)
    cache = new_cache(model, **kwargs)
    with torch.no_grad():
        model(**prompts(90), past_key_values=cache)
    cache.save(tmp_path / "document")
    return model, cache, tmp_path / "document"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    model, _, path = saved_document(tmp_path)
    load = lambda **kwargs: tls.TLSCache.load(path, **{"model_config": model.config, **kwargs})  # noqa: E731
    with pytest.raises(ValueError, match=r"path: expected a folder that TLSCache\.save wrote, got .*nowhere"):
        tls.TLSCache.load(tmp_path / "nowhere", model.config)
    with pytest.raises(ValueError, match=r"model_config: expected the model .* 'kv_heads': 2.*got .*'kv_heads': 4"):
        load(model_config=make("mistral").config)
    with pytest.raises(ValueError, match="max_len: expected at least 90, the saved columns, got 50"):
        load(max_len=50)
    layer = path / "layer_00001.safetensors"
    whole = layer.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PNG" * 100):
        layer.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"layer_00001\.safetensors to be whole.*save the cache again"):
            load()
    shutil.copy(path / "layer_00000.safetensors", layer)
    with pytest.raises(ValueError, match=r"layer_00001\.safetensors to be marked .*got .*layer_00000.*put the file"):
        load()
    layer.unlink()
    with pytest.raises(ValueError, match=r"layer_00001\.safetensors to be whole"):
        load()
    described = json.loads((path / "cache.json").read_text())
    for change, text in (({"version": 9}, "expected version 2 .* got 9"), ({"format": "other"}, "is another's")):
        (path / "cache.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=text):
            load()
    (path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected a folder that TLSCache\.save wrote"):
        load()


def test_a_save_that_fails_leaves_nothing_and_the_cache_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache, path = saved_document(tmp_path, offload=tls.OffloadConfig())
    with pytest.raises(ValueError, match=r"expected a name that is free, got .*document, which exists"):
        cache.save(path)
    with pytest.raises(ValueError, match="expected one that holds tokens, got one without buffers"):
        new_cache(model).save(tmp_path / "empty")
    written = []

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        written.append(file)
        if len(written) == 3:
            raise SafetensorError("No space left on device")
        file.write_bytes(b"")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(OSError, match="other could not be written: No space left on device"):
        cache.save(tmp_path / "other")
    assert [x.name for x in tmp_path.iterdir()] == ["document"]
    loaded = tls.TLSCache.load(path, model.config, backend="reference", offload=tls.OffloadConfig())
    assert torch.equal(go_on(model, cache), go_on(model, loaded))


def in_another_process(function: str, *args: object) -> str:
    """What it prints; with as many threads as here, so that sums round alike."""
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"from tests.integrations.test_saved import {function}\n"
        f"{function}({', '.join(repr(str(x)) for x in args)})\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_and_go_on(path: str, out: str) -> None:
    model = make("llama")
    tls.enable(model)
    torch.save(go_on(model, tls.TLSCache.load(path, model.config, backend="reference", offload=EXACT)), out)


def test_another_process_goes_on_as_this_one(tmp_path: Path) -> None:
    model, cache, path = saved_document(tmp_path, offload=EXACT)
    in_another_process("load_and_go_on", path, tmp_path / "logits")
    assert torch.equal(torch.load(tmp_path / "logits"), go_on(model, cache))


def save_where_little_fits(folder: str) -> None:
    import resource

    model, cache, _ = saved_document(Path(folder))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    # The first file, that of a dense layer, that of a layer with an index
    for file_bytes in (16, 4096, 25_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
        try:
            cache.save(Path(folder) / "other")
        except OSError as error:
            print(error)  # noqa: T201
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert [x.name for x in Path(folder).iterdir()] == ["document"]
    cache.save(Path(folder) / "other")
    want = go_on(model, cache)
    for name in ("document", "other"):
        assert torch.equal(
            go_on(model, tls.TLSCache.load(Path(folder) / name, model.config, backend="reference")), want
        )


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the bytes of a file there")
def test_a_disk_that_is_full_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    """What was saved before stays, nothing half-written does, the cache goes on and can be saved elsewhere."""
    lines = in_another_process("save_where_little_fits", tmp_path).splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r".*other could not be written: .*File too large.*", line) for line in lines), lines
