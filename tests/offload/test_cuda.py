"""The engine on a GPU: captured, traced, raced, and given back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flex_tls.offload import DevicePool, HostStore, LayerOffload, OffloadConfig, RowReader, make_transfers, ops
from flex_tls.offload.transfers import side_stream, urgent_stream
from torch import Tensor

import flex_tls as tls
from flex_tls import offloaded_layer
from flex_tls.pages import Pages
from tests.integrations.models import SPARSE, make, prompts
from tests.integrations.watched import come_late
from tests.offload.machine import poison
from tests.offload.registry import count_page_locked

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")
B, HKV, N, P, SIZE, D, K = 2, 4, 64, 20, 64, 128, 8


def engine(config: OffloadConfig, n_tokens: int = 3000) -> LayerOffload:
    """An open engine over random keys and values; every slot that holds nothing is NaN."""
    shape: dict[str, Any] = {
        "batch_size": B, "n_kv_heads": HKV, "n_blocks": N, "block_size": SIZE, "head_dim": D, "dtype": torch.bfloat16,
    }  # fmt: skip
    store = HostStore(**shape, pinned=True, store_dtype=config.store_dtype)
    pool = DevicePool(**shape, n_slots=P, device=DEVICE, store_dtype=config.store_dtype)
    poison(pool)
    made = LayerOffload(store, pool, config, 1, make_transfers(DEVICE, config))
    torch.manual_seed(0)
    k, v = (torch.randn(B, HKV, n_tokens, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    made.write(k, v, [0] * B, [n_tokens] * B)
    made.open(torch.full((B,), n_tokens, device=DEVICE))
    return made


class Step:
    """One step with inputs at fixed addresses: selected blocks, scores, new tokens; it returns what was attended to."""

    def __init__(self, layer: LayerOffload, n_tokens: int = 3000) -> None:
        self.layer = layer
        self.ids = torch.zeros(B, HKV, 1, K, dtype=torch.int32, device=DEVICE)
        self.scores = torch.zeros(B, HKV, 4, N, device=DEVICE)
        self.start = torch.full((B,), n_tokens, device=DEVICE)
        self.k, self.v = (torch.zeros(B, HKV, 1, D, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        self.random = torch.Generator(DEVICE).manual_seed(1)

    def draw(self) -> None:
        """Other inputs, half of the blocks as before: as local as text."""
        own = (self.start // SIZE)[:, None, None]
        weight = torch.rand(B, HKV, N, generator=self.random, device=DEVICE)
        weight.scatter_add_(2, self.ids[:, :, 0].long(), torch.full(self.ids[:, :, 0].shape, 0.5, device=DEVICE))
        weight = weight.masked_fill(torch.arange(N, device=DEVICE) > own, -1.0)
        weight.scatter_(2, own.expand(-1, HKV, -1), 9.0)
        self.ids.copy_(weight.topk(K).indices.sort().values[:, :, None])
        self.scores.copy_(torch.rand(B, HKV, 4, N, generator=self.random, device=DEVICE) * 3)
        for x in (self.k, self.v):
            x.copy_(torch.randn(x.shape, generator=self.random, device=DEVICE))

    def run(self) -> Tensor:
        """Append, plan, fork, and read the blocks to attend to while transfers run: [B, HKV, K * SIZE, D]."""
        layer, pool = self.layer, self.layer.pool
        layer.append(self.k, self.v, self.start)
        lens = self.start + 1
        ids, _ = layer.step(self.ids, self.scores, self.start, lens, lens[:, None] - 1, n_written=1)
        pages = Pages(pool.slot_of_block, pool.block_of_slot, SIZE)
        slot = torch.nn.functional.pad(pages.slot_of_block, (0, 1), value=-1).gather(2, ids[:, :, 0].long())
        at = slot.long().clamp_min(0)[..., None] * SIZE + torch.arange(SIZE, device=DEVICE)
        read = pool.keys.gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, D))
        return read.masked_fill((slot < 0).repeat_interleave(SIZE, 2)[..., None], 0.0)


def eager(step: Step, n: int) -> list[Tensor]:
    outs = []
    for _ in range(n):
        step.draw()
        outs.append(step.run())
        step.layer.join()
        step.start += 1
    torch.cuda.synchronize()
    return outs


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one step and its join; warmed up on an engine of its own, so that ``step`` has seen nothing."""
    other = Step(engine(step.layer.config))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other.draw()
        other.run()
        other.layer.join()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.run()
        step.layer.join()
    return graph, out


@pytest.mark.parametrize(
    ("policy", "store_dtype"),
    [("async", "model"), ("exact", "model"), ("corrected", "model"), ("async", "int8"), ("exact", "int8")],
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_captured_step_does_what_an_eager_one_does(policy: Any, store_dtype: Any) -> None:
    """Without synchronising, and without asking the driver for memory."""
    config = OffloadConfig(policy=policy, missing_mass_bound=0.3, store_dtype=store_dtype)
    want = eager(Step(engine(config)), 20)
    step = Step(engine(config))
    step.draw()
    step.random.manual_seed(1)
    graph, out = captured(step)
    step.ids.zero_()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["num_device_alloc"]
    got = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step.draw()
            graph.replay()
            step.start += 1
            got.append(out.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] - allocated <= 20
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert not torch.stack(got).isnan().any()
    step.layer.check_integrity()
    stats = step.layer.stats()
    assert stats.hit_rate < 1.0
    # Blocks cross the link; rows that wait stall their layer, by some microseconds at least
    assert stats.stall_us > 1.0 if config.may_wait else stats.stall_us == 0.0


@pytest.mark.parametrize("policy", ["async", "exact"])
def test_slow_transfers_change_nothing_but_how_long_a_step_waits(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of milliseconds before every transfer, on the stream whose blocks a step may wait for or the other."""
    config = OffloadConfig(policy=policy)
    want = eager(Step(engine(config)), 12)
    launch = ops.transfer_blocks

    def late(*arguments: Any) -> None:
        stream = urgent_stream(DEVICE) if config.may_wait else side_stream(DEVICE)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
        launch(*arguments)

    step = Step(engine(config))
    monkeypatch.setattr(ops, "transfer_blocks", late)
    got = eager(step, 12)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    stall_us = step.layer.stats().stall_us
    # 50 million cycles at two and a half gigahertz at most
    assert stall_us > 20_000 if config.may_wait else stall_us == 0.0


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_the_store_holds_every_token_after_the_join(store_dtype: Any) -> None:
    step = Step(engine(OffloadConfig(store_dtype=store_dtype)))
    tokens: list[Tensor] = []
    for _ in range(70):
        step.draw()
        tokens.append(step.layer.store.unpacked(step.layer.store.packed(step.k.clone())))
        step.run()
        step.layer.join()
        step.start += 1
    step.layer.synchronize()
    assert torch.equal(step.layer.store.keys[:, :, 3000:3070], torch.cat(tokens, 2).cpu())


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_copies_do_what_the_kernel_does(store_dtype: Any) -> None:
    steps = [Step(engine(OffloadConfig(transfer=way, store_dtype=store_dtype))) for way in ("kernel", "copy")]  # type: ignore[arg-type]
    outs = [eager(step, 12) for step in steps]
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))
    for held in ([step.layer.store for step in steps], [step.layer.pool for step in steps]):
        first, second = ([x.nan_to_num() for x in blocks.parts] for blocks in held)
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_a_row_is_read_back_as_it_was_written(store_dtype: Any) -> None:
    """What a prompt's next chunk attends to, and what an index is fitted on, in pieces."""
    store = engine(OffloadConfig(store_dtype=store_dtype)).store
    torch.cuda.synchronize()
    pieces = [torch.stack(piece) for piece in RowReader(store, DEVICE, 700).read(store, 1, 3000)]
    both = torch.stack((store.keys, store.values))
    assert torch.equal(torch.cat(pieces, 2).cpu(), both[:, 1, :, :3000])
    keys = torch.cat([x.clone() for x in store.read_keys(3000, 700, DEVICE)], 2)
    assert torch.equal(keys.cpu(), store.keys[:, :, :3000])


def test_plan_fork_and_join_trace_into_one_graph() -> None:
    layer, other = engine(OffloadConfig()), Step(engine(OffloadConfig()))
    step = Step(layer)
    step.draw()
    other.draw()

    @torch.compile(fullgraph=True, dynamic=False)
    def traced(ids: Tensor, scores: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        pool = layer.pool
        kept = ops.plan(
            pool, ids * 1, scores + 0, start, start + 1, n_ahead=1, waits_above=float("inf"), resident_too=False
        )
        ops.transfer(layer.store, pool, n_written=1, n_programs=32, may_wait=False)
        ops.join(pool)
        return kept

    layer.append(step.k, step.v, step.start)
    ids, counts = traced(step.ids[:, :, 0], step.scores, step.start)
    other.run()
    other.layer.synchronize()
    layer.synchronize()
    assert torch.equal(layer.pool.slot_of_block, other.layer.pool.slot_of_block)
    held = layer.pool.block_of_slot >= 0
    assert torch.equal(layer.pool.slots[held], other.layer.pool.slots[held])
    assert torch.equal((ids < N).sum(-1, dtype=torch.int32), counts)


@pytest.mark.parametrize(
    ("reference", "offload"),
    [
        (None, OffloadConfig(policy="exact")),
        (None, OffloadConfig(policy="exact", transfer="copy")),
        (OffloadConfig(policy="exact", gpu_blocks=14, transfer="copy", store_dtype="int8"),
         OffloadConfig(policy="exact", gpu_blocks=6, store_dtype="int8")),
    ],
)  # fmt: skip
def test_generate_with_offload_gives_the_tokens_without(
    reference: OffloadConfig | None, offload: OffloadConfig
) -> None:
    """Left-padded rows, a prompt in chunks over a streamed past, another turn; float32. In 8 bits: a larger pool."""
    model, inputs = make("qwen3").to(DEVICE), {name: x.to(DEVICE) for name, x in prompts(90, 41).items()}
    outs = []
    for each in (reference, offload):
        cache = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=220, backend="flex", offload=each)
        tls.enable(model)
        with torch.no_grad():
            model(
                inputs["input_ids"][:, :60], attention_mask=inputs["attention_mask"][:, :60], past_key_values=cache,
                position_ids=(inputs["attention_mask"][:, :60].cumsum(1) - 1).clamp_min(0),
            )  # fmt: skip
        tls.disable(model)
        run: Callable[..., Tensor] = lambda ids, mask, cache=cache: tls.generate(  # noqa: E731
            model, ids, attention_mask=mask, cache=cache, max_new_tokens=12, compiled=False
        )
        first = run(inputs["input_ids"], inputs["attention_mask"])
        more = torch.cat([first, inputs["input_ids"][:, -30:]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 90:])], 1)
        outs.append(run(more, mask))
    assert torch.equal(*outs)


def test_a_hundred_caches_leave_no_byte_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does any on the host stay page-locked."""
    registry = count_page_locked(monkeypatch, "cuda")
    model, ids = make("llama").to(DEVICE), prompts(60)["input_ids"].to(DEVICE)
    tls.enable(model)
    held = []
    for i in range(100):
        cache = tls.TLSCache(model.config, SPARSE, max_len=100, offload=OffloadConfig(), backend="reference")
        if i % 10 == 0:
            with torch.no_grad():
                model(ids, past_key_values=cache)
                model(ids[:, :1], past_key_values=cache)
            assert registry.nbytes == cache.host_nbytes > 0
        cache.close()
        assert registry.held == {}
        del cache
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[10]


def test_a_store_that_is_collected_waits_for_its_transfers() -> None:
    layer = engine(OffloadConfig())
    side = side_stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
    assert not side.query()
    del layer
    gc.collect()
    assert side.query()


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "closed"])
@pytest.mark.parametrize("policy", ["async", "exact"])
def test_a_step_that_fails_between_fork_and_join_leaves_no_stream_hanging_and_no_byte_behind(
    policy: Any, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks off while its transfers are on their way, tens of milliseconds late."""
    model, ids = make("llama").to(DEVICE), prompts(90)["input_ids"].to(DEVICE)
    tls.enable(model)

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("after the fork")

    @torch.no_grad()
    def life(broken: bool) -> list[Tensor]:
        cache = tls.TLSCache(
            model.config, SPARSE, max_len=120, offload=OffloadConfig(policy=policy), backend="reference"
        )
        model(ids, past_key_values=cache)
        outs = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        if broken:
            with monkeypatch.context() as patch:
                come_late(patch, cycles=100_000_000)
                patch.setattr(offloaded_layer, "attend_pages", fails)
                with pytest.raises(RuntimeError, match="after the fork"):
                    model(ids[:, 3:4], past_key_values=cache)
                assert not side_stream(DEVICE).query()
        if goes_on:
            outs += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 6)]
            cache.offloaded_layers[0].opened().check_integrity()
            assert cache.seq_lens == [96]
        stores = [layer.opened().store.rows for layer in cache.offloaded_layers]
        assert all(rows.is_pinned() for rows in stores)
        cache.close()
        # Whatever was on its way has come to its end, and the device reads this memory no more
        assert side_stream(DEVICE).query()
        assert urgent_stream(DEVICE).query()
        assert not any(rows.is_pinned() for rows in stores)
        return [out.cpu() for out in outs]

    def device_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    want = life(False)
    before = device_bytes()
    got = life(True)
    assert device_bytes() == before
    assert all(bool(out.isfinite().all()) for out in got)
    if policy == "exact":
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in zip(got, want, strict=True))
