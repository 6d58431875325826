"""Whole compiled generations, on CUDA captured, with the logits of every step; and transfers that come late."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

import flex_tls as tls
from flex_tls.decode import Loop
from flex_tls.integrations.huggingface import enabled
from flex_tls.prefill import read_prompt

# 8 milliseconds at two and a half gigahertz; a step of a tiny model takes a tenth of one
SPIN_CYCLES = 20_000_000


class Watched(Loop):
    """Keeps the logits [n + 1, B, V] of a prompt and ``n`` steps, in places that the step counts, as a graph can."""

    def __init__(self, model: Any, cache: tls.TLSCache, ids: Tensor, n: int) -> None:
        super().__init__(model, cache, ids)
        self.first = ids.shape[1]
        shape = (n + 1, ids.shape[0], model.config.vocab_size)
        self.logits = torch.full(shape, torch.nan, dtype=model.dtype, device=ids.device)

    def next(self, logits: Tensor) -> None:
        """Note them. The prompt's come before ``start`` is set; its first row has no padding."""
        at = (self.start[:1] - self.first).clamp_min(-1) + 1
        self.logits.index_copy_(0, at, logits[None])
        super().next(logits)


@torch.no_grad()
def generated(model: Any, cache: tls.TLSCache, inputs: dict[str, Tensor], n: int) -> tuple[Tensor, Tensor]:
    """The whole sequence int64 [B, S + n + 1] after ``n`` compiled steps, none of them eager, and all logits."""
    ids = inputs["input_ids"]
    loop = Watched(model, cache, ids, n)
    with enabled(model):
        loop.next(read_prompt(model, cache, ids, inputs.get("attention_mask")))
        reports = [loop.report.to("cpu", copy=True)]
        cache.fit_where_due()
        assert cache.prepare()
        with closing(loop.compiled_steps(n)) as steps:
            reports += steps
    new = torch.stack([report[0] for report in reports], 1)
    return torch.cat([ids, new.to(ids.device)], 1), loop.logits


def come_late(monkeypatch: pytest.MonkeyPatch, cycles: int = SPIN_CYCLES) -> None:
    """From now on transfers start ``cycles`` late, on CUDA, and until then the slots that they go to are NaN.

    Below the registered operator, where a step that is compiled already meets it too, and a graph records it.
    """
    from flex_tls.kernels.fetch_blocks import launch_fetch_blocks

    def late(
        rows: Tensor, scales: Tensor | None, slots: Tensor, slot_scales: Tensor | None, slot_of_block: Tensor,
        begins: Tensor, lens: Tensor, fetch_block: Tensor, fetch_slot: Tensor, fetch_count: Tensor, waits: Tensor, *,
        n_written: int, n_programs: int, waiting: bool,
    ) -> None:  # fmt: skip
        p = slots.shape[2]
        entry = torch.arange(p, device=slots.device) < fetch_count[..., None]
        entry &= (waits == int(waiting))[..., None]
        goes_to = torch.zeros(*fetch_slot.shape[:2], p + 1, dtype=torch.bool, device=slots.device)
        goes_to = goes_to.scatter(2, torch.where(entry, fetch_slot, p).long(), True)[..., :p]
        held = slots if slot_scales is None else slot_scales
        held.masked_fill_(goes_to.view(*goes_to.shape, *[1] * (held.dim() - 3)), torch.nan)
        if slots.is_cuda:
            torch.cuda._sleep(cycles)
        launch_fetch_blocks(
            rows, scales, slots, slot_scales, slot_of_block, begins, lens, fetch_block, fetch_slot, fetch_count, waits,
            n_written=n_written, n_programs=n_programs, waiting=waiting,
        )  # fmt: skip

    monkeypatch.setattr("flex_tls.kernels.fetch_blocks.launch_fetch_blocks", late)
