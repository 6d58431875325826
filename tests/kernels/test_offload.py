"""Plan and transfers by kernels against the oracle: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flex_tls.offload import DevicePool, HostStore, LayerOffload, OffloadConfig
from flex_tls.offload.config import Policy, StoreDtype
from flex_tls.offload.int8 import quantised
from flex_tls.offload.residency import attended_blocks, open_blocks, plan_step
from flex_tls.offload.transfers import side_stream, urgent_stream
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from flex_tls.offload import ops

from flex_tls.config import TLSConfig
from flex_tls.index import KVIndex
from flex_tls.kernels.append import launch_append
from flex_tls.labels import TokenLabels
from flex_tls.static import decode_layer, decode_offloaded
from tests.cases import make as make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16
# The interpreter cuts bfloat16 off where everything else rounds
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))


def make(
    b: int, hkv: int, n: int, p: int, d: int, dtype: torch.dtype, seed: int = 0, store_dtype: StoreDtype = "model"
) -> tuple[HostStore, DevicePool, torch.Generator]:
    store = HostStore(
        batch_size=b, n_kv_heads=hkv, n_blocks=n, block_size=SIZE, head_dim=d, dtype=dtype, pinned=DEVICE == "cuda",
        store_dtype=store_dtype,
    )  # fmt: skip
    pool = DevicePool(
        batch_size=b, n_kv_heads=hkv, n_slots=p, n_blocks=n, block_size=SIZE, head_dim=d, dtype=dtype,
        device=torch.device(DEVICE), store_dtype=store_dtype,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for part, new in zip(store.parts, store.packed(torch.randn(store.rows.shape, generator=generator)), strict=True):
        part.copy_(new)
    return store, pool, generator


def draw_ids(b: int, hkv: int, n: int, w: int, last: Tensor, generator: torch.Generator) -> Tensor:
    """Up to ``w`` blocks of each row up to its ``last``, ascending, N past the last."""
    weight = torch.rand(b, hkv, n, generator=generator).masked_fill(torch.arange(n) > last[:, None, None], -1.0)
    best = weight.topk(w, -1)
    count = torch.randint(0, w + 1, (b, hkv, 1), generator=generator)
    keep = (best.values > 0) & (torch.arange(w) < count)
    return torch.where(keep, best.indices, n).sort(-1).values.int()


def state(pool: DevicePool) -> dict[str, Tensor]:
    """All that a plan writes, the fetch lists up to their counts."""
    found = {name: x.cpu().clone() for name, x in pool.buffers.items() if name not in ("slots", "scales")}
    entry = torch.arange(pool.n_slots) < found["fetch_count"][..., None]
    for name in ("fetch_block", "fetch_slot"):
        found[name] = found[name].masked_fill(~entry, -1)
    return found


@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(4, 40), st.data(), st.sampled_from((-1.0, 0.2, float("inf"))),
    st.booleans(), st.sampled_from((1, 4, 20)),
)  # fmt: skip
def test_the_kernel_plans_what_the_oracle_plans(
    b: int, hkv: int, n: int, data: st.DataObject, bound: float, resident_too: bool, n_ahead: int
) -> None:
    """Several steps in a row, so that every table has a history; bit for bit."""
    n_open = open_blocks(n_ahead, SIZE)
    w = data.draw(st.integers(0, n))
    p = data.draw(st.integers(min(w + n_open, n), n))
    seed = data.draw(st.integers(0, 2**16))
    _, pool, generator = make(b, hkv, n, p, 4, torch.float32, seed)
    _, oracle, _ = make(b, hkv, n, p, 4, torch.float32, seed)
    lens = torch.randint(1, n * SIZE // 2, (b,), generator=generator)
    for _ in range(4):
        start, lens = lens, (lens + torch.randint(0, n_ahead + 1, (b,), generator=generator)).clamp_max(n * SIZE)
        last = (lens - 1) // SIZE
        ids = draw_ids(b, hkv, n, w, last, generator)
        scores = torch.randn(b, hkv, 3, n, generator=generator).masked_fill(
            torch.rand(b, hkv, 3, n, generator=generator) < 0.2, -torch.inf
        )
        given_scores = data.draw(st.sampled_from((scores, None)))
        on_device = [None if x is None else x.to(DEVICE) for x in (ids, given_scores, start, lens)]
        kept, counts = ops.plan(pool, *on_device, n_ahead=n_ahead, waits_above=bound, resident_too=resident_too)  # type: ignore[arg-type]
        plan_step(oracle, *on_device, n_ahead=n_ahead, waits_above=bound)  # type: ignore[arg-type]
        got, want = state(pool), state(oracle)
        torch.testing.assert_close(got.pop("missing_mass"), want.pop("missing_mass"), rtol=1e-5, atol=1e-6)
        for name in want:
            assert torch.equal(got[name], want[name]), name
        pool.check_integrity()
        expected, n_kept = attended_blocks(
            oracle, on_device[0][:, :, None], (lens - 1).to(DEVICE)[:, None], resident_too=resident_too
        )
        assert torch.equal(counts, n_kept[:, :, 0])
        assert torch.equal(kept, expected[:, :, 0])


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from((4, 5, 6, 16, 80)),
    st.sampled_from(DTYPES), st.sampled_from(("model", "int8")), st.sampled_from((1, 3, 32)), st.integers(0, 2**16),
)  # fmt: skip
def test_the_kernel_copies_exactly_what_is_listed(
    b: int, hkv: int, d: int, dtype: torch.dtype, store_dtype: StoreDtype, n_programs: int, seed: int
) -> None:
    """In 8 bits codes and scales; what is in neither list stays as it was."""
    n, p, n_ahead = 12, 8, 4
    store, pool, generator = make(b, hkv, n, p, d, dtype, seed, store_dtype)
    held = pool.packed(torch.randn(pool.slots.shape, generator=generator))
    for part, new in zip(pool.parts, held, strict=True):
        part.copy_(new)
    transfers = ops.KernelTransfers(torch.device(DEVICE), n_programs)
    lens = torch.randint(1, 100, (b,), generator=generator)
    start = lens
    for i in range(4):
        # The first plan only opens the pool for tokens to come: new tokens' blocks are never on their way
        ids = torch.full((b, hkv, 0 if i == 0 else 4), n, dtype=torch.int32)
        if i:
            start, lens = lens, lens + torch.randint(0, n_ahead + 1, (b,), generator=generator)
            ids = draw_ids(b, hkv, n, 4, (lens - 1) // SIZE, generator)
        scores = torch.randn(b, hkv, 1, n, generator=generator)
        plan_step(
            pool, ids.to(DEVICE), scores.to(DEVICE), start.to(DEVICE), lens.to(DEVICE), n_ahead=n_ahead, waits_above=0.4
        )
        slots, rows = ([x.cpu().clone() for x in blocks.parts] for blocks in (pool, store))
        for at in ((row, head) for row in range(b) for head in range(hkv)):
            for position in range(int(start[at[0]]), int(lens[at[0]])):
                block, token = divmod(position, SIZE)
                for device, host in zip(slots, rows, strict=True):
                    host[at][block, token] = device[at][int(pool.slot_of_block[at][block]), token]
            for k in range(int(pool.fetch_count[at])):
                for device, host in zip(slots, rows, strict=True):
                    device[at][int(pool.fetch_slot[at][k])] = host[at][int(pool.fetch_block[at][k])]
        transfers.start(store, pool, n_ahead, may_wait=True)
        transfers.join()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert all(torch.equal(got.cpu(), want) for got, want in zip(pool.parts, slots, strict=True))
        assert all(torch.equal(*pair) for pair in zip(store.parts, rows, strict=True))


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_an_engine_by_kernels_does_what_one_by_copies_does(store_dtype: StoreDtype) -> None:
    """A conversation in both: prompt, steps of one and of two tokens, crop, another chunk."""
    engines: list[LayerOffload] = []
    for kernels in (True, False):
        store, pool, _ = make(2, 2, 12, 7, 8, torch.float32, store_dtype=store_dtype)
        for part in store.parts:
            part.zero_()
        config = OffloadConfig(policy="corrected", missing_mass_bound=0.4)
        from flex_tls.offload.transfers import CopyTransfers, QueuedTransfers

        transfers = ops.KernelTransfers(torch.device(DEVICE), 4) if kernels else (
            QueuedTransfers() if DEVICE == "cpu" else CopyTransfers(torch.device(DEVICE))
        )  # fmt: skip
        engines.append(LayerOffload(store, pool, config, 2, transfers))
    generator = torch.Generator().manual_seed(0)
    lens = [70, 40]
    new = lambda t: [torch.randn(2, 2, t, 8, generator=generator).to(DEVICE) for _ in range(2)]  # noqa: E731
    prompt = new(70)
    for engine in engines:
        engine.write(*prompt, [0, 0], lens)
    for i, t in enumerate((1, 1, 2, 1, 2, 1, 1, 2)):
        if i == 5:
            lens = [n - 3 for n in lens]
            chunk = new(20)
            for engine in engines:
                engine.cut(lens)
                engine.write(*chunk, lens, [20, 20])
            lens = [n + 20 for n in lens]
        start, tokens = torch.tensor(lens, device=DEVICE), new(t)
        lens = [n + t for n in lens]
        ids = torch.stack([draw_ids(2, 2, 12, 2, (torch.tensor(lens) - 1) // SIZE, generator) for _ in range(t)], 2)
        scores = torch.randn(2, 2, 1, 12, generator=generator).to(DEVICE)
        results = []
        for engine in engines:
            engine.join()
            if not engine.is_open:
                engine.open(start)
            engine.append(*tokens, start)
            now = torch.tensor(lens, device=DEVICE)
            positions = now[:, None] - t + torch.arange(t, device=DEVICE)
            results.append(engine.step(ids.to(DEVICE), scores, start, now, positions, n_written=t))
            engine.synchronize()
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        first, second = (state(engine.pool) for engine in engines)
        torch.testing.assert_close(first.pop("missing_mass"), second.pop("missing_mass"))
        # Time is its own
        del first["stalled"], second["stalled"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        for held in ([engine.pool for engine in engines], [engine.store for engine in engines]):
            assert all(torch.equal(*pair) for pair in zip(*(blocks.parts for blocks in held), strict=True))


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(
    st.sampled_from((5, 12, 64, 80, 128)), st.sampled_from(DTYPES), st.integers(-4, 3), st.sampled_from((1, 2)),
    st.integers(0, 2**16),
)  # fmt: skip
def test_the_append_kernel_writes_codes_and_scales_bit_for_bit(
    d: int, dtype: torch.dtype, power: int, t: int, seed: int
) -> None:
    """The engine writes the same; labels are of what codes and scales give back. Nothing else changes."""
    _, pool, generator = make(2, 2, 8, 6, d, dtype, seed, store_dtype="int8")
    _, other, _ = make(2, 2, 8, 6, d, dtype, seed, store_dtype="int8")
    start = torch.tensor([30, 63], device=DEVICE)
    labels = TokenLabels.empty(
        2, 2, 8 * SIZE, d, dims=min(8, d), words=(8,) * -(-min(8, d) // 4), device=torch.device(DEVICE)
    )
    # Labels all over their range: one of an unrounded key would often be another
    labels.to_code.copy_(torch.randn(labels.to_code.shape, generator=generator) * 50 / d**0.5 * 10.0**-power)
    labels.offset.fill_(128.0)
    engines = []
    for each in (pool, other):
        store, _, _ = make(2, 2, 8, 6, d, dtype, seed, store_dtype="int8")
        engines.append(LayerOffload(store, each, OffloadConfig(), 2, ops.KernelTransfers(torch.device(DEVICE), 4)))
        engines[-1].open(start)
    k, v = ((torch.randn(2, 2, t, d, generator=generator) * 10.0**power).to(DEVICE, dtype) for _ in range(2))
    held, _ = engines[1].append(k, v, start)
    launch_append(
        k, v, start, pool.slots[..., 0, :], pool.slots[..., 1, :], labels.codes, labels.to_code, labels.offset,
        bits=labels.words, pages=pool.slot_of_block, scales=pool.scales,
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(pool.parts, other.parts, strict=True))
    at = pool.places(start[:, None] + torch.arange(t, device=DEVICE))
    for i, x in enumerate((k, v)):
        for tokens, want in zip(pool.tokens, quantised(x), strict=True):
            where = at if want.dim() == 3 else at[..., None].expand_as(want)
            assert torch.equal(tokens[:, :, :, i].gather(2, where), want)
    got = labels.codes.clone()
    labels.codes.zero_()
    labels.write(held, start)
    # Sums of another order: a channel may fall on the other side of a half
    assert int((got.view(torch.uint8) != labels.codes.view(torch.uint8)).sum()) <= 1


@pytest.mark.parametrize("policy", ["exact", "corrected"])
@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_late_blocks_change_nothing_in_a_step_that_waits(
    policy: Policy, store_dtype: StoreDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they come milliseconds late. With "exact" the output is that over all keys and values."""
    launch = ops.transfer_blocks

    def late(slots: Tensor, *arguments: Any) -> None:
        for stream in (urgent_stream(slots.device), side_stream(slots.device)):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
        launch(*arguments)

    if DEVICE == "cpu" and policy != "exact":
        pytest.skip("nothing comes late on a CPU")
    at_once = steps_over_a_pool(policy, store_dtype)
    if DEVICE == "cuda":
        monkeypatch.setattr(ops, "transfer_blocks", lambda *arguments: late(arguments[2], *arguments))
        assert all(torch.equal(*pair) for pair in zip(steps_over_a_pool(policy, store_dtype), at_once, strict=True))
    if policy == "exact":
        for got, want in zip(at_once, steps_over_a_pool(None, store_dtype), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def steps_over_a_pool(policy: Policy | None, store_dtype: StoreDtype) -> list[Tensor]:
    """Outputs of some decode steps, each of which misses blocks; without a policy over resident keys and values."""
    b, hkv, group, d, n = 2, 2, 3, 16, 16
    cfg = TLSConfig(
        block_size=SIZE, block_budget=5 * SIZE, token_budget=40, sink_tokens=SIZE, recent_tokens=SIZE, label_dims=8
    )
    case = make_case(cfg, lens=[200, 120], s=n * SIZE, hkv=hkv, group=group, d=d, seed=1)
    store, pool, generator = make(b, hkv, n, 7, d, torch.float32, store_dtype=store_dtype)
    parts = store.packed(torch.stack((case.k, case.v), 3).unflatten(2, (n, SIZE)))
    for held, x in zip(store.parts, parts, strict=True):
        held.copy_(x)
    start = case.seq_lens.to(DEVICE)
    keys, values = store.keys.to(DEVICE), store.values.to(DEVICE)
    index = KVIndex.build(keys, cfg, start, case.q.to(DEVICE))
    engine = None
    if policy is not None:
        config = OffloadConfig(policy=policy, missing_mass_bound=0.1, store_dtype=store_dtype)
        engine = LayerOffload(store, pool, config, 1, ops.KernelTransfers(torch.device(DEVICE), 4))
        engine.open(start)
    outs = []
    for _ in range(3):
        q, k, v = (torch.randn(b, heads, 1, d, generator=generator).to(DEVICE) for heads in (hkv * group, hkv, hkv))
        if engine is None:
            k, v = (store.unpacked(store.packed(x)) for x in (k, v))
            arrivals = torch.zeros(b * hkv, dtype=torch.int32, device=DEVICE)
            out = decode_layer(
                q, k, v, keys, values, index, start, cfg, scale=0.25, sparse=True, arrivals=arrivals
            )  # fmt: skip
        else:
            out = decode_offloaded(q, k, v, engine, index, start, cfg, scale=0.25)
            engine.join()
        outs.append(out)
        start = start + 1
    if engine is not None:
        assert engine.stats().hit_rate < 1.0
    return outs


def test_the_ops_are_registered_as_pytorch_wants_them() -> None:
    store, pool, generator = make(1, 2, 8, 6, 8, torch.float32)
    lens = torch.tensor([60], device=DEVICE)
    ids = draw_ids(1, 2, 8, 3, torch.tensor([3]), generator).to(DEVICE)
    tables = [getattr(pool, name) for name in ops._TABLES]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.flex_tls.plan_residency.default, (ids, None, lens, lens, *tables, 1, SIZE, -1.0, False),
        test_utils=checks,
    )  # fmt: skip
    lists = [getattr(pool, name) for name in ops._LISTS]
    for store_dtype in ("model", "int8"):
        store, pool, _ = make(1, 2, 8, 6, 8, torch.float32, store_dtype=store_dtype)
        # On the device: opcheck works on copies, and a copy of pinned memory is not pinned
        scales = None if store.scales is None else store.scales.to(DEVICE)
        arguments = (store.rows.to(DEVICE), scales, pool.slots, pool.scales, *lists, 1, 2, True)
        torch.library.opcheck(torch.ops.flex_tls.transfer_blocks.default, arguments, test_utils=checks)
    arguments = (pool.slots.cpu(), pool.stalled.cpu())
    torch.library.opcheck(torch.ops.flex_tls.await_arrival.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.flex_tls.join_transfers.default, (pool.slots,), test_utils=checks)
