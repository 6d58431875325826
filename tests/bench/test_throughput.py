"""The throughput bench: it takes the largest batch that fits, and fills caches with what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import flex_tls as tls
from bench import offloaded, steps, throughput
from bench.__main__ import main
from bench.models import random_model

CFG = tls.TLSConfig(block_size=16, block_budget=64, token_budget=48, sink_tokens=16, recent_tokens=16, dense_layers=1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made: torch.nn.Module = random_model("tiny", 2, torch.device("cpu"))
    return made


@pytest.mark.parametrize("name", sorted(throughput.WAYS))
@pytest.mark.parametrize("room", [0, 10_000_000, 20_000_000])
def test_the_largest_batch_fits_and_one_more_does_not(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> None:
    way, host = throughput.WAYS[name], 5_000_000
    monkeypatch.setattr(throughput, "free_bytes", lambda device: room + throughput.SPARE_BYTES)
    monkeypatch.setattr(throughput, "host_bytes_available", lambda: None)

    def fits(b: int) -> bool:
        cache = throughput.make_cache(model, CFG, way, b, 1000, empty=True)
        return cache.device_nbytes <= room and cache.host_nbytes <= host

    b = throughput.largest_batch(model, CFG, way, 1000, host, None)
    assert b == 0 or fits(b)
    assert not fits(b + 1)
    assert throughput.largest_batch(model, CFG, way, 1000, host, 1) == min(b, 1)


@pytest.mark.parametrize("name", ["two_level", "offload_async", "offload_int8"])
def test_filled_caches_hold_labels_of_their_keys(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(steps, "CHUNK_TOKENS", 100)
    cache = throughput.make_cache(model, CFG, throughput.WAYS[name], 2, 230)
    steps.fill(cache, 230)
    assert cache.seq_lens == [230, 230]
    layer = cache.tls_layers[1]
    assert layer.index is not None
    keys, values = (x.clone() for x in layer.held(230))
    assert keys.std() == pytest.approx(1, abs=0.1)
    assert values.std() == pytest.approx(1, abs=0.1)
    codes = layer.index.labels.codes.clone()
    layer.index.labels.write(keys, torch.zeros(2, dtype=torch.int64))
    # Of int8 stores the labels are those of the keys before they were rounded
    same = (layer.index.labels.codes == codes).float().mean()
    assert same == 1 or (name == "offload_int8" and same > 0.5)
    cache.close()


def test_a_dry_run_writes_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--model", "tiny", "--layers", "1", "--contexts", "300", "--block-budget", "192"]
    options += ["--token-budget", "128", "--runs", "2", "--most", "1", "--commit", "x", "--out", str(out)]
    assert main(["run", "throughput", "--providers", "transformers_offloaded,dense", *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["provider"], row["B"], row["context"]) for row in rows] == [
        ("transformers_offloaded", 1, 300),
        ("dense", 1, 300),
    ]


def test_rows_of_offloaded_caches_say_what_they_followed(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(model: torch.nn.Module, cache: tls.TLSCache) -> offloaded.TracedStep:
        return offloaded.TracedStep(cache, lambda: None, torch.zeros(1), (0.8, 0.92, 0.975))

    counted = {"hit_rate": 0.97, "fetched_bytes": 5.0, "host_bytes": 7}
    for module in (offloaded, throughput):
        monkeypatch.setattr(module, "offload_figures", lambda cache: counted)
    monkeypatch.setattr(throughput, "traced_step", idle)
    monkeypatch.setattr(throughput, "captured_step", lambda model, cache: lambda: None)
    monkeypatch.setattr(throughput, "_release", lambda: None)
    dense, late = throughput.measure(model, CFG, 230, ["dense", "offload_async"], 2, host_bytes=None, most=1)
    said = {"trace": "made", "overlap_1_4_16": [0.8, 0.92, 0.975], **counted}
    assert {name: late[name] for name in said} == said
    assert not said.keys() & dense.keys()
