from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from flex_tls.attention import attend
from flex_tls.evaluate.methods import DENSE, Method
from flex_tls.evaluate.probe import HEAVY_MASS, caught, probe_documents

from ..cases import Case, cases
from ..integrations.models import FULL, SPARSE, make
from .test_decoding import documents


@given(cases(max_t=3))
def test_what_is_caught_is_what_the_definitions_say(case: Case) -> None:
    """Oracle: loops over rows, queries and heads, in float64."""
    index = case.index()
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, index.capacity_tokens - x.shape[2])) for x in (case.k, case.v))
    found = attend(case.q, k, v, index, case.cfg, backend="reference")
    assert found.blocks is not None
    assert found.tokens is not None
    kept_blocks, size = found.blocks.kept(), case.cfg.block_size
    got = caught(case.q, k, kept_blocks, size, found.tokens, scale=0.25)
    group = case.q.shape[1] // case.k.shape[1]
    for b, length in enumerate(case.seq_lens.tolist()):
        for t in range(case.q.shape[2]):
            n = length - case.q.shape[2] + t + 1
            for head in range(case.q.shape[1]):
                h = head // group
                p = (case.k[b, h, :n].double() @ case.q[b, head, t].double() * 0.25).softmax(0)
                in_blocks = kept_blocks[b, h, t].repeat_interleave(size)[:n]
                in_tokens = found.tokens.mask[b, h, t, :n]
                heavy, total = [], 0.0
                for place in p.argsort(descending=True).tolist():
                    if total >= HEAVY_MASS - 1e-6:
                        break
                    heavy.append(place)
                    total += float(p[place])
                want = [p[in_blocks].sum(), p[in_tokens].sum()]
                want += [kept[heavy].double().mean() for kept in (in_blocks, in_tokens)]
                # The last heavy token may fall on either side of the edge
                slack = torch.tensor([1e-5, 1e-5, 1 / len(heavy), 1 / len(heavy)], dtype=torch.float64)
                assert bool(((got[:, b, head, t].double() - torch.stack(want)).abs() <= slack).all())


def test_documents_are_probed_layer_by_layer() -> None:
    # In float32 some processors sum four tokens' products otherwise than one's, and near ties fall otherwise
    model, ids, method = make().double(), documents(2, 110), Method("ours", SPARSE)
    backend, (first, second) = probe_documents(model, ids, 100, method, backend="reference", step_tokens=4)
    assert backend == "reference"
    for catch in (first, second):
        assert catch.layers == [1, 2]
        for shares in (catch.mass_blocks, catch.mass_tokens, catch.heavy_blocks, catch.heavy_tokens):
            assert torch.tensor(shares).shape == (2, 4)
        assert bool((torch.tensor(catch.mass_blocks) >= torch.tensor(catch.mass_tokens)).all())
        assert all(0 < x <= 1 for x in catch.locality)
    one_by_one = probe_documents(model, ids[1:], 100, method, backend="reference", step_tokens=1)[1]
    for name, value in one_by_one[0]._asdict().items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(getattr(second, name)), rtol=0, atol=2e-4)


def test_boxes_bound_what_is_missed() -> None:
    for index, has_bound in (("lowrank", False), ("quest", True), ("box", True)):
        method = Method(index, dataclasses.replace(SPARSE, index=index))
        catch = probe_documents(make(), documents(1, 110), 100, method, backend="reference", step_tokens=4)[1][0]
        assert bool(catch.missed_bound) == has_bound
        if has_bound:
            assert bool((torch.tensor(catch.missed_bound) + 2e-4 >= 1 - torch.tensor(catch.mass_tokens)).all())


def test_a_context_that_the_budgets_hold_has_nothing_to_probe() -> None:
    for method in (Method("ours", FULL), Method(DENSE, None)):
        with pytest.raises(ValueError, match="probe: expected sparse steps, got none"):
            probe_documents(make(), documents(1, 40), 32, method, backend="reference", step_tokens=4)


def test_the_oracle_of_tokens_catches_the_most_mass() -> None:
    ids = documents(1, 110)
    best = Method("oracle", dataclasses.replace(SPARSE, index="oracle", block_budget=112))
    mass = {
        m.name: torch.tensor(probe_documents(make(), ids, 100, m, backend="reference")[1][0].mass_tokens).mean()
        for m in (Method("ours", SPARSE), best)
    }
    assert mass["oracle"] > mass["ours"]
