"""Memory that an offloaded cache takes, and gives back: when it is closed, and when it could not be had."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flex_tls.offload import DevicePool, HostStore

import flex_tls as tls
from flex_tls.index import KVIndex
from tests.integrations.models import SPARSE, make, prompts
from tests.offload.registry import count_page_locked

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def bytes_held() -> tuple[int, int]:
    """Of all caches there are: host stores, and what is on the device for them."""
    found: list[Any] = [x for x in gc.get_objects() if type(x) in (HostStore, DevicePool, KVIndex)]
    on_host = [x.nbytes for x in found if isinstance(x, HostStore)]
    return sum(on_host), sum(x.nbytes for x in found) - sum(on_host)


def resident_bytes() -> int:
    return 1024 * next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )


@torch.no_grad()
def decoded(model: Any, cache: tls.TLSCache, n: int = 3) -> torch.Tensor:
    ids = prompts(90)["input_ids"].to(model.device)
    out = [model(ids, past_key_values=cache).logits[:, -1:]]
    out += [model(ids[:, :1], past_key_values=cache).logits for _ in range(n)]
    return torch.cat(out, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("store_dtype", "refused"), [("model", 1), ("model", 2), *(("int8", n) for n in range(1, 5))]
)  # fmt: skip
def test_a_refused_page_lock_gives_back_all_that_was_locked_before(
    store_dtype: Any, refused: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers; in 8 bits codes and scales of each are locked one by one."""
    model = make("llama").to(device)
    tls.enable(model)
    offload = tls.OffloadConfig(policy="exact", store_dtype=store_dtype)
    new = lambda: tls.TLSCache(model.config, SPARSE, max_len=200, offload=offload, backend="reference")  # noqa: E731
    want = decoded(model, new())
    gc.collect()
    before, allocated = bytes_held(), torch.cuda.memory_allocated()
    registry = count_page_locked(monkeypatch, device)
    registry.refused = refused
    cache = new()
    with pytest.raises(MemoryError, match=r"could not be page-locked \(CUDA error .*lower max_len") as caught:
        decoded(model, cache)
    # Also while the error, and with it what its frames hold, is alive
    assert registry.held == {}
    assert registry.asked == refused
    del caught
    gc.collect()
    assert bytes_held() == before
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(decoded(model, cache), want)
    assert registry.nbytes == cache.host_nbytes
    cache.close()
    assert registry.held == {}


@pytest.mark.parametrize("part", ["RowReader", "DevicePool", "make_transfers", "new_index"])
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_whatever_stops_an_allocation_no_memory_stays_locked(
    part: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second layer, but for the reader, which all share."""
    registry = count_page_locked(monkeypatch, "cpu")
    original = getattr(tls.offloaded_layer, part)
    made = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if registry.asked and kwargs.get("device") != torch.device("meta") and "meta" not in map(str, args):
            made.append(args)
            if len(made) == (1 if part == "RowReader" else 2):
                raise error("stopped")
        return original(*args, **kwargs)

    monkeypatch.setattr(tls.offloaded_layer, part, failing)
    with pytest.raises(MemoryError if error is torch.OutOfMemoryError else error) as caught:
        tls.TLSCache(
            make("llama").config, SPARSE, max_len=200, offload=tls.OffloadConfig(), backend="reference",
            dtype=torch.float32, device="cpu",
        )  # fmt: skip
    assert registry.asked > 0
    assert registry.held == {}
    del caught


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_caches_leave_no_byte_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    tls.enable(model)
    registry = count_page_locked(monkeypatch, "cpu")
    gc.collect()
    before = bytes_held()
    # What other tests left is not to be collected meanwhile
    gc.disable()
    try:
        resident = []
        for i in range(100):
            cache = tls.TLSCache(
                model.config, SPARSE, max_len=20_000, offload=tls.OffloadConfig(gpu_blocks=8), backend="reference",
                dtype=torch.float32, device="cpu",
            )  # fmt: skip
            assert registry.nbytes == cache.host_nbytes > 10e6
            if i % 10 == 0:
                decoded(model, cache, 1)
            cache.close()
            assert registry.held == {}
            del cache
            assert bytes_held() == before
            resident.append(resident_bytes())
    finally:
        gc.enable()
    # An allocator may keep a cache or two, not the ninety
    assert resident[-1] - resident[10] < 50e6
