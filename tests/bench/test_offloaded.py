"""Offloaded steps of the decode bench: every provider runs, says what its selection follows, and does what it says."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from flex_tls.offload import ops

import flex_tls as tls
from bench import decode, offloaded, rows
from bench.models import random_model
from tests.bench.test_rows import ROW

pytest.importorskip("triton")

MACHINE = rows.Machine(**{name: getattr(ROW, name) for name in rows.Machine._fields})
KEPT, HEADS, CONTEXT = 4, 2, 200
# Keys and values of one block of one head, float32
BLOCK_BYTES = 16 * 2 * 16 * 4
# Not in 8 bits too: an interpreted step takes seconds
OFFLOADED = [name for name in decode.PROVIDERS if name.startswith("offload") and "int8" not in name]
UNCAPTURED = "offload_copy_uncaptured"


class Taken(NamedTuple):
    """What a provider's second step did."""

    step: Any
    figures: dict[str, Any]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def bed() -> decode.Bed:
    cfg = tls.TLSConfig(
        block_size=16, block_budget=16 * KEPT, token_budget=32, sink_tokens=4, recent_tokens=8, dense_layers=0
    )
    with pytest.MonkeyPatch.context() as patch:
        # What is interpreted takes its time
        patch.setattr(decode, "ROOM_TOKENS", 32)
        found = decode.Bed(random_model("tiny", 1, torch.device("cpu")), cfg, 1, CONTEXT)
    found.set_context(CONTEXT)
    return found


@pytest.fixture(scope="module")
def taken(bed: decode.Bed) -> dict[str, Taken]:
    """Every offloaded provider's, one step behind a warm pool; not compiled, which would take longer than all steps."""
    found, logits = {}, []
    handle = bed.model.register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        patch.setattr("flex_tls.offloaded_layer.paged_backend", lambda backend, device: "reference")
        patch.setitem(offloaded.WARM_STEPS, "cpu", 1)
        for name in OFFLOADED:
            step = decode.PROVIDERS[name].make(bed)
            assert isinstance(step, offloaded.TracedStep)
            step()
            found[name] = Taken(step, step.figures(), logits[-1])
    handle.remove()
    return found


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_steps_say_what_they_follow(taken: dict[str, Taken], name: str) -> None:
    found = taken[name].figures
    assert found["trace"] == "made"
    # Of few blocks it is less local than of many
    assert all(0.5 < share < 1 for share in found["overlap_1_4_16"])
    assert sorted(found["overlap_1_4_16"]) == found["overlap_1_4_16"]
    missing = found["fetched_bytes"] / BLOCK_BYTES
    assert found["hit_rate"] == pytest.approx(1 - missing / HEADS / KEPT)
    # Without residency the newest block alone is there, which the step's token is written to
    expected = 1 / KEPT if name == "offload_no_residency" else taken["offload_async"].figures["hit_rate"]
    assert found["hit_rate"] == pytest.approx(expected)
    assert taken["offload_async"].figures["hit_rate"] > 1 / KEPT


def test_a_row_holds_them(bed: decode.Bed, taken: dict[str, Taken]) -> None:
    def row(step: Any) -> rows.ModelRow:
        return decode.model_row(
            "decode", bed.model, "tiny", bed.sparse, CONTEXT, "x", [1.0, 2.0], 1.0, 1, 1.0, MACHINE, tokens=1, step=step
        )  # fmt: skip

    made = row(taken["offload_async"].step)
    assert {name: getattr(made, name) for name in taken["offload_async"].figures} == taken["offload_async"].figures
    assert rows.ModelRow.from_dict(dataclasses.asdict(made)) == made
    other = row(lambda: None)
    assert (other.trace, other.overlap_1_4_16, other.hit_rate, other.fetched_bytes) == (None, [], None, None)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("offload_no_residency", "offload_exact"),
        ("offload_no_side_stream", "offload_async"),
        ("offload_copy_uncaptured", "offload_async_uncaptured"),
    ],
)
def test_how_blocks_come_changes_no_result(taken: dict[str, Taken], name: str, same: str) -> None:
    torch.testing.assert_close(taken[name].logits, taken[same].logits, rtol=1e-3, atol=1e-4)
    # What is missing does change it
    assert not torch.allclose(taken["offload_exact"].logits, taken["offload_async"].logits, rtol=1e-3, atol=1e-4)


def test_uncaptured_steps_append_to_a_cache_of_their_own(bed: decode.Bed, taken: dict[str, Taken]) -> None:
    cache = taken[UNCAPTURED].step.cache
    assert cache.offload_config.transfer == "copy"
    assert cache.get_seq_length() == CONTEXT + 2
    assert taken["offload_async"].step.cache.get_seq_length() == CONTEXT
    assert bed.sparse.get_seq_length() == CONTEXT
    assert all(int(x.index.seq_lens) == CONTEXT for x in bed.sparse.tls_layers if x.index is not None)


def test_without_a_side_stream_transfers_run_on_the_stream_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("own", device))
    real = ops.side_stream, ops.urgent_stream
    device = torch.device("cuda", 0)
    with offloaded.no_side_stream():
        assert ops.side_stream(device) == ops.urgent_stream(device) == ("own", device)
    assert (ops.side_stream, ops.urgent_stream) == real
