from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

import flex_tls as tls
from flex_tls import prefill
from flex_tls.cache_layer import TLSLayer
from flex_tls.integrations.huggingface import enabled
from flex_tls.prefill import read_prompt
from flex_tls.record import Recorder
from tests.integrations.models import FAMILIES, FULL, SPARSE, make, prompts, tokenizer

NO_WINDOW = [family for family in FAMILIES if "window" not in family]
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def cache_for(
    model: Any, batch_size: int, max_len: int = 160, cfg: tls.TLSConfig = SPARSE, backend: Any = "auto"
) -> tls.TLSCache:
    return tls.TLSCache(model.config, cfg, batch_size=batch_size, max_len=max_len, backend=backend)


def next_turn(out: torch.Tensor, inputs: dict[str, torch.Tensor], n_new: int = 5) -> dict[str, torch.Tensor]:
    """What was said so far, ``out``, and ``n_new`` tokens more."""
    ids, mask = torch.cat([out, inputs["input_ids"][:, -n_new:]], 1), inputs["attention_mask"]
    ones = torch.ones_like(ids[:, mask.shape[1] :])
    return {"input_ids": ids, "attention_mask": torch.cat([mask, ones], 1)}


def traced(function: Any, options: Any = None, compile_: Any = torch.compile, **kwargs: Any) -> Any:
    """In place of ``torch.compile``: traces, and generates no code."""
    return compile_(function, backend="eager", **kwargs)


def transformers_output(model: Any, cache: tls.TLSCache, n: int, **inputs: Any) -> torch.Tensor:
    tls.enable(model)
    try:
        out: torch.Tensor = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=n, do_sample=False, disable_compile=True
        )
    finally:
        tls.disable(model)
    return out


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("lens", [(90,), (90, 41, 7)])
def test_greedy_is_what_transformers_generates(family: str, lens: tuple[int, ...]) -> None:
    model, inputs = make(family), prompts(*lens)
    theirs, ours = cache_for(model, len(lens)), cache_for(model, len(lens))
    want = transformers_output(model, theirs, 12, **inputs)
    got = tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=ours, max_new_tokens=12,
        compiled=False,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert (ours.seq_lens, ours.get_seq_length()) == (theirs.seq_lens, theirs.get_seq_length())


@pytest.mark.parametrize("family", ["qwen3", "mistral, window"])
@pytest.mark.parametrize("lens", [(90, 90), (90, 41, 7), (60, 7)])
def test_a_prompt_read_in_chunks_is_the_prompt(
    family: str, lens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is padded, no forward sees more than a chunk: that bounds its memory."""
    model, inputs = make(family), prompts(90, *lens)
    ids, mask = inputs["input_ids"][1:], inputs["attention_mask"][1:]
    seen: list[int] = []
    attend = TLSLayer.attend

    def spied(layer: TLSLayer, q: torch.Tensor, scale: float) -> torch.Tensor:
        seen.append(q.shape[2])
        return attend(layer, q, scale)

    def read(chunk_tokens: int | None) -> torch.Tensor:
        cache = cache_for(model, len(lens))
        seen.clear()
        logits = read_prompt(model, cache, ids, mask, chunk_tokens=chunk_tokens)
        assert cache.seq_lens == list(lens)
        return logits

    monkeypatch.setattr(TLSLayer, "attend", spied)
    with torch.no_grad(), enabled(model):
        want = read(None)
        assert set(seen) == {90}
        torch.testing.assert_close(read(23), want, rtol=1e-4, atol=1e-4)
        assert max(seen) == 23
        # By default all rows together
        monkeypatch.setattr(prefill, "CHUNK_TOKENS", 23 * len(lens))
        read(None)
    assert max(seen) == 23


def test_what_is_left_of_a_prompt_attends_as_the_prompt_does() -> None:
    model, inputs = make("qwen3"), prompts(90)
    whole, chunked = cache_for(model, 1), cache_for(model, 1)
    with torch.no_grad(), enabled(model):
        want = read_prompt(model, whole, inputs["input_ids"])
        got = read_prompt(model, chunked, inputs["input_ids"], chunk_tokens=89)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_row_without_tokens_is_compiled_from_its_first_token_on() -> None:
    model, inputs = make("qwen3"), prompts(60, 0)
    eager, compiled = cache_for(model, 2, backend="reference"), cache_for(model, 2)
    want, got = (
        tls.generate(model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache,
                     max_new_tokens=4, compiled=cache is compiled)
        for cache in (eager, compiled)
    )  # fmt: skip
    assert torch.equal(got, want)


def test_generate_hands_its_chunks_on() -> None:
    model, ids = make("llama"), prompts(90)["input_ids"]
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(args[0].shape[1]))
    tls.generate(model, ids, cache=cache_for(model, 1), max_new_tokens=1, chunk_tokens=35, compiled=False)
    assert forwards == [35, 35, 20]
    with pytest.raises(ValueError, match="chunk_tokens: expected more than sparse_query_tokens=16, got 16"):
        tls.generate(model, ids, cache=cache_for(model, 1), max_new_tokens=1, chunk_tokens=16)


@pytest.mark.parametrize(("progress", "terminal", "shown"), [
    (None, True, True), (None, False, False), (True, False, True), (False, True, False),
])  # fmt: skip
def test_progress_is_shown_on_a_terminal_unless_told(
    progress: bool | None, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = make("llama")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    tls.generate(
        model, prompts(20)["input_ids"], cache=cache_for(model, 1), max_new_tokens=2, compiled=True, progress=progress
    )
    said = capsys.readouterr().err
    assert ("reading the prompt" in said, "compiling the step" in said) == (shown, shown)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    ("family", "lens", "shares"),
    [("qwen3", (90,), None), ("llama", (28, 9), None), ("llama", (90,), (1.0, 1.25, 1.75))],
)
def test_the_compiled_step_generates_the_same(family: str, lens: tuple[int, ...], shares: Any, device: str) -> None:
    """The second case begins dense, passes the budgets while decoding, and outgrows its fit: three kinds of step."""
    model, cfg = make(family).to(device), dataclasses.replace(SPARSE, block_shares=shares)
    inputs = {name: x.to(device) for name, x in prompts(*lens).items()}
    # The oracle, where "auto" would compile FlexAttention
    theirs = cache_for(model, len(lens), cfg=cfg, backend="reference" if device == "cpu" else "auto")
    cache = cache_for(model, len(lens), cfg=cfg)
    want = transformers_output(model, theirs, 12, **inputs)
    got = tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=12,
        compiled=True,
    )  # fmt: skip
    assert torch.equal(got, want)
    held = [n + 11 for n in lens]
    assert cache.seq_lens == held
    index: Any = cache.layers[1]
    assert index.index.seq_lens.tolist() == held
    # The next turn goes on from there
    more = next_turn(got, inputs, 20)
    want = transformers_output(model, theirs, 2, **more)
    assert torch.equal(tls.generate(model, cache=cache, max_new_tokens=2, compiled=True, **more), want)
    assert cache.seq_lens == theirs.seq_lens


@pytest.mark.parametrize("cfg", [FULL, SPARSE])
@pytest.mark.parametrize("lens", [(60,), (60, 41)])
def test_a_second_turn_goes_on_as_transformers_does(cfg: tls.TLSConfig, lens: tuple[int, ...]) -> None:
    """What the budgets hold whole is, turn after turn, what the model says without our cache in a single pass."""
    model, inputs = make("qwen3"), prompts(*lens)
    theirs, ours = (cache_for(model, len(lens), cfg=cfg, backend="reference") for _ in range(2))
    for n_turn in range(2):
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        want = transformers_output(model, theirs, 6, **inputs)
        got = tls.generate(model, cache=ours, max_new_tokens=6, compiled=False, **inputs)
        assert torch.equal(got, want)
        assert torch.equal(got, plain) is (cfg is FULL)
        assert ours.seq_lens == [n + 5 + 11 * n_turn for n in lens]
        inputs = next_turn(got, inputs)


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    model, inputs = make("qwen3"), prompts(60, 41)
    free, theirs, ours = (cache_for(model, 2, backend="reference") for _ in range(3))
    tls.enable(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    unpenalised = model.generate(**inputs, past_key_values=free, **options)
    want = model.generate(**inputs, past_key_values=theirs, repetition_penalty=1.5, **options)
    sampling = tls.Sampling(repetition_penalty=1.5)
    got = tls.generate(model, cache=ours, max_new_tokens=12, sampling=sampling, compiled=False, **inputs)
    assert torch.equal(got, want)
    assert not torch.equal(got, unpenalised)


def test_passing_the_budgets_compiles_one_more_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a cache; the budgets hold 32 tokens."""
    monkeypatch.setattr(torch, "compile", traced)
    model = make("llama")
    cache = cache_for(model, 1)

    def graphs(n_prompt: int, n_new: int) -> int:
        counts = torch._dynamo.utils.counters["stats"]
        before = counts["unique_graphs"]
        cache.reset()
        ids = prompts(n_prompt)["input_ids"]
        tls.generate(model, ids, cache=cache, max_new_tokens=n_new, compiled=True)
        return int(counts["unique_graphs"] - before)

    assert graphs(24, 2) == 1
    # The last of its three steps is the first of 33 tokens
    assert graphs(30, 4) == 1
    assert graphs(30, 4) == 0


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_short_contexts_attend_densely_until_they_are_long_enough(device: str) -> None:
    """Compiled as eager; and as long as it is dense, as sdpa."""
    model = make("qwen3").to(device)
    inputs = {name: x.to(device) for name, x in prompts(90).items()}
    full = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert not torch.equal(transformers_output(model, cache_for(model, 1), 12, **inputs), full)
    for until, equal in ((96, False), (1000, True)):
        cfg = dataclasses.replace(SPARSE, sparse_from_tokens=until)
        want = transformers_output(model, cache_for(model, 1, cfg=cfg), 12, **inputs)
        got = tls.generate(model, inputs["input_ids"], cache=cache_for(model, 1, cfg=cfg), max_new_tokens=12,
                           compiled=True)  # fmt: skip
        assert torch.equal(got, want)
        assert torch.equal(got, full) or not equal
        assert torch.equal(got[:, :96], full[:, :96])
    layer: Any = cache_for(model, 1, cfg=cfg).layers[1]
    assert layer.why_dense(1, 90) == "90 tokens in sight, fewer than sparse_from_tokens=1,000"
    assert layer.why_dense(1, 1000) is None


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_later_turn_and_another_prompt_compile_nothing(device: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = make("qwen3").to(device)
    cache = cache_for(model, 1)

    def run(n: int) -> str:
        ids = prompts(n)["input_ids"].to(device)
        tls.generate(model, ids, cache=cache, max_new_tokens=4, compiled=True, progress=True)
        return capfd.readouterr().err

    seen = run(60)
    assert "reading the prompt" in seen
    assert "compiling the step: 00:0" in seen
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    assert "compiling the step" not in run(90)
    cache.reset()
    run(75)
    assert counters["stats"]["unique_graphs"] == before


def test_ten_caches_in_one_process_compile_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up on a code object after eight compilations: each step needs its own."""
    monkeypatch.setattr(torch, "compile", traced)
    model, ids = make("llama"), prompts(9)["input_ids"]
    for i in range(10):
        cache = cache_for(model, 1, max_len=16 + 16 * i, cfg=FULL)
        tls.generate(model, ids, cache=cache, max_new_tokens=2, compiled=True)
        buffer = weakref.ref(cache.tls_layers[0].keys)
        del cache
        gc.collect()
        assert buffer() is None


def test_rows_end_at_their_stop_token() -> None:
    model, inputs = make("qwen3"), prompts(40, 33)
    arguments = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 10, "compiled": False}
    free = tls.generate(model, inputs["input_ids"], cache=cache_for(model, 2), **arguments)[:, 40:]
    stop = int(free[0, 3])
    cache = cache_for(model, 2)
    got = tls.generate(
        model, inputs["input_ids"], cache=cache, stop_token_ids=[stop], pad_token_id=5, **arguments
    )[:, 40:]  # fmt: skip
    for row, whole in zip(got.tolist(), free.tolist(), strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert row[:end] == whole[: min(end, len(row))]
        assert set(row[end:]) <= {5}
    assert cache.get_seq_length() == 40 + got.shape[1] - 1


@pytest.mark.parametrize("lens", [(40,), (40, 33, 12)])
@pytest.mark.parametrize("from_prompt", [False, True])
def test_stop_strings_end_rows_where_transformers_ends_them(lens: tuple[int, ...], from_prompt: bool) -> None:
    """A stop string crosses token borders, and may begin in the prompt; rows that ended are padded."""
    model, inputs, words = make("qwen3"), prompts(*lens), tokenizer()
    free = tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache_for(model, len(lens)),
        max_new_tokens=10, compiled=False,
    )  # fmt: skip
    # Out of row 0's text: the end of one token and the beginning of the next
    first = 39 if from_prompt else 43
    left, right = (words.decode(free[0, i]) for i in (first, first + 1))
    strings = [left[-1] + right[:1], "zzzz"]
    stop = {"stop_strings": strings, "tokenizer": words}
    # Without an end-of-sequence token transformers lets a row go on while others do
    model.generation_config.eos_token_id = 96
    theirs, ours = cache_for(model, len(lens)), cache_for(model, len(lens))
    want = transformers_output(model, theirs, 10, **inputs, **stop)
    got = tls.generate(
        model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=ours, max_new_tokens=10,
        compiled=False, **stop,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert got[0, first + 2 :].eq(0).all()
    assert len(lens) > 1 or got.shape[1] == first + 2
    assert (ours.seq_lens, ours.get_seq_length()) == (theirs.seq_lens, theirs.get_seq_length())


@pytest.mark.parametrize(("skip_prompt", "compiled"), [(True, False), (True, True), (False, False)])
def test_streamers_of_transformers_say_what_they_say_there(
    skip_prompt: bool, compiled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs, words = make("llama"), prompts(30), tokenizer()

    def streams(generate: Callable[[Any], torch.Tensor]) -> str:
        pieces = TextIteratorStreamer(words, skip_prompt=skip_prompt)
        generate(pieces)
        capsys.readouterr()
        out = generate(TextStreamer(words, skip_prompt=skip_prompt))
        text = words.decode(out[0, 30 if skip_prompt else 0 :])
        printed = capsys.readouterr().out
        assert printed == f"{text}\n"
        assert "".join(pieces) == text
        return text

    def theirs(streamer: Any) -> torch.Tensor:
        return transformers_output(model, cache_for(model, 1, backend="reference"), 8, **inputs, streamer=streamer)

    cache = cache_for(model, 1, backend="auto" if compiled else "reference")

    def ours(streamer: Any) -> torch.Tensor:
        cache.reset()
        return tls.generate(
            model, inputs["input_ids"], cache=cache, max_new_tokens=8, streamer=streamer, compiled=compiled
        )

    assert streams(ours) == streams(theirs)


def test_a_streamer_gets_the_prompt_then_every_token_and_a_seed_repeats_them() -> None:
    model, ids = make("llama"), prompts(30)["input_ids"]

    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[Any]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    def run(seed: int, streamer: Streamer | None = None) -> list[int]:
        out = tls.generate(
            model, ids, cache=cache_for(model, 1), max_new_tokens=8, seed=seed, streamer=streamer,
            sampling=tls.Sampling(temperature=1.5), compiled=False,
        )  # fmt: skip
        tokens: list[int] = out[0, 30:].tolist()
        return tokens

    streamer = Streamer()
    tokens = run(1, streamer)
    assert run(1) == tokens
    assert streamer.got == [ids.tolist(), *([token] for token in tokens)]
    assert streamer.ended
    assert len({tuple(run(seed)) for seed in range(4)}) > 1


def test_errors_say_what_to_do() -> None:
    model, ids = make("llama"), prompts(30)["input_ids"]
    with pytest.raises(ValueError, match="expected room for 190 tokens"):
        tls.generate(model, ids, cache=cache_for(model, 1), max_new_tokens=160)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1"):
        tls.generate(model, ids, cache=cache_for(model, 1), max_new_tokens=0)
    cache = cache_for(model, 1)
    tls.generate(model, ids, cache=cache, max_new_tokens=2, compiled=False)
    with pytest.raises(ValueError, match="expected more than the 31 tokens"):
        tls.generate(model, ids, cache=cache, max_new_tokens=2)
    windowed = make("mistral, window")
    unread = cache_for(windowed, 1)
    with pytest.raises(ValueError, match=r"sliding windows.*compiled=False"):
        tls.generate(windowed, ids, cache=unread, max_new_tokens=4, compiled=True)
    assert unread.get_seq_length() == 0
    with pytest.raises(ValueError, match="tokenizer: expected the model's tokenizer"):
        tls.generate(model, ids, cache=unread, max_new_tokens=4, stop_strings="stop")
    with pytest.raises(ValueError, match="stop_strings: expected strings with at least one character"):
        tls.generate(model, ids, cache=unread, max_new_tokens=4, stop_strings=[""], tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"inductor_options: expected options of torch\.compile.*no_such_option"):
        tls.generate(model, ids, cache=unread, max_new_tokens=4, inductor_options={"no_such_option": True})
    box = tls.TLSConfig(block_size=16, block_budget=48, token_budget=32, sink_tokens=4, recent_tokens=8, index="box")
    reference = tls.TLSCache(model.config, SPARSE, max_len=160, backend="reference")
    with pytest.raises(ValueError, match=r"backend='auto' or 'triton', got 'reference'"):
        tls.generate(model, ids, cache=reference, max_new_tokens=4, compiled=True)
    recorded = cache_for(model, 1)
    recorded.recorder = Recorder()
    with pytest.raises(ValueError, match="records nothing"):
        tls.generate(model, ids, cache=recorded, max_new_tokens=4, compiled=True)
    with pytest.raises(ValueError, match=r"index='lowrank'.*pass compiled=False"):
        tls.generate(model, ids, cache=cache_for(model, 1, cfg=box), max_new_tokens=4, compiled=True)
