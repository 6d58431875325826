from __future__ import annotations

import pytest
import torch

from bench.synthetic import MARGIN, make_context, measure


def test_a_needle_takes_about_half_of_its_querys_attention() -> None:
    context = make_context(2048, n_kv_heads=2, group=3, n_queries=8, seed=1)
    assert int(context.needles.min()) >= MARGIN
    assert int(context.needles.max()) < 2048 - MARGIN
    assert len(set(context.needles.tolist())) == 8
    q = context.q.view(2, 3, 8, 128)
    p = (q @ context.k[0][:, None].transpose(-1, -2) / 128**0.5).softmax(-1)
    shares = p[:, :, torch.arange(8), context.needles]
    assert 0.3 < float(shares.mean()) < 0.7


def test_a_seed_gives_one_context_and_another_another() -> None:
    first, again, other = (make_context(600, seed=seed).k for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_oracle_of_all_tokens_finds_every_needle() -> None:
    context = make_context(1024, n_queries=4)
    specs = ["oracle_tokens", "ours", "quest"]
    rows = {row["method"]: row for row in measure(context, 384, 256, 32, specs)}
    assert list(rows) == specs
    assert rows["oracle_tokens"]["needles"] == 1
    assert rows["oracle_tokens"]["mass_blocks"] == pytest.approx(1)
    for row in rows.values():
        assert 0 < row["mass_tokens"] <= row["mass_blocks"] + 1e-6
        assert row["mass_tokens"] <= rows["oracle_tokens"]["mass_tokens"] + 1e-6
