from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flex_tls as tls
from bench.tries.boxes import Boxes, box_scores
from bench.tries.measure import make_tries, measure
from bench.tries.rows import level1_bytes, table
from flex_tls import selection
from flex_tls.evaluate.documents import Document
from flex_tls.evaluate.rows import Origin

from ..integrations.models import SPARSE, VOCAB, make

CFG = tls.TLSConfig(block_size=16, block_budget=96, token_budget=48, sink_tokens=16, recent_tokens=20, label_dims=12)


def indexed(cfg: tls.TLSConfig, s: int = 300, *, seed: int = 0, b: int = 1, t: int = 8) -> tuple[tls.KVIndex, Tensor]:
    """An index of s tokens of 2 KV heads, and the last t queries of 4 heads: [b, 4, t, 16]."""
    gen = torch.Generator().manual_seed(seed)
    k, q = (torch.randn(b, h, s, 16, generator=gen) for h in (2, 4))
    # Neighbours are alike, as in text; else every box is as wide as all keys
    k = k / 2 + 2 * torch.randn(b, 2, -(-s // 16), 16, generator=gen).repeat_interleave(16, 2)[:, :, :s]
    return tls.KVIndex.build(k, cfg, q=q), 3 * q[:, :, -t:]


def selected(
    boxes: Boxes | None, index: tls.KVIndex, q: Tensor, cfg: tls.TLSConfig
) -> tuple[tls.BlockSelection, tls.TokenSelection]:
    if boxes is None:
        return selection.select(q, index, cfg, None, None, None)
    with boxes.patched():
        return selection.select(q, index, cfg, None, None, None)


@given(
    bits=st.sampled_from([2, 4, 8, (4, 2)]),
    size=st.sampled_from([16, 32, 64]),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_an_undamped_box_never_scores_below_the_best_label_in_it(
    bits: int | tuple[int, ...], size: int, blocks: int, seed: int
) -> None:
    cfg = replace(CFG, block_size=size, block_budget=192, label_bits=bits)
    index, q = indexed(cfg, blocks * size, seed=seed)
    asked = q.view(1, 2, -1, 16)
    for channels in (None, 8):
        best = selection.label_block_scores(index.labels.scores(asked, channels), cfg)
        bound = box_scores(index.labels, asked, size, radius=1.0, channels=channels)
        assert bool((bound >= best).all())
        # Damped it promises less
        assert bool((box_scores(index.labels, asked, size, radius=0.35, channels=channels) <= bound).all())


def test_a_box_of_equal_labels_scores_as_they_do() -> None:
    k, q = (torch.randn(1, h, 8, 16, generator=torch.Generator().manual_seed(1)) for h in (2, 4))
    index = tls.KVIndex.build(k.repeat_interleave(16, 2), CFG, q=q)
    asked = q.view(1, 2, -1, 16)
    labels = selection.label_block_scores(index.labels.scores(asked), CFG)
    for radius in (0.0, 0.35, 1.0):
        torch.testing.assert_close(box_scores(index.labels, asked, 16, radius=radius), labels)


@given(seed=st.integers(0, 999), s=st.integers(100, 300), t=st.integers(1, 16), reduce=st.sampled_from(["max", "mean"]))
def test_boxes_that_let_every_block_through_change_nothing(seed: int, s: int, t: int, reduce: str) -> None:
    for cfg in (CFG, replace(CFG, group_reduce=reduce, block_reduce="logsumexp")):
        index, q = indexed(cfg, s, seed=seed, t=t)
        for mine, ours in zip(selected(Boxes(times=4), index, q, cfg), selected(None, index, q, cfg), strict=True):
            for name, value in asdict(ours).items():
                assert torch.equal(torch.as_tensor(getattr(mine, name)), torch.as_tensor(value)), name


@given(
    seed=st.integers(0, 999),
    s=st.integers(120, 300),
    t=st.integers(1, 16),
    times=st.sampled_from([1.0, 1.5, 2.0]),
    radius=st.sampled_from([0.0, 0.35, 1.0]),
)
def test_sinks_and_window_stay_and_blocks_are_kept_of_those_that_boxes_leave(
    seed: int, s: int, t: int, times: float, radius: float
) -> None:
    boxes = Boxes(times, radius)
    index, q = indexed(CFG, s, seed=seed, b=2, t=t)
    tokens = selection.token_scores(q, index, None, None, None)
    left = boxes.keep(q, index, CFG, tokens, None)
    blocks, chosen = selected(boxes, index, q, CFG)
    positions = chosen.positions[0]
    seen = positions // 16 + 1
    assert torch.equal(left.sum(-1)[0, 0], seen.clamp_max(round(times * CFG.kept_blocks)))
    kept = blocks.kept()
    assert bool((blocks.counts == seen.clamp_max(CFG.kept_blocks)).all())
    assert bool((left | ~kept).all())
    if times == 1:
        assert torch.equal(left, kept)
    assert bool(chosen.mask[..., :16].all())
    for i, position in enumerate(positions.tolist()):
        assert bool(chosen.mask[:, :, i, position - CFG.recent_tokens + 1 : position + 1].all())
        assert not bool(chosen.mask[:, :, i, position + 1 :].any())
    assert bool((chosen.counts == CFG.token_budget).all())


@given(seed=st.integers(0, 999), s=st.integers(120, 300), t=st.integers(2, 16))
def test_a_query_selects_alike_in_a_chunk_and_by_itself(seed: int, s: int, t: int) -> None:
    index, q = indexed(CFG, s, seed=seed, t=t)
    _, chunk = selected(Boxes(), index, q, CFG)
    for i in reversed(range(t)):
        index.crop(s - t + i + 1)
        _, alone = selected(Boxes(), index, q[:, :, i : i + 1], CFG)
        assert torch.equal(alone.mask[:, :, 0], chunk.mask[:, :, i])


def test_the_package_is_as_it_was() -> None:
    before = selection.level_scores
    index, q = indexed(CFG)
    counts = selected(Boxes(), index, q, CFG)[0].counts
    assert selection.level_scores is before
    assert torch.equal(counts, selected(None, index, q, CFG)[0].counts)


def test_names_say_times_radius_and_channels() -> None:
    assert Boxes.parse("boxes") == Boxes(1.0, 0.35, None)
    assert Boxes.parse("boxes:x1.5:r.2:c16") == Boxes(1.5, 0.2, 16)
    assert Boxes.parse("boxes:r1") == Boxes(1.0, 1.0)
    assert [each.boxes for each in make_tries(["prefilter"], CFG)] == [None, Boxes(), Boxes(2.0), Boxes(4.0)]
    for wrong in ("boxes:2", "boxes:r1:x2", "boxes:x2/oracle", "boxesx2"):
        with pytest.raises(ValueError, match=r"boxes: expected boxes\[:xTIMES\]"):
            make_tries([wrong], CFG)
    for wrong in ("boxes:x0.5", "boxes:c0"):
        with pytest.raises(ValueError, match="of at least 1, got"):
            Boxes.parse(wrong)


def test_level_1_reads_boxes_and_the_labels_that_are_left() -> None:
    cfg = tls.TLSConfig(block_size=32, block_budget=384, token_budget=192)
    for name, expected in (("boxes", 1), ("boxes:c8", 0.25), ("boxes:x2", 1 + 4), ("boxes:x4", 9), ("boxes:x9", 17)):
        assert Boxes.parse(name).level1_bytes(cfg, 64, 96, 16) == expected
    two = replace(cfg, label_bits=(4, 2))
    assert Boxes().level1_bytes(two, 64, 96, 8) == 0.5
    assert Boxes(channels=8).level1_bytes(two, 64, 96, 8) == 0.25


def test_rows_have_what_level_1_reads_and_older_rows_go_by_whole_labels() -> None:
    model, n = make(), 110
    ids = torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(3)).tolist()
    origin = Origin(
        model="tiny", dtype="float32", device="cpu", flex_tls="0", torch="0", transformers="0", commit="abc", date=""
    )
    document = Document("choosing/tiny", tuple(ids))
    tries = make_tries(["boxes", "boxes:x9"], SPARSE)
    found = {row["try"]: row for row in measure(model, origin, document, n - 10, tries)}
    assert [row["level1_bytes"] for row in found.values()] == [8, 1, 1 + 8]
    # All blocks are left
    assert found["boxes:x9"]["kl"] == found["ours"]["kl"]
    assert found["boxes"]["kl"] != found["ours"]["kl"]
    assert found["boxes"]["kept_blocks"] == found["ours"]["kept_blocks"] == 3
    old = {name: value for name, value in found["ours"].items() if name != "level1_bytes"}
    assert level1_bytes(old) == 8
    lines = table([old, found["boxes"]]).splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:]] == [["`ours`", "8", "8"], ["`boxes`", "8", "1"]]
