"""Whole models over a pool of block slots: late transfers, slots of NaN, second runs, and steps that break off."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flex_tls as tls
from flex_tls import fused_pool
from tests.integrations.models import SPARSE, make, prompts
from tests.integrations.watched import come_late, generated
from tests.offload.machine import poison

# A step that is interpreted takes ten seconds: on a CPU tests/offload/test_engine.py and test_offload.py do the like
pytestmark = pytest.mark.cuda
LENS, N_STEPS = (250, 180), 24
# A fifth of what such a step selects is not there: three of its four blocks are fixed, seven slots are the fewest
CFG = dataclasses.replace(SPARSE, block_budget=64)


def offload(policy: Any) -> tls.OffloadConfig:
    return tls.OffloadConfig(policy=policy, gpu_blocks=7, missing_mass_bound=0.2)


class Case(NamedTuple):
    """A model, a cache whose steps are compiled, and what N_STEPS of them gave: whole sequence and logits."""

    model: Any
    cache: tls.TLSCache
    inputs: dict[str, Tensor]
    tokens: Tensor
    logits: Tensor

    @property
    def waits_for_all(self) -> bool:
        """Whether the policy is "exact", which what happened before does not change."""
        return self.cache.offload_config is not None and self.cache.offload_config.policy == "exact"

    def forget(self) -> None:
        """Empty the cache, and leave nothing in host memory that :meth:`check` could take for new."""
        self.cache.reset()
        for layer in self.cache.offloaded_layers:
            layer.opened().synchronize()
            layer.opened().store.rows.zero_()

    def again(self) -> tuple[Tensor, Tensor]:
        """The same generation, from a cache that forgot the last one."""
        self.forget()
        return generated(self.model, self.cache, self.inputs, N_STEPS)

    def whole(self, ids: Tensor, n_new: int, **options: Any) -> Tensor:
        """``tls.generate`` from ``ids``, whose beginning the cache may hold."""
        mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, ids.shape[1] - LENS[0]), value=1)
        return tls.generate(
            self.model, ids, attention_mask=mask, cache=self.cache, max_new_tokens=n_new, compiled=True, **options
        )

    def check(self) -> None:
        """Tables are whole, and every token that is counted has reached the host."""
        for layer in self.cache.offloaded_layers:
            engine = layer.opened()
            engine.synchronize()
            engine.check_integrity()
            for row, held in enumerate(self.cache.seq_lens):
                assert bool(engine.store.keys[row, :, :held].abs().sum(-1).gt(0).all())


@pytest.fixture(scope="module", params=["async", "exact"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """One compiled step for all tests of a policy. Its prompts are ragged, and its tokens outgrow no fit."""
    model = make("qwen3").cuda()
    inputs = {name: x.cuda() for name, x in prompts(*LENS).items()}
    cache = tls.TLSCache(model.config, CFG, batch_size=2, max_len=300, offload=offload(request.param))
    found = generated(model, cache, inputs, N_STEPS)
    assert all(stats.hit_rate < 1.0 for stats in cache.stats().values())
    yield Case(model, cache, inputs, *found)
    cache.close()


def test_the_same_generation_again_gives_the_same_bits(case: Case) -> None:
    tokens, logits = case.again()
    assert bool(logits.isfinite().all())
    assert torch.equal(tokens, case.tokens)
    assert torch.equal(logits, case.logits)


def test_a_slot_that_nothing_was_written_to_is_never_read(case: Case) -> None:
    case.forget()
    for layer in case.cache.offloaded_layers:
        poison(layer.opened().pool)
    tokens, logits = generated(case.model, case.cache, case.inputs, N_STEPS)
    assert bool(logits.isfinite().all())
    assert torch.equal(tokens, case.tokens)
    assert torch.equal(logits, case.logits)


def test_late_transfers_change_no_bit_of_a_captured_generation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot is NaN until its block is there."""
    come_late(monkeypatch)
    tokens, logits = case.again()
    assert torch.equal(tokens, case.tokens)
    assert torch.equal(logits, case.logits)
    # They were late indeed, and the policy that never waits did not
    for stats in case.cache.stats().values():
        assert stats.stall_us > 8_000 if case.waits_for_all else stats.stall_us == 0.0
    case.check()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_compiled_generation_goes_on(case: Case, error: type[BaseException]) -> None:
    """With "exact" as if nothing had been; with "async", which begins anew with what is there, always in one way."""

    class Stops:
        left = 4

        def put(self, value: Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise error

    ids, n_all = case.inputs["input_ids"], LENS[0] + N_STEPS + 1
    found = []
    for _ in range(2):
        case.forget()
        with pytest.raises(error):
            case.whole(ids, N_STEPS + 1, streamer=Stops())
        held = case.cache.get_seq_length()
        # The steps that were under way count, those to come do not
        assert LENS[0] + 2 < held < n_all - 1
        case.check()
        found.append(case.whole(case.tokens[:, : held + 1], n_all - held - 1))
        assert case.cache.get_seq_length() == n_all - 1
        case.check()
    assert torch.equal(*found)
    if case.waits_for_all:
        assert torch.equal(found[0], case.tokens)


def test_a_compiled_step_that_fails_between_fork_and_join_leaves_a_cache_that_goes_on(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second layer, its transfers and those of the first still on their way."""
    launch, calls = fused_pool.launch, []

    def fails(*arguments: Any, **options: Any) -> Any:
        if options.get("given") is not None:
            calls.append(options)
            if len(calls) == 2:
                raise RuntimeError("after the fork")
        return launch(*arguments, **options)

    case.forget()
    with monkeypatch.context() as patch:
        come_late(patch)
        patch.setattr(fused_pool, "launch", fails)
        with pytest.raises(RuntimeError, match="after the fork"):
            case.whole(case.inputs["input_ids"], N_STEPS + 1)
    assert case.cache.seq_lens == list(LENS)
    case.check()
    rest = case.whole(case.tokens[:, : LENS[0] + 1], N_STEPS)
    case.check()
    if case.waits_for_all:
        assert torch.equal(rest, case.tokens)
    # And forgets it
    assert torch.equal(case.again()[1], case.logits)


def test_a_cache_saved_behind_compiled_steps_holds_what_they_appended(case: Case, tmp_path: Path) -> None:
    """The last token is still on its way to the host when they end. With "exact" it goes on as it would have."""
    case.forget()
    first = case.whole(case.inputs["input_ids"], 6)
    case.cache.save(tmp_path / "document")
    loaded = tls.TLSCache.load(
        tmp_path / "document", case.model.config, device=first.device, offload=case.cache.offload_config
    )  # fmt: skip
    assert loaded.seq_lens == case.cache.seq_lens == [n + 5 for n in LENS]
    for layers in zip(loaded.tls_layers, case.cache.tls_layers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(*(x.held(LENS[0] + 5) for x in layers), strict=True))
    if case.waits_for_all:
        n_more = N_STEPS + 1 - 6
        assert torch.equal(case.whole(first, n_more), case.tokens)
        assert torch.equal(case._replace(cache=loaded).whole(first, n_more), case.tokens)
    loaded.close()


BROKEN_RECORDING = """
import torch
import flex_tls as tls
from flex_tls import fused_pool
from tests.integrations.models import SPARSE, make, prompts

model, ids = make("qwen3").cuda(), prompts(90)["input_ids"].cuda()
cache = tls.TLSCache(model.config, SPARSE, max_len=130, offload=tls.OffloadConfig(policy="exact"))
run = lambda: tls.generate(model, ids, cache=cache, max_new_tokens=8)
want, stream, launch, recorded = run(), torch.cuda.current_stream(), fused_pool.launch, []

def fails(*arguments, **options):
    if options.get("given") is not None and torch.cuda.is_current_stream_capturing():
        recorded.append(options)
        if len(recorded) == 2:
            raise RuntimeError("after the fork")
    return launch(*arguments, **options)

fused_pool.launch = fails
cache.reset()
try:
    run()
except RuntimeError as error:
    assert str(error) == "after the fork", error
else:
    raise AssertionError("nothing failed")
fused_pool.launch = launch
assert torch.cuda.current_stream() == stream
assert cache.seq_lens == [90]
cache.reset()
assert torch.equal(run(), want)
cache.close()
"""


def test_a_graph_that_breaks_off_between_fork_and_join_while_it_is_recorded_harms_nothing() -> None:
    """In a process of its own: a capture that could not end would leave all later tests on its stream."""
    subprocess.run([sys.executable, "-c", BROKEN_RECORDING], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("policy", ["async", "exact", "corrected"])
def test_late_transfers_change_no_bit_of_an_eager_generation(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen3").cuda()
    inputs = {name: x.cuda() for name, x in prompts(*LENS).items()}
    cache = tls.TLSCache(model.config, CFG, batch_size=2, max_len=300, backend="reference", offload=offload(policy))
    tls.enable(model)

    @torch.no_grad()
    def run() -> Tensor:
        cache.reset()
        outs = [model(**inputs, past_key_values=cache).logits[:, -1]]
        for i in range(12):
            position = torch.tensor(cache.seq_lens, device="cuda")[:, None]
            token = torch.full((2, 1), 5 + i, device="cuda")
            outs.append(model(token, position_ids=position, past_key_values=cache).logits[:, -1])
        return torch.stack(outs)

    want = run()
    assert bool(want.isfinite().all())
    assert torch.equal(run(), want)
    come_late(monkeypatch)
    assert torch.equal(run(), want)
    for stats in cache.stats().values():
        assert stats.hit_rate < 1.0
        assert stats.stall_us > 8_000 if policy != "async" else stats.stall_us == 0.0
    cache.close()
