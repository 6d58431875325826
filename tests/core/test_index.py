from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flex_tls import KVIndex, TLSConfig
from flex_tls.index import KeyChunks, fit
from flex_tls.labels import TokenLabels
from flex_tls.labels import fit as fit_labels
from flex_tls.ragged import align_left, align_right
from tests.cases import KINDS, Case, cases

CFG = TLSConfig(block_size=16, block_budget=64, token_budget=None, sink_tokens=4, recent_tokens=4, label_dims=8)


def scores(index: KVIndex, q: torch.Tensor) -> list[torch.Tensor]:
    """What selection would read: label scores of held tokens, and summary scores of blocks with tokens."""
    b, hq, t, d = q.shape
    folded = q.reshape(b, index.n_kv_heads, hq // index.n_kv_heads * t, d)
    slot = torch.arange(index.labels.codes.shape[3])
    held = (slot < index.seq_lens[:, None])[:, None, None]
    parts = [index.labels.scores(folded).masked_fill(~held, 0.0)]
    if index.summary is not None:
        block = torch.arange(index.n_blocks) * index.cfg.block_size < index.seq_lens[:, None]
        parts.append(index.summary.scores(folded).masked_fill(~block[:, None, None], 0.0))
    return parts


def quantum(index: KVIndex, q: torch.Tensor) -> torch.Tensor:
    """What one code more in every channel would change a score by: [B, HKV, R, 1]; 0 for exact labels."""
    b, hq, t, d = q.shape
    folded = q.reshape(b, index.n_kv_heads, hq // index.n_kv_heads * t, d)
    if index.labels.words is None:
        return torch.zeros(*folded.shape[:3], 1)
    return ((folded @ index.labels.to_query).abs() * index.labels.step[:, :, None]).sum(-1, keepdim=True)


def assert_same(a: KVIndex, b: KVIndex, q: torch.Tensor) -> None:
    assert torch.equal(a.seq_lens, b.seq_lens)
    for x, y in zip(scores(a, q), scores(b, q), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def growing(case: Case, capacity: int) -> KVIndex:
    """An empty index with the projection that building on the whole prompt gives."""
    b, h, _, d = case.k.shape
    index = KVIndex(case.cfg, batch_size=b, n_kv_heads=h, head_dim=d, capacity_tokens=capacity, dtype=case.k.dtype)
    index.fit(case.k, case.seq_lens, case.q)
    return index


@given(cases())
def test_appending_one_token_at_a_time_equals_building_at_once(case: Case) -> None:
    longest = int(case.seq_lens.min())
    k = case.k[:, :, :longest].contiguous()
    built = KVIndex.build(k, case.cfg, q=case.q)
    grown = growing(Case(case.q, k, case.v, torch.full_like(case.seq_lens, longest), case.cfg), longest)
    for token in range(longest):
        grown.append(k[:, :, token : token + 1])
    assert grown.max_len == built.max_len == longest
    assert_same(grown, built, case.q)


@given(cases(), st.integers(0, 2**16))
def test_a_batch_equals_its_rows_one_by_one(case: Case, seed: int) -> None:
    whole = case.index()
    order = torch.randperm(len(case.seq_lens), generator=torch.Generator().manual_seed(seed))
    whole.reorder(order)
    for place, row in enumerate(order.tolist()):
        n = int(case.seq_lens[row])
        alone = KVIndex.build(
            case.k[row : row + 1, :, :n].contiguous(),
            case.cfg,
            q=case.q[row : row + 1],
            capacity_tokens=case.k.shape[2],
        )
        wide, narrow = scores(whole, case.q[order]), scores(alone, case.q[row : row + 1])
        # Products of another batch size round differently, and a code on the edge then falls to the other side
        allowed = (quantum(whole, case.q[order])[place] + quantum(alone, case.q[row : row + 1])[0]) / 2
        assert bool(((wide[0][place] - narrow[0][0]).abs() <= allowed + 1e-3).all())
        for x, y in zip(wide[1:], narrow[1:], strict=True):
            torch.testing.assert_close(x[place], y[0], rtol=1e-4, atol=1e-4)


@given(cases(), st.data())
def test_crop_then_append_equals_never_having_seen_the_tail(case: Case, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, int(case.seq_lens.max())))
    index = growing(case, case.k.shape[2] + 40)
    index.append(case.k, case.seq_lens)
    index.crop(keep, case.k)
    kept = case.seq_lens.clamp_max(keep)
    fresh = growing(case, case.k.shape[2] + 40)
    fresh.append(case.k, kept)
    assert_same(index, fresh, case.q)
    more = torch.randn(case.k.shape[0], case.k.shape[1], 35, case.k.shape[3])
    index.append(more)
    fresh.append(more)
    assert_same(index, fresh, case.q)


@given(cases())
def test_reset_leaves_an_index_as_new(case: Case) -> None:
    index = case.index()
    index.reset()
    index.fit(case.k, case.seq_lens, case.q)
    index.append(case.k, case.seq_lens)
    assert_same(index, case.index(), case.q)


@given(cases(kinds=("lowrank",)))
def test_refit_on_the_same_keys_changes_nothing(case: Case) -> None:
    index = case.index()
    index.refit(case.k)
    assert_same(index, case.index(), case.q)


@given(cases(kinds=("lowrank",)), st.integers(1, 4))
def test_observing_queries_in_chunks_then_refitting_equals_fitting_on_all(case: Case, n_chunks: int) -> None:
    # Queries as many as keys would be taken as the keys' own, row by row
    assume(case.k.shape[2] not in (2, 12))
    queries = torch.randn(case.q.shape[0], case.q.shape[1], 12, case.q.shape[3])
    whole = KVIndex.build(case.k, case.cfg, case.seq_lens, queries)
    index = KVIndex.build(case.k, case.cfg, case.seq_lens, queries[:, :, :2])
    for chunk in queries[:, :, 2:].chunk(n_chunks, dim=2):
        padded = torch.cat([chunk, torch.full_like(chunk, 1e3)], dim=2)
        index.observe(padded, torch.full((len(case.seq_lens),), chunk.shape[2]))
    index.refit(case.k)
    torch.testing.assert_close(index.labels.query_sum, whole.labels.query_sum, rtol=1e-4, atol=1e-4)
    assert torch.equal(index.labels.query_count, whole.labels.query_count)
    # From the same sums the same labels follow, to the bit
    whole.labels.query_sum.copy_(index.labels.query_sum)
    whole.refit(case.k)
    assert torch.equal(index.labels.codes, whole.labels.codes)
    assert index.observed_tokens == 0


@given(cases(kinds=("lowrank",)), st.integers(1, 3))
def test_layers_fitted_together_are_each_as_fitted_alone(case: Case, n_layers: int) -> None:
    # As many queries as keys would be taken row by row
    assume(case.q.shape[2] != case.k.shape[2])
    alone, together, keys = [], [], []
    for number in range(n_layers):
        k = case.k + number * case.k.flip(2)
        index = KVIndex.build(k, case.cfg, case.seq_lens, q=case.q)
        other = KVIndex.build(case.k, case.cfg, case.seq_lens)
        other.labels.forget_queries()
        other.observe(case.q)
        alone.append(index)
        together.append(other)
        keys.append(KeyChunks.of(k))
    fit(together, keys, case.seq_lens)
    for index, other, k in zip(alone, together, keys, strict=True):
        other.relabel(k)
        assert other.fitted_tokens == index.fitted_tokens
        assert_same(index, other, case.q)


@pytest.mark.parametrize("dims", [1, 7, 8, 16])
@pytest.mark.parametrize("bits", [2, 4, 8, (4, 8, 8), (2, 4), (8, 4, 2)])
def test_codes_survive_packing(bits: int | tuple[int, ...], dims: int) -> None:
    """Oracle: dequantised labels times queries of 8 bits, channel by channel, without packing."""
    gen = torch.Generator().manual_seed(dims)
    k, q = torch.randn(2, 3, 70, 16, generator=gen), torch.randn(2, 3, 5, 16, generator=gen)
    words = TLSConfig(label_bits=bits).label_words(dims)
    labels = TokenLabels.empty(2, 3, 70, 16, dims=dims, words=words, device=k.device)
    levels = torch.tensor([2.0**bits - 1 for bits in words for _ in range(32 // bits)])[:dims]
    fit_labels([labels], [lambda: [(k, torch.ones(2, 70, dtype=torch.bool))]])
    labels.codes.copy_(labels.encode(k))
    place = k @ labels.to_code + labels.offset[:, :, None]
    code = place.round().clamp_min(0).minimum(levels)
    value = labels.low[:, :, None] + labels.step[:, :, None] * code
    asked = q @ labels.to_query
    unit = (asked * labels.step[:, :, None]).abs().amax(-1, keepdim=True) / 127
    rounded = (asked * labels.step[:, :, None] / unit + 0.5).floor()
    middle = levels / 2
    lost = asked * labels.step[:, :, None] - unit * rounded
    base = (asked * labels.low[:, :, None] + lost * middle).sum(-1, keepdim=True)
    truth = base.double() + unit.double() * (rounded.double() @ code.double().transpose(-1, -2))
    torch.testing.assert_close(labels.scores(q).double(), truth, rtol=1e-4, atol=1e-4)
    for few in range(1, dims):
        few_base = (asked * labels.low[:, :, None] + lost * middle)[..., :few].sum(-1, keepdim=True).double()
        few_truth = few_base + unit.double() * (
            rounded[..., :few].double() @ code[..., :few].double().transpose(-1, -2)
        )
        torch.testing.assert_close(labels.scores(q, few).double(), few_truth, rtol=1e-4, atol=1e-4)
    exact = asked.double() @ value.double().transpose(-1, -2)
    bound = 0.5 * unit * (code - middle).abs().sum(-1)[:, :, None] + 1e-4
    assert ((truth - exact).abs() <= bound).all()
    assert (code - place).abs().max() <= 0.51
    # Leading channels are what queries of unit variance see of the keys: value is their centred key, but for a rounding
    if dims == 16:
        centred = q.double() @ (k - k.mean(2, keepdim=True)).double().transpose(-1, -2)
        slack = (asked.double().abs() @ labels.step[..., None].double()) * 0.51
        assert ((asked.double() @ value.double().transpose(-1, -2) - centred).abs() <= slack + 1e-4).all()


def test_all_channels_at_eight_bits_give_the_true_scores() -> None:
    """A full-rank projection is the identity in disguise, query-weighted or not."""
    gen = torch.Generator().manual_seed(0)
    k, q = torch.randn(1, 2, 400, 16, generator=gen), torch.randn(1, 4, 400, 16, generator=gen)
    q = q * torch.linspace(0.2, 3, 16)
    cfg = TLSConfig(block_size=16, block_budget=64, token_budget=None, sink_tokens=0, recent_tokens=1, label_dims=16,
                    label_bits=8)  # fmt: skip
    index = KVIndex.build(k, cfg, q=q)
    asked = q[:, :, -4:].reshape(1, 2, 8, 16)
    truth = asked.double() @ (k - k[:, :, :400].mean(2, keepdim=True)).double().transpose(-1, -2)
    assert float((index.labels.scores(asked)[..., :400] - truth).norm() / truth.norm()) < 0.01


@given(st.integers(1, 40), st.lists(st.integers(0, 39), min_size=1, max_size=4))
def test_align_right_undoes_align_left(length: int, pads: list[int]) -> None:
    pad = torch.tensor([p % length for p in pads])
    x = torch.randn(len(pads), 2, length, 3)
    left = align_left(x, pad)
    for row, p in enumerate(pad.tolist()):
        assert torch.equal(left[row, :, : length - p], x[row, :, p:])
    assert torch.equal(align_right(left, pad), x)


def test_memory_is_reported() -> None:
    cfg = TLSConfig(label_dims=32, label_bits=4)
    index = KVIndex.build(torch.randn(1, 2, 4096, 128), cfg)
    assert index.labels.codes.numel() * 4 == 2 * 4096 * 16
    assert index.nbytes == sum(x.numel() * x.element_size() for x in index._tensors())
    assert index.bytes_per_token == 16
    assert 0 < index.kv_share < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_what_was_expected_and_change_nothing(kind: str) -> None:
    cfg = TLSConfig(**{**CFG.__dict__, "index": kind})
    k = torch.randn(2, 3, 20, 16)
    bad = k.clone()
    bad[1, 2, 7, 0] = torch.nan
    for build, error, message in (
        (lambda: KVIndex.build(bad, cfg), ValueError, r"k: expected finite numbers, got NaN.*row 1, head 2, token 7"),
        (lambda: KVIndex.build(k[:, :, :0], cfg), ValueError, r"k: expected at least 1 token, got 0"),
        (lambda: KVIndex.build(k, cfg, torch.tensor([0, 3])), ValueError, r"seq_lens: expected at least 1.*drop empty"),
        (lambda: KVIndex.build(k, cfg, torch.tensor([21, 3])), ValueError, r"seq_lens: expected at most 20.*got 21"),
        (lambda: KVIndex.build(k, cfg, torch.tensor([3])), ValueError, r"seq_lens: expected shape \(2,\)"),
        (lambda: KVIndex.build(k, cfg, torch.tensor([3.0, 2.0])), TypeError, r"seq_lens: expected an integer tensor"),
        (lambda: KVIndex.build(k[0], cfg), ValueError, r"k: expected 4 dimensions \[B, HKV, S, D\]"),
        (lambda: KVIndex.build(k.long(), cfg), TypeError, r"k: expected a floating-point dtype, got torch.int64"),
        (lambda: KVIndex.build(k, cfg, capacity_tokens=10), ValueError, r"capacity_tokens: expected at least 20"),
        (lambda: KVIndex.build(k, cfg, q=k[:, :2]), ValueError, r"q: expected HQ to be a multiple of HKV = 3, got 2"),
    ):
        with pytest.raises(error, match=message):
            build()
    index = KVIndex.build(k, cfg, capacity_tokens=21)
    index.append(k[:, :, :1])
    before = [x.clone() for x in index._tensors()]
    with pytest.raises(ValueError, match=r"expected at most capacity_tokens=21 tokens a row, 22 needed"):
        index.append(k[:, :, :1])
    with pytest.raises(ValueError, match=r"k_new: expected 3 for HKV.*got 6; pass un-repeated"):
        index.append(torch.randn(2, 6, 1, 16))
    with pytest.raises(TypeError, match=r"k_new: expected dtype torch.float32, the index's, got torch.float16"):
        index.append(k[:, :, :1].half())
    with pytest.raises(ValueError, match=r"seq_lens: expected at least 0 tokens to keep, got -1"):
        index.crop(-1, k)
    if index.summary is not None:
        with pytest.raises(ValueError, match=r"k: expected the cached keys, got None"):
            index.crop(3)
    assert all(torch.equal(x, y) for x, y in zip(before, index._tensors(), strict=True))


@given(st.integers(0, 2**31), st.sampled_from((3, 12, 24)), st.booleans())
def test_the_projection_is_the_best_of_its_rank_for_what_queries_ask(seed: int, dims: int, asked: bool) -> None:
    torch.manual_seed(seed)
    d = 24
    spread = torch.logspace(0, -2, d)
    k = torch.randn(1, 2, 400, d) * spread @ torch.linalg.qr(torch.randn(d, d)).Q
    q = torch.randn(1, 4, 300, d) * spread @ torch.linalg.qr(torch.randn(d, d)).Q if asked else None
    cfg = TLSConfig(block_size=16, block_budget=48, token_budget=32, sink_tokens=0, recent_tokens=8,
                    label_dims=dims, label_bits=8)  # fmt: skip
    labels = KVIndex.build(k, cfg, q=q).labels
    wide = k.double() - k.double().mean(2, keepdim=True)
    ck = wide.transpose(-1, -2) @ wide
    cq = torch.eye(d, dtype=torch.float64).expand(1, 2, d, d)
    if asked:
        moment = labels.query_sum.double() / labels.query_count.double()
        share = d / (d + float(labels.query_count))
        cq = (1 - share) * moment + share * moment.diagonal(dim1=-1, dim2=-2).mean(-1)[..., None, None] * cq
    # E |q k - q P k|^2 with P of rank ``dims`` is least where A^T P A^-T keeps the leading directions of A^T Ck A
    values, vectors = torch.linalg.eigh(cq)
    root = vectors * values.sqrt()[..., None, :] @ vectors.transpose(-1, -2)
    least = torch.linalg.eigvalsh(root @ ck @ root)[..., : d - dims].clamp_min(0).sum(-1)
    missed = torch.eye(d).double() - (labels.to_code * labels.step[..., None, :] @ labels.to_query.mT).double()
    loss = (cq @ missed.mT @ ck @ missed).diagonal(dim1=-1, dim2=-2).sum(-1)
    whole = (cq @ ck).diagonal(dim1=-1, dim2=-2).sum(-1)
    assert bool((loss <= 1.1 * least + 1e-5 * whole).all())


def test_a_projection_is_found_where_directions_do_not_mix() -> None:
    """Two channels apart, the others all alike: their shared direction is the heaviest, though none of them is."""
    common, apart = torch.randn(400, 1), torch.randn(400, 2) * 1.5
    k = torch.cat([apart, common.expand(-1, 22)], 1)[None, None]
    cfg = TLSConfig(block_size=16, block_budget=48, token_budget=32, sink_tokens=0, recent_tokens=8, label_dims=1,
                    label_bits=8)  # fmt: skip
    to_query = KVIndex.build(k, cfg).labels.to_query[0, 0, :, 0]
    assert float(to_query[2:].square().sum() / to_query.square().sum()) > 0.99


def test_padding_may_hold_anything() -> None:
    k, q = torch.randn(2, 1, 90, 16), torch.randn(2, 2, 90, 16)
    lens = torch.tensor([90, 40])
    spoiled, asked = k.clone(), q.clone()
    spoiled[1, :, 40:] = torch.nan
    asked[1, :, 40:] = torch.inf
    got, want = (
        KVIndex.build(*given, q=queries) for given, queries in (((spoiled, CFG, lens), asked), ((k, CFG, lens), q))
    )
    assert torch.equal(got.labels.to_code, want.labels.to_code)
    assert torch.equal(got.labels.to_query, want.labels.to_query)


def test_queries_that_are_nearly_one_spoil_no_projection() -> None:
    """Rounding makes the sum of millions of nearly equal queries indefinite: then the keys decide alone."""
    k = torch.randn(1, 1, 300, 16) * torch.logspace(0, -2, 16) @ torch.linalg.qr(torch.randn(16, 16)).Q
    index = KVIndex(CFG, batch_size=1, n_kv_heads=1, head_dim=16, capacity_tokens=300, dtype=torch.float32)
    index.labels.query_sum.copy_(1e6 * (torch.ones(16, 16) - 0.01 * torch.eye(16)))
    index.labels.query_count.fill_(1e6)
    index.fit(k)
    labels = index.labels
    wide = (k - k[:, :, 4:].mean(2, keepdim=True))[0, 0, 4:].double()
    left = wide - wide @ (labels.to_code * labels.step[..., None, :] @ labels.to_query.mT)[0, 0].double()
    least = torch.linalg.eigvalsh(wide.T @ wide)[:8].sum()
    assert float(left.square().sum()) < 1.1 * float(least) + 1e-5 * float(wide.square().sum())


def test_channel_labels_are_the_keys_own_heaviest_channels() -> None:
    """Double Sparsity: keys' channels as they are, those of the largest products with queries, the heaviest first."""
    gen = torch.Generator().manual_seed(1)
    spread = torch.tensor([1.0, 8.0, 2.0, 0.5, 4.0, 1.0, 0.1, 3.0])
    asked = torch.tensor([14.0, 1.0, 2.0, 1.0, 0.1, 1.0, 1.0, 3.0])
    k = torch.randn(1, 2, 300, 8, generator=gen) * spread
    q = torch.randn(1, 4, 300, 8, generator=gen) * asked
    cfg = TLSConfig(block_size=16, block_budget=64, token_budget=None, sink_tokens=0, recent_tokens=1, label_dims=4,
                    label_bits=8, label_basis="channels")  # fmt: skip
    index = KVIndex.build(k, cfg, q=q)
    channels = index.labels.to_query.argmax(-2)
    assert channels.tolist() == [[[0, 7, 1, 2]] * 2]
    some = torch.zeros(8)
    some[[0, 7, 1, 2]] = 1
    scores = index.labels.scores(q[:, :2] * some)[..., :300]
    truth = (q[:, :2] * some) @ (k - k.mean(2, keepdim=True))[:, :2].transpose(-1, -2)
    shift = (scores - truth).mean(-1, keepdim=True)
    assert (scores - truth - shift).abs().max() < 0.02 * truth.abs().max()
    without = KVIndex.build(k, cfg).labels.to_query.argmax(-2)
    assert without.tolist() == [[[1, 4, 7, 2]] * 2]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_queries_are_summed_in_float32(dtype: torch.dtype) -> None:
    index = KVIndex(CFG, batch_size=2, n_kv_heads=2, head_dim=64, capacity_tokens=64, dtype=dtype, device="cuda")
    q = torch.randn(2, 700, 6, 64, dtype=dtype, device="cuda").transpose(1, 2)
    index.observe(q, torch.tensor([700, 33], device="cuda"))
    rows = [q[b, :, :n].double().reshape(2, 3 * n, 64) for b, n in enumerate((700, 33))]
    want = torch.stack([x.mT @ x for x in rows])
    assert float((index.labels.query_sum.double() - want).norm() / want.norm()) < 1e-5
