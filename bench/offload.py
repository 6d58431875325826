"""The offload engine on its own: the link, transfers beside a model's matrix products, and steps with real locality.

What is timed is replayed from CUDA graphs. The matrix products are those of Qwen3-8B's layers, bare: a step of them is
the time that transfers can hide behind. Attention is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from flex_tls.offload import DevicePool, HostStore, open_blocks, ops
from torch import Tensor

from flex_tls import jsonl

from .rows import Machine
from .timing import record, samples, spread
from .trace import overlaps, trace

# In, out of the four products of a Qwen3-8B layer: queries, keys and values; output; gate and up; down
QWEN3_8B = ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096))
TINY = ((64, 96), (64, 64), (64, 128), (64, 64))
PROGRAMS = (8, 16, 32, 64, 128)


def link(device: torch.device, runs: int, quick: bool) -> Iterator[dict[str, Any]]:
    """(a) Rates by row size and number of programs, next to one large copy and to a copy for each row."""
    total = 2**22 if quick else 2**26
    for block_size in (16, 32, 64, 128):
        layer = _layer(1, 8, n_blocks=64 if quick else 512, n_slots=32 if quick else 256, block_size=block_size)
        row_bytes = layer.store.block_bytes
        n = min(layer.pool.n_slots, total // (8 * row_bytes))
        _list(layer, n)
        calls = {f"kernel_{p}": _call(layer, p) for p in PROGRAMS}
        flat = layer.store.rows.view(-1), layer.pool.slots.view(-1)
        n_elements = 8 * n * row_bytes // flat[0].element_size()
        calls["one_copy"] = lambda flat=flat, m=n_elements: flat[1][:m].copy_(flat[0][:m], non_blocking=True)
        calls["copy_a_row"] = lambda layer=layer, n=n: _copy_rows(layer, n)
        for name, taken in samples(_graphs(calls, device), device, runs).items():
            s = spread(taken)
            yield {
                "part": "link", "provider": name, "row_bytes": row_bytes, "n_rows": 8 * n,
                "gb_per_s": 8 * n * row_bytes / s.median_us / 1e3, **_spread(s),
            }  # fmt: skip


def overlap(device: torch.device, runs: int, quick: bool) -> Iterator[dict[str, Any]]:
    """(b) A step of matrix products with transfers beside it, before each layer's next product, and alone."""
    products = _Products(device, 1 if quick else 36, TINY if quick else QWEN3_8B)
    hkv = 1 if quick else 8
    layers = [_layer(1, hkv, n_blocks=80, n_slots=72) for _ in products.weights]
    row_bytes = layers[0].store.block_bytes
    for per_head in (2,) if quick else (4, 16, 32, 64):
        for layer in layers:
            _list(layer, per_head)
        n_bytes = per_head * hkv * row_bytes * len(layers)
        calls: dict[str, Callable[[], object]] = {
            "products": lambda: products.run(lambda i: None),
            "transfers": lambda: _join(layers, [_transfer(x, waits=False) for x in layers]),
            "beside": lambda: _join(layers, products.run(lambda i: _transfer(layers[i], waits=False))),
            "before": lambda: _join(layers, products.run(lambda i: _transfer(layers[i], waits=True))),
        }
        graphs = {}
        for name, call in calls.items():
            for layer in layers:
                layer.pool.waits.fill_(int(name == "before"))
            graphs[name] = _graph(call, device)
        # The flag is read when the graph runs
        for name, graph in graphs.items():
            for layer in layers:
                layer.pool.waits.fill_(int(name == "before"))
            s = spread(samples({name: graph}, device, runs)[name])
            yield {"part": "overlap", "provider": name, "fetched_bytes": n_bytes, **_spread(s)}


def steps(
    device: torch.device, runs: int, quick: bool, *, batch_size: int, context: int, pool: float
) -> Iterator[dict[str, Any]]:
    """(c) A plan and its transfers in each layer, driven by a made trace with real text's locality.

    ``pool``: slots, in block budgets.
    """
    n_layers, block_size, hkv, n_programs = (1, 64, 1, 2) if quick else (36, 64, 8, 32)
    n_blocks, kept = context // block_size, 8192 // block_size if not quick else 8
    products = _Products(device, n_layers, TINY if quick else QWEN3_8B, batch_size)
    n_slots = max(int(pool * kept), kept + open_blocks(1, block_size))
    layers = [_layer(batch_size, hkv, n_blocks=n_blocks, n_slots=n_slots) for _ in range(n_layers)]
    n_steps = 32
    selected = trace(n_steps, n_layers * batch_size * hkv, n_blocks, kept, device=device)
    found = overlaps(selected, n_blocks)
    selected = selected.view(n_steps, n_layers, batch_size, hkv, kept)
    lens = torch.full((batch_size,), context, dtype=torch.int64, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)

    def run(i: int, waits: bool, forget: bool) -> None:
        layer = layers[i]
        if forget:
            # No residency: everything that is selected is fetched, every step
            layer.pool.slot_of_block.fill_(-1)
            layer.pool.block_of_slot.fill_(-1)
        ids = selected[:, i].index_select(0, step)[0]
        ops.plan(
            layer.pool, ids, None, lens - 1, lens, n_ahead=1, waits_above=-1.0 if waits else float("inf"),
            resident_too=not waits,
        )  # fmt: skip
        _transfer(layer, waits=waits, n_programs=n_programs)

    def one(waits: bool = False, forget: bool = False) -> None:
        step.add_(1).remainder_(n_steps)
        _join(layers, products.run(lambda i: run(i, waits, forget)))

    calls = {
        "products": lambda: products.run(lambda i: None),
        "async": lambda: one(),
        "waits": lambda: one(waits=True),
        "no_residency": lambda: one(forget=True),
    }
    for name, call in calls.items():
        graph = _graph(call, device)
        for _ in range(2 if quick else n_steps):
            graph()
        for layer in layers:
            layer.pool.clear_counters()
        s = spread(samples({name: graph}, device, runs)[name])
        counts = torch.stack([layer.pool.counters.sum((0, 1)) for layer in layers]).sum(0).tolist()
        n_counted = max(int(layers[0].pool.counters[0, 0, 0]), 1)
        yield {
            "part": "steps", "provider": name, "B": batch_size, "context": context, "pool_over_budget": n_slots / kept,
            "trace": "made", "overlap_1_4_16": found, "hit_rate": 1 - counts[2] / max(counts[1], 1),
            "fetched_bytes": counts[3] * layers[0].store.block_bytes / n_counted, **_spread(s),
        }  # fmt: skip


class _Layer:
    def __init__(self, store: HostStore, pool: DevicePool) -> None:
        self.store, self.pool = store, pool


class _Products:
    """Every layer's matrix products for one token a row, one after the other."""

    def __init__(self, device: torch.device, n_layers: int, shapes: Iterable[tuple[int, int]], b: int = 1) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.weights = [[torch.randn(n, m, dtype=dtype, device=device) for n, m in shapes] for _ in range(n_layers)]
        self.inputs = [torch.randn(b, n, dtype=dtype, device=device) for n, _ in shapes]

    def run(self, before: Callable[[int], object]) -> list[Tensor]:
        """``before(i)`` is called ahead of layer i's products."""
        outs = []
        for i, weights in enumerate(self.weights):
            before(i)
            outs = [x @ w for x, w in zip(self.inputs, weights, strict=True)]
        return outs


def _layer(b: int, hkv: int, *, n_blocks: int, n_slots: int, block_size: int = 64) -> _Layer:
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    dtype = torch.bfloat16 if on_cuda else torch.float32
    shape: dict[str, Any] = {
        "batch_size": b, "n_kv_heads": hkv, "n_blocks": n_blocks, "block_size": block_size, "head_dim": 128,
        "dtype": dtype,
    }  # fmt: skip
    store = HostStore(**shape, pinned=on_cuda)
    # Pages that were never written to are all one page of zeros
    store.rows.fill_(1.0)
    return _Layer(store, DevicePool(**shape, n_slots=min(n_slots, n_blocks), device=device))


def _list(layer: _Layer, per_head: int) -> None:
    """Let each head fetch ``per_head`` random blocks into the first slots."""
    pool = layer.pool
    order = torch.rand(*pool.slot_of_block.shape, device=pool.slots.device).argsort(-1)[..., : pool.n_slots]
    pool.fetch_block.copy_(order)
    pool.fetch_slot.copy_(torch.arange(pool.n_slots, device=order.device).expand_as(order))
    pool.fetch_count.fill_(per_head)


def _transfer(layer: _Layer, waits: bool, n_programs: int = 32) -> None:
    ops.transfer(layer.store, layer.pool, n_written=0, n_programs=n_programs, may_wait=waits)
    if waits:
        ops.arrive(layer.pool)


def _join(layers: list[_Layer], result: Any) -> Any:
    ops.join(layers[0].pool)
    return result


def _call(layer: _Layer, n_programs: int) -> Callable[[], object]:
    return lambda: _join([layer], _transfer(layer, waits=False, n_programs=n_programs))


def _copy_rows(layer: _Layer, per_head: int) -> None:
    for head in range(8):
        for i in range(per_head):
            layer.pool.slots[0, head, i].copy_(layer.store.rows[0, head, i], non_blocking=True)


def _graph(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def kept() -> Tensor:
        call()
        return torch.empty(0)

    return record([kept], device, 1).replay


def _graphs(calls: dict[str, Any], device: torch.device) -> dict[str, Callable[[], object]]:
    return {name: _graph(call, device) for name, call in calls.items()}


def _spread(s: Any) -> dict[str, Any]:
    return {"us_median": s.median_us, "us_p10": s.p10_us, "us_p90": s.p90_us, "runs": s.runs}


def write(found: Iterable[dict[str, Any]], machine: Machine, out: Path) -> None:
    """Append rows to ``out`` as they come, and print them."""
    for row in found:
        jsonl.append(out, [{"bench": "offload", **row, **machine._asdict()}])
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print(" ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
