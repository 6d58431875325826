from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import attend
from flex_tls.config import GroupReduce
from flex_tls.selection import keep_best, reduce_group
from tests.cases import Case, cases, make


def best_by_sorting(rank: Tensor, k: int) -> Tensor:
    """Oracle of keep_best: a stable sort."""
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, order, True) & (rank > -torch.inf)


numbers = st.sampled_from((0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-30, 3e38, -3e38)) | st.floats(-5, 5, width=32)


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 60))
def test_the_best_are_kept_and_ties_go_to_the_lower_place(values: list[float], k: int) -> None:
    rank = torch.tensor(values, dtype=torch.float32)
    k = min(k, len(values))
    assert torch.equal(keep_best(rank, k), best_by_sorting(rank, k))


@given(cases())
def test_selection_holds_sinks_and_window_and_obeys_the_budgets(case: Case) -> None:
    index, cfg, t = case.index(), case.cfg, case.q.shape[2]
    blocks = tls.select_blocks(case.q, index, cfg)
    tokens = tls.select_tokens(case.q, index, blocks, cfg)
    assert int(blocks.counts.max()) * cfg.block_size <= cfg.block_budget
    for row, n in enumerate(case.seq_lens.tolist()):
        for query in range(t):
            position = n - t + query
            kept = blocks.kept()[row, :, query]
            assert torch.equal(kept.sum(-1).int(), blocks.counts[row, :, query])
            mask = tokens.mask[row, :, query]
            limit = cfg.block_budget if cfg.token_budget is None else cfg.token_budget
            allowed = min(limit, position + 1)
            assert int(mask.sum(-1).max()) <= allowed
            if cfg.token_budget is not None and cfg.kept_blocks * cfg.block_size >= position + 1:
                assert int(mask.sum(-1).min()) == allowed
            assert not mask[:, position + 1 :].any()
            assert mask[:, : min(cfg.sink_tokens, position + 1)].all()
            assert mask[:, max(0, position - cfg.recent_tokens + 1) : position + 1].all()
            assert not (mask & ~kept.repeat_interleave(cfg.block_size, -1)).any()


@given(cases())
def test_every_query_token_of_a_chunk_selects_as_if_it_came_alone(case: Case) -> None:
    index, t = case.index(), case.q.shape[2]
    blocks = tls.select_blocks(case.q, index, case.cfg)
    tokens = tls.select_tokens(case.q, index, blocks, case.cfg)
    for query in reversed(range(t)):
        alone = case.q[:, :, query : query + 1]
        one = tls.select_blocks(alone, index, case.cfg)
        assert torch.equal(one.indices[:, :, 0], blocks.indices[:, :, query])
        mask = tls.select_tokens(alone, index, one, case.cfg).mask[:, :, 0]
        assert torch.equal(mask, tokens.mask[:, :, query])
        if int(index.seq_lens.min()) > 0:
            index.crop(index.seq_lens - 1, case.k)


BOXES = tls.TLSConfig(
    index="box", block_size=16, block_budget=64, token_budget=24, sink_tokens=4, recent_tokens=4, label_bits=(4, 2),
    filter_dims=8,
)  # fmt: skip


@given(cases())
@example(make(BOXES, lens=[200, 90], s=200, d=32, group=4, seed=2))
def test_the_two_levels_by_hand_select_what_the_operator_does(case: Case) -> None:
    index = case.index()
    want = attend(case.q, case.k, case.v, index, case.cfg, backend="reference")
    assert want.blocks is not None
    assert want.tokens is not None
    blocks = tls.select_blocks(case.q, index, case.cfg)
    assert torch.equal(blocks.indices, want.blocks.indices)
    assert torch.equal(tls.select_tokens(case.q, index, blocks, case.cfg).mask, want.tokens.mask)


@given(cases(kinds=("oracle",), max_t=2), st.sampled_from(get_args(GroupReduce)))
def test_the_oracle_index_picks_by_exact_scores(case: Case, group_reduce: GroupReduce) -> None:
    """Oracle of both levels, written out with loops over rows, heads and queries."""
    index, cfg = case.index(), dataclasses.replace(case.cfg, group_reduce=group_reduce)
    b, hq, t, d = case.q.shape
    hkv = case.k.shape[1]
    group = hq // hkv
    blocks = tls.select_blocks(case.q, index, cfg)
    n, size = blocks.n_blocks, cfg.block_size
    for row in range(b):
        for query in range(t):
            position = int(case.seq_lens[row]) - t + query
            for head in range(hkv):
                q = case.q[row, head * group : (head + 1) * group, query]
                token = torch.full((group, n * size), -torch.inf)
                token[:, : position + 1] = q @ case.k[row, head, : position + 1].T / math.sqrt(d)
                per_block = token.view(group, n, size)
                score = per_block.amax(-1) if cfg.block_reduce == "max" else per_block.logsumexp(-1)
                heads = score.softmax(-1) if cfg.group_reduce.startswith("softmax") else score
                rank = heads.amax(0) if cfg.group_reduce.endswith("max") else heads.mean(0)
                starts = torch.arange(n) * size
                forced = (starts < cfg.sink_tokens) | (starts + size > position - cfg.recent_tokens + 1)
                rank[forced] = torch.inf
                rank[starts > position] = -torch.inf
                want = best_by_sorting(rank, min(cfg.kept_blocks, n))
                got = blocks.kept()[row, head, query]
                # Sums in another order may swap near ties; what differs must be one
                for a, z in zip(rank[want & ~got].sort().values, rank[got & ~want].sort().values, strict=True):
                    assert abs(float(a - z)) < 1e-5


def test_a_masked_document_is_never_selected() -> None:
    cfg = tls.TLSConfig(block_size=16, block_budget=64, token_budget=40, sink_tokens=0, recent_tokens=8, label_dims=8)
    case = make(cfg, lens=[200, 150], s=200, group=2)
    document = (torch.arange(200) // 50) % 2

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return document[q_idx] == document[kv_idx]

    for kind in ("lowrank", "quest"):
        cfg = tls.TLSConfig(**{**cfg.__dict__, "index": kind})
        index = tls.KVIndex.build(case.k, cfg, case.seq_lens, case.q)
        blocks = tls.select_blocks(case.q, index, cfg, mask_mod=same_document)
        tokens = tls.select_tokens(case.q, index, blocks, cfg, mask_mod=same_document)
        chosen = tokens.mask[..., :200]
        recent = torch.arange(200) > tokens.positions[:, :, None] - cfg.recent_tokens
        other = document[tokens.positions][:, :, None] != document
        assert not (chosen & (other & ~recent)[:, None]).any()
        assert int(tokens.counts.min()) == 40


def test_a_head_that_sees_nothing_has_no_say() -> None:
    scores = torch.randn(1, 1, 2, 1, 6)
    scores[:, :, 1] = -torch.inf
    rank = reduce_group(scores, tls.TLSConfig())
    # Ranks are rounded down to eight digits
    torch.testing.assert_close(rank, scores[:, :, 0].softmax(-1) / 2, rtol=2**-7, atol=0)


def test_indices_of_a_token_selection_ascend_and_end_in_padding() -> None:
    case = make(tls.TLSConfig(block_size=16, block_budget=64, token_budget=20, sink_tokens=4, recent_tokens=4,
                              label_dims=8), lens=[100, 7], s=100)  # fmt: skip
    index = case.index()
    tokens = tls.select_tokens(case.q, index, tls.select_blocks(case.q, index, case.cfg), case.cfg)
    listed = tokens.indices(20)
    for row, count in ((0, 20), (1, 7)):
        got = listed[row, 0, 0].tolist()
        assert got[:count] == tokens.mask[row, 0, 0].nonzero().flatten().tolist()
        assert set(got[count:]) <= {tokens.mask.shape[-1]}


def test_errors_name_what_was_expected() -> None:
    case = make(tls.TLSConfig(), lens=[100], s=100)
    index = case.index()
    with pytest.raises(ValueError, match=r"q: expected HQ to be a multiple of HKV = 2, got 3"):
        tls.select_blocks(case.q[:, :3], index, case.cfg)
    with pytest.raises(ValueError, match=r"q: expected at least 1 query token"):
        tls.select_blocks(case.q[:, :, :0], index, case.cfg)
    with pytest.raises(ValueError, match=r"cfg: expected the index's block_size=16.*got 64"):
        tls.select_blocks(case.q, index, tls.TLSConfig(block_size=64))
    index.reset()
    with pytest.raises(ValueError, match=r"index: expected at least 1 token, got an empty index"):
        tls.select_blocks(case.q, index, case.cfg)
