"""An engine against Python dictionaries, under everything that a cache does to it, transfers at any moment."""

from __future__ import annotations

import math

import pytest
import torch
from flex_tls.offload import OffloadConfig
from flex_tls.offload.config import StoreDtype
from flex_tls.offload.int8 import dequantised, quantised
from flex_tls.offload.pool import COUNTERS
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tests.offload.machine import SIZE, Model, listed, make_engine, poison, table

B, HKV, N, D, AHEAD = 2, 2, 12, 4, 2
CAPACITY = N * SIZE


class EngineMachine(RuleBasedStateMachine):
    """Append, select, fetch, evict, crop, reorder, later turns; a transfer may run at any moment before its join."""

    @initialize(
        policy=st.sampled_from(("async", "exact", "corrected")), resident=st.booleans(), n_slots=st.integers(5, N),
        store_dtype=st.sampled_from(("model", "int8")),
    )  # fmt: skip
    def begin(self, policy: str, resident: bool, n_slots: int, store_dtype: StoreDtype) -> None:
        config = OffloadConfig(policy=policy, attend_resident=resident and policy != "exact", missing_mass_bound=0.3)  # type: ignore[arg-type]
        self.engine, self.transfers = make_engine(
            config, b=B, hkv=HKV, n_blocks=N, n_slots=n_slots, d=D, n_ahead=AHEAD, store_dtype=store_dtype
        )
        self.pool, self.config, self.n_slots = self.engine.pool, config, n_slots
        self.keys, self.values = (torch.zeros(B, HKV, CAPACITY, D) for _ in range(2))
        self.lens = [0] * B
        self.models = {(b, h): Model(n_slots) for b in range(B) for h in range(HKV)}
        self.counts = torch.zeros(B, HKV, len(COUNTERS), dtype=torch.int64)
        self.opening = torch.zeros(B, HKV, dtype=torch.int64)
        self.has_waited = False
        self.generator = torch.Generator().manual_seed(0)

    def new(self, t: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.randn(B, HKV, t, D, generator=self.generator) for _ in range(2))
        int8 = self.engine.store.scales is not None
        self.held = [dequantised(*quantised(x), x.dtype) if int8 else x for x in (k, v)]
        for whole, new in zip((self.keys, self.values), self.held, strict=True):
            for b, n in enumerate(self.lens):
                whole[b, :, n : n + t] = new[b, :, : CAPACITY - n]
        return k, v

    def check_held(self, returned: tuple[Tensor, Tensor]) -> None:
        """What the layer goes on with is what the store holds."""
        assert all(torch.equal(*pair) for pair in zip(returned, self.held, strict=True))

    @rule(t=st.integers(1, 60))
    def read_a_chunk(self, t: int) -> None:
        t = min(t, CAPACITY - max(self.lens))
        if t:
            self.check_held(self.engine.write(*self.new(t), self.lens, [t] * B))
            for (b, _), model in self.models.items():
                model.drop_from(self.lens[b] // SIZE)
            self.lens = [n + t for n in self.lens]

    @precondition(lambda self: self.lens != [0] * B and max(self.lens) + AHEAD <= CAPACITY)
    @rule(data=st.data(), t=st.integers(1, AHEAD), wait=st.booleans(), early=st.integers(0, 5))
    def decode(self, data: st.DataObject, t: int, wait: bool, early: int) -> None:
        engine, pool = self.engine, self.pool
        if not engine.is_open:
            engine.open(torch.tensor(self.lens))
            for (b, h), model in self.models.items():
                before, _ = model.plan([], self.opened(self.lens[b], 0))
                n_fetched = len({*model.block_of_slot.values()} - {*before})
                self.count(b, h, fetched=n_fetched)
                self.opening[b, h] += n_fetched
        self.transfers.run(early)
        start = torch.tensor(self.lens)
        engine.join()
        self.check_held(engine.append(*self.new(t), start))
        self.lens = [n + t for n in self.lens]
        room = self.engine.selected_at_most
        width = max(1, room // t)
        ids = torch.full((B, HKV, t, width), N, dtype=torch.int32)
        for (b, h), model in self.models.items():
            held = [x for x in model.block_of_slot.values() if x * SIZE < self.lens[b]]
            for i in range(t):
                last = (self.lens[b] - t + i) // SIZE
                # Often what is there already, as real text does
                block = st.integers(0, last) | st.sampled_from([0, *[x for x in held if x <= last]])
                chosen = sorted(data.draw(st.sets(block, max_size=min(width, room // t))))
                ids[b, h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        scores = torch.randn(B, HKV, 3, N, generator=self.generator)
        lens = torch.tensor(self.lens)
        positions = lens[:, None] - t + torch.arange(t)
        kept, counts = engine.step(ids, scores, start, lens, positions, n_written=t, wait=wait)
        self.check_step(ids, scores, kept, counts, positions, t, wait)
        # The transfers may take any time, and leave anything in the slots until they are done
        for b in range(B):
            for h in range(HKV):
                if not pool.waits[b, h]:
                    poison(pool, (b, h, pool.fetch_slot[b, h, : int(pool.fetch_count[b, h])].long()))
        self.check_contents(kept)

    def opened(self, n: int, t: int) -> list[int]:
        return [x for x in range((n - t) // SIZE, (n + AHEAD - 1) // SIZE + 1) if x < N]

    def check_step(
        self, ids: Tensor, scores: Tensor, kept: Tensor, counts: Tensor, positions: Tensor, t: int, wait: bool
    ) -> None:
        for (b, h), model in self.models.items():
            each = [listed(ids[b, h, i], N) for i in range(t)]
            union = sorted({x for one in each for x in one})
            before, evicted = model.plan(union, self.opened(self.lens[b], t))
            assert not set(evicted) & set(union), "a selected block was a victim"
            absent = [x for x in union if x not in before]
            weight = scores[b, h][:, union].softmax(-1) if union else torch.zeros(3, 0)
            lost = float(weight[:, [union.index(x) for x in absent]].sum(-1).mean())
            bound = {"exact": -1.0, "async": 2.0, "corrected": 0.3}["exact" if wait else self.config.policy]
            waits = lost > bound
            assert bool(self.pool.waits[b, h]) == waits
            self.has_waited |= wait
            for i in range(t):
                want = [x for x in each[i] if waits or x in before]
                if self.config.attends_resident and not wait:
                    here = set(model.block_of_slot.values()) & (set(before) | (set(union) if waits else set()))
                    if waits:
                        # What the row waited for includes the blocks of tokens to come
                        here = set(model.block_of_slot.values())
                    want = sorted(x for x in here - set(evicted) if x <= int(positions[b, i]) // SIZE)
                assert listed(kept[b, h, i], N) == want
                assert int(counts[b, h, i]) == len(want)
            self.count(
                b, h, steps=len(union) > 0, selected=len(union), missing=len(absent),
                fetched=len({*model.block_of_slot.values()} - {*before}), waits=waits and len(absent) > 0, written=t,
            )  # fmt: skip

    def count(self, b: int, h: int, **more: int) -> None:
        for name, n in more.items():
            self.counts[b, h, COUNTERS.index(name)] += n

    def check_contents(self, kept: Tensor) -> None:
        """What a step attends to is what was written."""
        for b, h in self.models:
            for block in {x for one in kept[b, h] for x in listed(one, N)}:
                n = min(SIZE, self.lens[b] - block * SIZE)
                at = b, h, int(self.pool.slot_of_block[b, h, block])
                slot = self.pool.unpacked(tuple(x[at] for x in self.pool.parts))
                tokens = slice(block * SIZE, block * SIZE + n)
                assert torch.equal(slot[:n, 0], self.keys[b, h, tokens])
                assert torch.equal(slot[:n, 1], self.values[b, h, tokens])

    @rule(n=st.integers(1, 4))
    def some_transfers_run(self, n: int) -> None:
        self.transfers.run(n)

    @rule(less=st.lists(st.integers(0, 40), min_size=B, max_size=B))
    def crop(self, less: list[int]) -> None:
        self.lens = [max(0, n - x) for n, x in zip(self.lens, less, strict=True)]
        self.engine.cut(self.lens)
        for (b, _), model in self.models.items():
            model.drop_from(-(-self.lens[b] // SIZE))

    @rule(rows=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
    def reorder(self, rows: list[int]) -> None:
        self.engine.take_rows(torch.tensor(rows), max(self.lens))
        self.keys, self.values, self.lens = self.keys[rows], self.values[rows], [self.lens[i] for i in rows]
        old = self.models
        self.models = {
            (b, h): Model(self.n_slots, dict(m.block_of_slot), dict(m.last_used), m.clock)
            for b in range(B) for h in range(HKV) for m in [old[rows[b], h]]
        }  # fmt: skip
        self.counts, self.opening = self.counts[rows], self.opening[rows]

    @rule()
    def start_again(self) -> None:
        self.engine.reset()
        self.lens = [0] * B
        self.models = {place: Model(self.n_slots) for place in self.models}
        self.counts.zero_()
        self.opening.zero_()

    @invariant()
    def blocks_and_slots_are_a_bijection(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            for (b, h), model in self.models.items():
                assert table(self.pool, b, h) == model.block_of_slot

    @invariant()
    def counters_add_up(self) -> None:
        """Each row's and head's; a row that is copied takes its counts along."""
        if hasattr(self, "engine"):
            assert torch.equal(self.pool.counters, self.counts)
            assert torch.equal(self.pool.opening, self.opening)
            stats, block_bytes = self.engine.stats(), self.engine.store.block_bytes
            fetched = int(self.counts[..., COUNTERS.index("fetched")].sum())
            assert stats.bytes_in == fetched * block_bytes
            if stats.steps:
                assert stats.step_bytes_in == (fetched - int(self.opening.sum())) * block_bytes / stats.steps

    @invariant()
    def who_never_waits_is_never_stalled(self) -> None:
        if hasattr(self, "engine") and not self.has_waited:
            assert self.config.may_wait or not bool(self.pool.stalled.any())

    def teardown(self) -> None:
        """After the last join the store holds every token."""
        if hasattr(self, "engine"):
            self.engine.join()
            for b, n in enumerate(self.lens):
                assert torch.equal(self.engine.store.keys[b, :, :n], self.keys[b, :, :n])
                assert torch.equal(self.engine.store.values[b, :, :n], self.values[b, :, :n])


TestEngine = EngineMachine.TestCase


def test_the_pool_must_hold_what_a_step_selects_and_writes() -> None:
    engine, _ = make_engine(OffloadConfig(), n_slots=5)
    lens = torch.tensor([100, 100])
    engine.write(torch.zeros(2, 2, 100, 4), torch.zeros(2, 2, 100, 4), [0, 0], [100, 100])
    engine.open(lens)
    ids = torch.zeros(2, 2, 1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected at most 3 selected blocks a step \(a pool of 5 slots, 2 of them"):
        engine.step(ids, None, lens - 1, lens, lens[:, None] - 1, n_written=1)


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
def test_the_bytes_of_a_step_leave_out_prompt_and_opening(store_dtype: StoreDtype) -> None:
    engine, _ = make_engine(OffloadConfig(), store_dtype=store_dtype)
    prompt = torch.zeros(2, 2, 100, 4)
    engine.write(prompt, prompt, [0, 0], [100, 100])
    token_bytes = 2 * (4 + 4) if store_dtype == "int8" else 2 * 4 * 4
    lens = torch.tensor([100, 100])
    engine.open(lens)
    # Of four rows and heads: the block of the next two tokens
    opening, prompt_bytes = 4 * SIZE * token_bytes, 4 * 100 * token_bytes
    before = engine.stats()
    assert (before.bytes_in, before.bytes_out, before.steps) == (opening, prompt_bytes, 0)
    assert math.isnan(before.step_bytes_in)
    assert math.isnan(before.step_bytes_out)
    for blocks in ([0, 1], [0, 2], [0, 2], [0, 1]):
        engine.join()
        engine.append(prompt[:, :, :1], prompt[:, :, :1], lens)
        lens = lens + 1
        ids = torch.tensor(blocks, dtype=torch.int32).expand(2, 2, 1, 2)
        engine.step(ids, None, lens - 1, lens, lens[:, None] - 1, n_written=1)
    after = engine.stats()
    # Blocks 0, 1 and 2 came once each, in four steps
    assert after.step_bytes_in == 4 * 3 * SIZE * token_bytes / 4
    assert after.step_bytes_out == 4 * token_bytes
    assert after.bytes_in == opening + 4 * after.step_bytes_in
    assert after.bytes_out == prompt_bytes + 4 * after.step_bytes_out


def test_tokens_are_appended_to_an_open_engine_only() -> None:
    engine, _ = make_engine(OffloadConfig())
    token = torch.zeros(2, 2, 1, 4)
    with pytest.raises(RuntimeError, match="expected an open engine and at most 2 tokens, got 1"):
        engine.append(token, token, torch.tensor([0, 0]))


def test_a_row_that_is_copied_takes_its_counts_along() -> None:
    engine, _ = make_engine(OffloadConfig())
    engine.pool.counters[1] = 3
    engine.take_rows(torch.tensor([1, 1]), 0)
    assert bool((engine.pool.counters == 3).all())
