"""The compiled step over a pool of block slots, against the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flex_tls as tls
from tests.integrations.models import SPARSE, make, prompts


@pytest.mark.parametrize(
    ("device", "lens", "policy", "store_dtype"),
    [
        ("cpu", (28, 9), "exact", "model"),
        ("cpu", (28, 9), "exact", "int8"),
        ("cpu", (28, 9), "corrected", "model"),
        *(
            pytest.param("cuda", *case, marks=pytest.mark.cuda)
            for case in (
                ((90,), "exact", "model"), ((28, 9), "exact", "model"), ((90, 60), "async", "model"),
                ((28, 9), "exact", "int8"), ((90, 60), "async", "int8"), ((90, 60), "corrected", "model"),
            )
        ),
    ],
)  # fmt: skip
def test_the_compiled_step_generates_the_same_over_a_pool(
    lens: tuple[int, ...], policy: Any, store_dtype: Any, device: str
) -> None:
    """(28, 9) begins with contexts that the budgets hold, and its pool is cold."""
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("triton compiles for the GPU here, and interprets nothing")
    model = make("qwen3").to(device)
    inputs = {name: x.to(device) for name, x in prompts(*lens).items()}
    found = []
    for compiled in (False, True):
        offload = tls.OffloadConfig(policy=policy, store_dtype=store_dtype)
        cache = tls.TLSCache(
            model.config, SPARSE, batch_size=len(lens), offload=offload, dtype=torch.float32, device=device, max_len=200
        )
        out = tls.generate(
            model, inputs["input_ids"], attention_mask=inputs["attention_mask"], cache=cache, max_new_tokens=12,
            compiled=compiled,
        )  # fmt: skip
        found.append(out)
        for layer in cache.offloaded_layers:
            engine = layer.opened()
            engine.synchronize()
            engine.check_integrity()
            # What was appended has reached the host
            for row, held in enumerate(cache.seq_lens):
                assert bool(engine.store.keys[row, :, :held].abs().sum(-1).gt(0).all())
        hits = [stats.steps for stats in cache.stats().values()]
    assert torch.equal(found[0], found[1])
    assert min(hits) >= 11
