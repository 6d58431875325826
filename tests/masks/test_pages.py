"""Attention over a pool: blocks anywhere in it give what they give in their places."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from flex_tls.attention import BackendUnavailable, attend
from flex_tls.paged import Scored, attend_pages, earlier, paged_backend, score
from flex_tls.pages import Pages
from flex_tls.reference import attention_reference
from flex_tls.selection import BlockSelection, tokens_from_scores
from tests.cases import Case, assert_as_exact, cases, make

SLOPES = torch.tensor([0.1, 0.02, 0.3, 0.05, 0.2, 0.01])


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - SLOPES[h] * (q_idx - kv_idx)


def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx - kv_idx < 150


def paged(case: Case, n_slots: int, seed: int, held: Tensor) -> tuple[Tensor, Tensor, Pages]:
    """A pool that holds the blocks ``held`` bool [B, HKV, N] in random slots, NaN elsewhere."""
    size, (b, hkv, s, d) = case.cfg.block_size, case.k.shape
    n = held.shape[2]
    generator = torch.Generator().manual_seed(seed)
    slot_of_block = torch.full((b, hkv, n), -1, dtype=torch.int32)
    block_of_slot = torch.full((b, hkv, n_slots), -1, dtype=torch.int32)
    # A token's key and value side by side, as the offload engine's pool has them
    pool = torch.full((b, hkv, n_slots, size, 2, d), torch.nan)
    whole = [torch.nn.functional.pad(x, (0, 0, 0, n * size - s)).view(b, hkv, n, size, d) for x in (case.k, case.v)]
    for i in range(b):
        for h in range(hkv):
            blocks = held[i, h].nonzero()[:, 0]
            slots = torch.randperm(n_slots, generator=generator)[: len(blocks)]
            slot_of_block[i, h, blocks], block_of_slot[i, h, slots] = slots.int(), blocks.int()
            for j, source in enumerate(whole):
                pool[i, h, slots, :, j] = source[i, h, blocks]
    k, v = pool.flatten(2, 3).unbind(3)
    return k, v, Pages(slot_of_block, block_of_slot, size)


def kept(blocks: BlockSelection, held: Tensor) -> BlockSelection:
    """The selected blocks that are held."""
    keep = blocks.kept() & held[:, :, None]
    number = torch.arange(blocks.n_blocks, dtype=torch.int32)
    indices = torch.where(keep, number, blocks.n_blocks).sort(-1).values[..., : blocks.indices.shape[-1]]
    return dataclasses.replace(blocks, indices=indices, counts=keep.sum(-1).int())


@given(cases(), st.integers(0, 99), st.integers(0, 3), st.sampled_from((0.0, 0.5, 1.0)), st.booleans())
def test_the_reference_over_a_pool_is_the_reference_over_its_blocks(
    case: Case, seed: int, spare: int, share: float, mods: bool
) -> None:
    score_mod, mask_mod = (alibi, window) if mods and case.q.shape[1] <= len(SLOPES) else (None, None)
    index, scale = case.index(), case.q.shape[-1] ** -0.5
    scored = score(case.q, index, case.cfg, "reference", mask_mod, scale, score_mod)
    assert torch.equal(
        scored.chosen.indices,
        tls.select_blocks(case.q, index, case.cfg, score_mod=score_mod, mask_mod=mask_mod).indices,
    )
    held = torch.rand(*case.k.shape[:2], index.n_blocks, generator=torch.Generator().manual_seed(seed)) < share
    pool = paged(case, index.n_blocks + spare, seed, held)
    look = kept(scored.chosen, held)
    got = attend_pages(case.q, *pool, scored, look, index, case.cfg, "reference", mask_mod, scale, score_mod)
    tokens = tokens_from_scores(index, case.cfg, look, scored.tokens, scored.labels)
    want, lse = attention_reference(
        case.q, case.k, case.v, tokens, scale=scale, score_mod=score_mod, mask_mod=mask_mod
    )  # fmt: skip
    assert torch.equal(got.out, want)
    assert torch.equal(got.lse, lse)
    if share == 1.0:
        whole = attend(
            case.q, case.k, case.v, index, case.cfg, score_mod=score_mod, mask_mod=mask_mod, backend="reference"
        )
        assert torch.equal(got.out, whole.out)


CFG = tls.TLSConfig(block_size=32, block_budget=160, token_budget=70, sink_tokens=16, recent_tokens=20)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("t", "mods"), [(1, False), (3, True)])
def test_flex_over_a_pool_computes_what_the_reference_does(t: int, mods: bool, device: str) -> None:
    """Several contents and permutations for each compiled shape."""
    score_mod, mask_mod = (alibi, window) if mods else (None, None)
    global SLOPES
    for seed, lens in enumerate(([400, 37], [160, 399])):
        case = make(CFG, lens=lens, s=400, t=t, d=16, seed=seed)
        index, scale = case.index(), 0.3
        held = torch.rand(2, 2, index.n_blocks, generator=torch.Generator().manual_seed(seed)) < 0.7
        pool = paged(case, 12, seed, held)
        SLOPES = SLOPES.cpu()
        scored = score(case.q, index, CFG, "reference", mask_mod, scale, score_mod)
        look = kept(scored.chosen, held)
        # Listed blocks hold numbers; all others are NaN
        outs = []
        for dtype in (torch.float32, torch.float64):
            wide = [x.to(dtype) for x in (case.q, *pool[:2])]
            outs.append(
                attend_pages(*wide, pool[2], scored, look, index, CFG, "reference", mask_mod, scale, score_mod).out
            )
        low, truth = outs
        moved = case_to(device, case, index, pool, scored, look)
        q, k, v, pages, there, blocks, index = moved
        SLOPES = SLOPES.to(device)
        again = score(q, index, CFG, "flex", mask_mod, scale, score_mod)
        torch.testing.assert_close(again.blocks, there.blocks, rtol=1e-4, atol=1e-4)
        out = attend_pages(q, k, v, pages, there, blocks, index, CFG, "flex", mask_mod, scale, score_mod).out
        assert_as_exact(out.cpu(), low, truth)


def case_to(
    device: str,
    case: Case,
    index: tls.KVIndex,
    pool: tuple[Tensor, Tensor, Pages],
    scored: Scored,
    look: BlockSelection,
) -> tuple[Tensor, Tensor, Tensor, Pages, Scored, BlockSelection, tls.KVIndex]:
    moved = tls.KVIndex.build(case.k.to(device), CFG, case.seq_lens.to(device), case.q.to(device))
    if device == "cpu":
        return case.q, *pool, scored, look, index
    to = lambda x: dataclasses.replace(x, indices=x.indices.to(device), counts=x.counts.to(device))  # noqa: E731
    pages = Pages(pool[2].slot_of_block.to(device), pool[2].block_of_slot.to(device), pool[2].block_size)
    there = Scored(*(x.to(device) for x in scored[:3]), to(scored.chosen))
    return case.q.to(device), pool[0].to(device), pool[1].to(device), pages, there, to(look), moved


@given(cases(max_t=4), st.integers(1, 3))
def test_an_earlier_query_of_a_chunk_selects_what_it_selects_in_it(case: Case, less: int) -> None:
    t = case.q.shape[2]
    less = min(less, t - 1)
    index = case.index()
    scale = case.q.shape[-1] ** -0.5
    whole = score(case.q, index, case.cfg, "reference", None, scale).chosen
    part = score(case.q[:, :, : t - less], earlier(index, less), case.cfg, "reference", None, scale).chosen
    assert torch.equal(part.indices, whole.indices[:, :, : t - less])


def test_the_fused_kernels_say_that_they_do_not_read_a_pool() -> None:
    assert paged_backend("auto", torch.device("cpu")) == paged_backend("auto", torch.device("cuda")) == "flex"
    with pytest.raises(BackendUnavailable, match="read no pool of block slots; use 'flex' or 'auto'"):
        paged_backend("triton", torch.device("cuda"))
