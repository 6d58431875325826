"""A cache that does not fit is refused before anything is allocated, with what would fit."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

import flex_tls as tls
from flex_tls import footprint as footprint_module
from flex_tls.memory import free_bytes, longest_that_fits

MODEL = LlamaConfig(
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=5,
    vocab_size=10,
    intermediate_size=8,
)


@given(st.integers(0, 50), st.integers(0, 9), st.integers(1, 16), st.integers(0, 900), st.integers(1, 200))
def test_the_longest_that_fits_fits_and_one_more_does_not(
    base: int, each: int, size: int, room: int, up_to: int
) -> None:
    def needed(n: int) -> int:
        return base + each * -(-n // size) * size

    found = longest_that_fits(needed, room, up_to)
    assert found == max((n for n in range(1, up_to + 1) if needed(n) <= room), default=0)


@pytest.mark.parametrize(("share", "free"), [(1.0, 120), (0.17, 120), (0.16, 110), (0.05, 0)])
def test_torch_s_idle_reserve_and_the_process_s_share_count(
    monkeypatch: pytest.MonkeyPatch, share: float, free: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", {3: share, 0: share / 2}.__getitem__)
    assert free_bytes(torch.device("cuda")) == free
    assert free_bytes(torch.device("cuda", 0)) == min(120, int(share / 2 * 1000) - 50)
    assert free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def make(max_len: int) -> tls.TLSCache:
        return tls.TLSCache(MODEL, batch_size=3, max_len=max_len, dtype=dtype, device="cpu")

    room = make(1000).nbytes
    monkeypatch.setattr(footprint_module, "free_bytes", lambda device: room)
    assert make(1000).nbytes == room
    with pytest.raises(MemoryError, match=rf"bytes needed on cpu .*, {room:,} are free; max_len=\d+ is") as caught:
        make(5000)
    longest = int(re.findall(r"max_len=(\d+) is the longest", str(caught.value))[0])
    assert longest == 1008
    assert make(longest).nbytes == room
    monkeypatch.setattr(footprint_module, "free_bytes", lambda device: 10)
    with pytest.raises(MemoryError, match="no length fits with batch_size=3, got max_len=5000"):
        make(5000)


def test_a_refused_cache_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tls.TLSCache(MODEL, max_len=300)
    key = torch.zeros(1, 2, 4, 32)
    monkeypatch.setattr(footprint_module, "free_bytes", lambda device: 10)
    cache.begin(None, 4, 1)
    with pytest.raises(MemoryError, match="no length fits"):
        cache.update(key, key, 0)
    assert not any(layer.is_initialized for layer in cache.tls_layers)
    monkeypatch.undo()
    cache.begin(None, 4, 1)
    cache.update(key, key, 0)
    assert cache.tls_layers[0].is_initialized
