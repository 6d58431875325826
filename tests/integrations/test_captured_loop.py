"""The whole loop on a GPU: a step is one graph, waits for nothing, allocates nothing, compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import flex_tls as tls
from flex_tls.capture import captured
from flex_tls.decode import LAG, Loop
from flex_tls.integrations.huggingface import enabled
from flex_tls.prefill import read_prompt
from flex_tls.stopping import Stops
from tests.integrations.models import SPARSE, make, prompts, tokenizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle:UserWarning"),
]

# Fewer than would outgrow the fit of the prompt's 90 tokens: fitting anew synchronises, and comes once in 4,096 tokens
STEPS = 250
SAMPLINGS = {
    "greedy": None,
    "sampled": tls.Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1),
}


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def device_mallocs() -> int:
    found: int = torch.cuda.memory_stats()["num_device_alloc"]
    return found


def started(sampling: tls.Sampling | None, offload: tls.OffloadConfig | None = None) -> tuple[Loop, Any]:
    """A loop behind a prompt of ragged rows, with stop strings, and its steps; sparse from the first."""
    model = make("qwen3").cuda()
    inputs = {name: x.cuda() for name, x in prompts(90, 64).items()}
    ids = inputs["input_ids"]
    cache = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=90 + STEPS + 50, offload=offload)
    # Neither can occur: rows go on to the end, and are looked at in every step
    stops = Stops(ids, [500], ["no such string"], tokenizer())
    loop = Loop(model, cache, ids, sampling, stops, seed=None if sampling is None else 0)
    with torch.no_grad(), enabled(model):
        loop.next(read_prompt(model, cache, ids, inputs["attention_mask"]))
    return loop, loop.compiled_steps(STEPS + 3 * LAG)


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_a_step_waits_for_nothing_allocates_nothing_and_compiles_nothing(sampling: str) -> None:
    loop, steps = started(SAMPLINGS[sampling])
    with torch.no_grad(), enabled(loop.model):
        # Builds the step, and brings the host to its place behind the device
        for _ in range(2 * LAG):
            next(steps)
        graphs, mallocs = torch._dynamo.utils.counters["stats"]["unique_graphs"], device_mallocs()
        with no_synchronisation():
            seen = [next(steps) for _ in range(STEPS)]
        assert device_mallocs() == mallocs
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        steps.close()
    assert len({tuple(report[0].tolist()) for report in seen}) > 10
    assert loop.cache.seq_lens == [n + STEPS + 3 * LAG for n in (90, 64)]


def calls_of(steps: Any, n: int) -> dict[str, int]:
    """How often ``n`` steps call what, by the profiler."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(n):
            next(steps)
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in profile.events():
        counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def test_a_step_is_one_graph_launch() -> None:
    loop, steps = started(None)
    n = 20
    with torch.no_grad(), enabled(loop.model):
        for _ in range(2 * LAG):
            next(steps)
        counts = calls_of(steps, n)
        steps.close()
    assert counts.get("cudaGraphLaunch") == n
    assert not [name for name in counts if "LaunchKernel" in name], counts


@pytest.mark.parametrize(("policy", "sampling"), [("async", "sampled"), ("exact", "greedy"), ("corrected", "sampled")])
def test_a_step_over_host_memory_is_one_graph_launch_that_waits_for_nothing(policy: Any, sampling: str) -> None:
    """As without offload: no synchronisation, allocation or compilation; plan, transfers and join are in the graph."""
    # A bound that random weights often pass, and often do not
    loop, steps = started(SAMPLINGS[sampling], tls.OffloadConfig(policy=policy, missing_mass_bound=0.2))
    n = 20
    with torch.no_grad(), enabled(loop.model):
        for _ in range(2 * LAG):
            next(steps)
        graphs, mallocs = torch._dynamo.utils.counters["stats"]["unique_graphs"], device_mallocs()
        with no_synchronisation():
            seen = [next(steps) for _ in range(STEPS - n)]
        assert device_mallocs() == mallocs
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        # Last: the profiler itself allocates
        counts = calls_of(steps, n)
        steps.close()
    assert counts.get("cudaGraphLaunch") == n
    # Where a graph draws, PyTorch writes its generator's seed and offset before each replay
    fills = 0 if SAMPLINGS[sampling] is None else 2 * n
    assert sum(count for name, count in counts.items() if "LaunchKernel" in name) == fills, counts
    assert len({tuple(report[0].tolist()) for report in seen}) > 10
    assert loop.cache.seq_lens == [n + STEPS + 3 * LAG for n in (90, 64)]
    for layer, stats in zip(loop.cache.offloaded_layers, loop.cache.stats().values(), strict=True):
        layer.opened().check_integrity()
        assert stats.steps == STEPS + 3 * LAG
        # Blocks did cross the link, and only who may wait did
        assert stats.hit_rate < 1.0
        assert (stats.waits > 0.0) == (policy != "async")


def test_prompts_of_other_lengths_compile_nothing_over_many_tokens() -> None:
    model = make("qwen3").cuda()
    cache = tls.TLSCache(model.config, SPARSE, max_len=1200)
    graphs = torch._dynamo.utils.counters["stats"]

    def run(length: int, n: int) -> int:
        cache.reset()
        tls.generate(model, prompts(length)["input_ids"].cuda(), cache=cache, max_new_tokens=n)
        return graphs["unique_graphs"]

    first = run(60, 8)
    assert [run(length, 8) for length in (61, 90, 333)] == [first] * 3
    # Outgrows its fit on the way: labels are fitted anew, nothing is compiled
    assert run(70, 1000) == first


def test_rows_end_at_their_stop_strings_as_in_eager_steps() -> None:
    model, words = make("qwen3").cuda(), tokenizer()
    inputs = {name: x.cuda() for name, x in prompts(90, 64).items()}

    def run(compiled: bool, **options: Any) -> torch.Tensor:
        cache = tls.TLSCache(model.config, SPARSE, batch_size=2, max_len=160)
        return tls.generate(
            model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=40,
            compiled=compiled, **options,
        )  # fmt: skip

    free = run(True)
    assert torch.equal(run(False), free)
    # A string for each row: they end at different steps, and one is padded
    strings = [words.decode(free[row, 90 + at : 92 + at].tolist()) for row, at in ((0, 6), (1, 15))]
    stopped = run(True, stop_strings=strings, tokenizer=words)
    assert torch.equal(run(False, stop_strings=strings, tokenizer=words), stopped)
    assert stopped.shape[1] < free.shape[1]


def test_a_seed_gives_the_same_tokens_again() -> None:
    model = make("qwen3").cuda()
    ids = prompts(90)["input_ids"].cuda()

    def run(seed: int) -> list[int]:
        cache = tls.TLSCache(model.config, SPARSE, max_len=160)
        out = tls.generate(model, ids, cache=cache, max_new_tokens=40, sampling=SAMPLINGS["sampled"], seed=seed)
        tokens: list[int] = out[0, 90:].tolist()
        return tokens

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_replay_draws_what_the_generator_says_however_late_the_capture_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a capture PyTorch sets a registered generator's seed and offset, on the capture's stream."""
    generator = torch.Generator("cuda").manual_seed(0)
    torch.rand(1, device="cuda", generator=generator)
    same = generator.clone_state()
    x = torch.zeros(8, device="cuda")
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(*args: Any, **options: Any) -> None:
        torch.cuda._sleep(5 * 10**8)
        begin(*args, **options)

    def draw() -> None:
        # A replay has set them on its own stream by then, and the capture's come, if nothing orders the two
        torch.cuda._sleep(2 * 10**9)
        x.copy_(torch.rand(8, device="cuda", generator=generator))

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    captured(draw, [x], generator)()
    assert torch.equal(x, torch.rand(8, device="cuda", generator=same))


def test_tuned_fused_and_skinny_steps_give_the_same_tokens() -> None:
    model = make("qwen3").cuda()
    ids = prompts(90)["input_ids"].cuda()

    def run(**options: Any) -> torch.Tensor:
        return tls.generate(
            model, ids, cache=tls.TLSCache(model.config, SPARSE, max_len=160), max_new_tokens=20, **options
        )

    want = run()
    tls.fuse_projections(model)
    assert torch.equal(run(inductor_options={"coordinate_descent_tuning": True}), want)
    tls.unfuse_projections(model)
    tls.fuse_projections(model, skinny=True)
    assert torch.equal(run(), want)
    # Launches overlap, on a GPU that other tests keep busy: each waits for what it reads
    assert torch.equal(run(inductor_options={"triton.enable_pdl": True}), want)
