"""The two levels of selection: which blocks, and which tokens inside them. Every query token selects for itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_tensor
from .config import TLSConfig
from .index import KVIndex
from .mods import MaskMod, ScoreMod, apply_mods, query_positions

# Tokens' scores may pass their blocks' where level 1 reads fewer channels: an exponent that float32 still holds
MOST_EXPONENT = 80.0
# Largest rank made of raw scores: the float16 two below infinity
LARGEST_HALF = 65472.0


@dataclass(frozen=True)
class BlockSelection:
    """Blocks kept by level 1, per KV head and query token.

    Attributes:
        indices: int32 [B, HKV, T, K], ascending; entries past the count hold N.
        counts: int32 [B, HKV, T].
        n_blocks: N, blocks that the cache has room for.
        block_size: tokens per block.
        group: G, query heads per KV head.
        capacity_tokens: S, slots of the cache.
    """

    indices: Tensor
    counts: Tensor
    n_blocks: int
    block_size: int
    group: int
    capacity_tokens: int

    def kept(self) -> Tensor:
        """Bool [B, HKV, T, N]: block n is kept."""
        b, h, t, _ = self.indices.shape
        kept = torch.zeros(b, h, t, self.n_blocks + 1, dtype=torch.bool, device=self.indices.device)
        return kept.scatter(3, self.indices.long(), True)[..., :-1]


@dataclass(frozen=True)
class TokenSelection:
    """Tokens kept by both levels, one bit each.

    Attributes:
        words: int32 [B, HKV, T, W]; bit ``s % word_tokens`` of word ``s // word_tokens`` says whether slot s is kept.
            Never outside the kept blocks, nor past the query's position.
        positions: int64 [B, T], logical positions of the query tokens.
        group: G, query heads per KV head.
        word_tokens: tokens per word, a power of two up to 32.
        n_slots: slots that the selection speaks of, N * block_size.
    """

    words: Tensor
    positions: Tensor
    group: int
    word_tokens: int
    n_slots: int

    @classmethod
    def from_mask(cls, mask: Tensor, positions: Tensor, group: int) -> TokenSelection:
        """From a bool mask [B, HKV, T, S]."""
        return cls(pack_words(mask), positions, group, 32, mask.shape[-1])

    @property
    def mask(self) -> Tensor:
        """Bool [B, HKV, T, n_slots]."""
        bit = torch.arange(self.word_tokens, dtype=torch.int32, device=self.words.device)
        return ((self.words[..., None] >> bit) & 1).bool().flatten(3)[..., : self.n_slots]

    @property
    def counts(self) -> Tensor:
        """Int64 [B, HKV, T], tokens kept."""
        return self.mask.sum(-1)

    def indices(self, width: int) -> Tensor:
        """Int32 [B, HKV, T, width], ascending; entries past the count hold ``n_slots``."""
        slot = torch.arange(self.n_slots, device=self.words.device, dtype=torch.int32)
        return torch.where(self.mask, slot, self.n_slots).sort(-1).values[..., :width]


def select_blocks(
    q: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
) -> BlockSelection:
    """Level 1: keep the blocks with the best scores, and always the sinks and the recent window.

    Args:
        q: queries [B, HQ, T, D], the last T tokens of each row, already in the index.
        index: index of the layer's keys.
        cfg: budgets and reductions; block size and index kind must be the index's.
        score_mod: applied to label scores ("lowrank", "oracle"); other kinds score blocks without it.
        mask_mod: what it masks is not selected.
        scale: of the scores, 1/sqrt(D) by default.

    Returns:
        At most ``block_budget`` tokens' worth of blocks a query token. Ties go to the lower block.

    Source: AsyncTLS, arXiv 2604.07815 (level 1).
    """
    _check(q, index, cfg)
    tokens = token_scores(q, index, score_mod, mask_mod, scale, cfg.filter_dims) if _by_labels(cfg) else None
    return blocks_from_scores(q, index, cfg, tokens, mask_mod, scale)


def select_tokens(
    q: Tensor,
    index: KVIndex,
    blocks: BlockSelection,
    cfg: TLSConfig,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
) -> TokenSelection:
    """Level 2: inside ``blocks`` keep the ``token_budget`` tokens with the best label scores, sinks and window first.

    Arguments as in :func:`select_blocks`. Ties go to the lower position. Source: arXiv 2604.07815 (level 2).
    """
    _check(q, index, cfg)
    scores, few = level_scores(q, index, cfg, score_mod, mask_mod, scale)
    return tokens_from_scores(index, cfg, blocks, scores, label_block_scores(few, cfg))


def select(
    q: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float | None,
) -> tuple[BlockSelection, TokenSelection]:
    """Both levels; the label scores are computed once unless level 1 reads fewer channels. Unchecked: for backends."""
    scores, few = level_scores(q, index, cfg, score_mod, mask_mod, scale)
    blocks = blocks_from_scores(q, index, cfg, few, mask_mod, scale)
    return blocks, tokens_from_scores(index, cfg, blocks, scores, label_block_scores(few, cfg))


def level_scores(
    q: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Label scores for level 2 and for level 1, which may read fewer channels; see :func:`token_scores`."""
    scores = token_scores(q, index, score_mod, mask_mod, scale)
    if cfg.filter_dims is None or not _by_labels(cfg):
        return scores, scores
    return scores, token_scores(q, index, score_mod, mask_mod, scale, cfg.filter_dims)


def token_scores(
    q: Tensor,
    index: KVIndex,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float | None,
    dims: int | None = None,
) -> Tensor:
    """Label scores after the mods, of the first ``dims`` channels: float32 [B, HKV, G, T, N * block_size].

    They are -inf where a query must not look.
    """
    b, hq, t, d = q.shape
    hkv = index.n_kv_heads
    scores = index.labels.scores(q.reshape(b, hkv, hq // hkv * t, d), dims) * _scale(scale, d)
    scores = scores.view(b, hkv, hq // hkv, t, -1)
    return apply_mods(scores, query_positions(index.seq_lens, t), index.capacity_tokens, score_mod, mask_mod)


def blocks_from_scores(
    q: Tensor, index: KVIndex, cfg: TLSConfig, tokens: Tensor | None, mask_mod: MaskMod | None, scale: float | None
) -> BlockSelection:
    """Level 1 from label scores ``tokens`` (kinds scored by labels) or from the index's block summaries."""
    return keep_blocks(block_scores(q, index, cfg, tokens, mask_mod, scale), index, cfg)


def block_scores(
    q: Tensor, index: KVIndex, cfg: TLSConfig, tokens: Tensor | None, mask_mod: MaskMod | None, scale: float | None
) -> Tensor:
    """What level 1 ranks blocks by: float32 [B, HKV, G, T, N], -inf where a query must not look or need not ask.

    Arguments as in :func:`blocks_from_scores`.
    """
    b, hq, t, d = q.shape
    hkv, n, size = index.n_kv_heads, index.n_blocks, cfg.block_size
    group = hq // hkv
    if index.summary is None:
        assert tokens is not None
        return label_block_scores(tokens, cfg)
    scores = index.summary.scores(q.reshape(b, hkv, group * t, d)) * _scale(scale, d)
    scores = scores.view(b, hkv, group, t, n)
    position = query_positions(index.seq_lens, t)[:, None, :, None]
    own = torch.div(position, size, rounding_mode="floor")
    # The newest block's summary may hold tokens later than the query: it is kept anyway, so leave it unscored
    before = torch.arange(n, device=q.device) < own
    scores = scores.masked_fill(~before[:, :, None], -torch.inf)
    if mask_mod is not None:
        slots = torch.zeros(b, hkv, group, t, n * size, device=q.device)
        seen = apply_mods(slots, position[:, 0, :, 0], index.capacity_tokens, None, mask_mod)
        scores = scores.masked_fill(_per_block(seen, n, size).isneginf().all(-1), -torch.inf)
    return scores


def block_ranks(scores: Tensor, index: KVIndex, cfg: TLSConfig) -> Tensor:
    """Float32 [B, HKV, T, N] of :func:`block_scores`: +inf for sinks and recent window, -inf past a query."""
    position = query_positions(index.seq_lens, scores.shape[3])[:, None, :, None]
    first = torch.arange(scores.shape[4], device=scores.device) * cfg.block_size
    forced = (first < cfg.sink_tokens) | (first + cfg.block_size > position - cfg.recent_tokens + 1)
    return torch.where(forced, torch.inf, reduce_group(scores, cfg)).masked_fill(first > position, -torch.inf)


def keep_blocks(scores: Tensor, index: KVIndex, cfg: TLSConfig) -> BlockSelection:
    """The best blocks by :func:`block_scores`, sinks and window first."""
    group, n = scores.shape[2], scores.shape[4]
    k = min(cfg.kept_blocks, n)
    best, order = block_ranks(scores, index, cfg).sort(dim=-1, descending=True, stable=True)
    chosen = best[..., :k] > -torch.inf
    indices = torch.where(chosen, order[..., :k], n).sort(-1).values
    return BlockSelection(indices.int(), chosen.sum(-1).int(), n, cfg.block_size, group, index.capacity_tokens)


def label_block_scores(tokens: Tensor, cfg: TLSConfig) -> Tensor:
    """Label scores of tokens [..., N * block_size] -> of their blocks [..., N]: the best, or the log-sum-exp."""
    scores = tokens.view(*tokens.shape[:-1], -1, cfg.block_size)
    return scores.amax(-1) if cfg.block_reduce == "max" else scores.logsumexp(-1)


def tokens_from_scores(
    index: KVIndex, cfg: TLSConfig, blocks: BlockSelection, scores: Tensor, block_scores: Tensor
) -> TokenSelection:
    """Level 2 from label scores [B, HKV, G, T, N * block_size] that are -inf where a query must not look.

    Only the kept blocks' tokens are ranked: a small part of the context. The heads of a group are made comparable by
    level 1's softmax, over ``block_scores`` [B, HKV, G, T, N]: a kernel then ranks tokens in one pass.
    """
    t, n_slots = scores.shape[-2], scores.shape[-1]
    positions = query_positions(index.seq_lens, t)
    # Tokens of the kept blocks, ascending; those of padding entries lie past the last slot
    slot = blocks.indices.long()[..., None] * cfg.block_size + torch.arange(cfg.block_size, device=scores.device)
    slot = slot.flatten(3)
    position = positions[:, None, :, None]
    keep = slot <= position
    if cfg.token_budget is not None and cfg.token_budget < slot.shape[-1]:
        where = slot.clamp_max(n_slots - 1)[:, :, None].expand(*scores.shape[:-1], -1)
        candidates = scores.gather(4, where).masked_fill(~keep[:, :, None], -torch.inf)
        rank = reduce_group(candidates, cfg, block_scores)
        forced = (slot < cfg.sink_tokens) | (slot > position - cfg.recent_tokens)
        rank = torch.where(forced, torch.inf, rank).masked_fill(~keep, -torch.inf)
        keep = keep_best(rank, cfg.token_budget)
    # One bit a token, whole words a block: little to write, and 32 times less for the attention kernel to read
    per = min(32, cfg.block_size)
    in_block = cfg.block_size // per
    where = (blocks.indices.long()[..., None] * in_block + torch.arange(in_block, device=scores.device)).flatten(3)
    words = torch.zeros(*slot.shape[:3], n_slots // per + in_block, dtype=torch.int32, device=scores.device)
    words = words.scatter(3, where, pack_bits(keep.view(*keep.shape[:3], -1, per)))
    # The slice drops where padding entries wrote. It must also copy: to a scatter's own buffer Inductor's C++ template
    # (torch 2.13) gives the zeros from before the scatter
    words = words[..., : n_slots // per].contiguous()
    return TokenSelection(words, positions, blocks.group, per, n_slots)


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., up to 32] -> int32 [...], the first bit lowest."""
    place = torch.arange(bits.shape[-1], dtype=torch.int32, device=bits.device)
    return (bits.int() << place).sum(-1, dtype=torch.int32)


def pack_words(mask: Tensor) -> Tensor:
    """Bool [..., S] -> int32 [..., S / 32], rounded up; bits past the last are zero."""
    return pack_bits(F.pad(mask, (0, -mask.shape[-1] % 32)).view(*mask.shape[:-1], -1, 32))


def keep_best(rank: Tensor, k: int) -> Tensor:
    """Bool of rank's shape [..., S]: the k largest, ties to the lower place; never -inf. rank float32, no NaN."""
    s = rank.shape[-1]
    # Score and place in one integer: no two are equal, so the k-th largest cuts exactly, without counting ties.
    # Positive floats order as their bits do, negative ones the other way round; -0.0 must tie with 0.0
    bits = torch.where(rank == 0, 0.0, rank).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = ordered * 2**32 + (s - torch.arange(s, device=rank.device))
    edge = key.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return (key >= edge) & (rank > -torch.inf)


def reduce_group(scores: Tensor, cfg: TLSConfig, over: Tensor | None = None) -> Tensor:
    """One rank for the query heads of a KV head: [B, HKV, G, T, N] -> [B, HKV, T, N]; -inf where all heads are.

    Ranks have 16 bits: a mean softmax is rounded down to bfloat16, a raw score to the nearest float16, so that kernels
    compare two at once. A softmax is taken over ``over`` [B, HKV, G, T, N'], by default over the scores themselves.
    """
    dead = scores.isneginf()
    if cfg.group_reduce == "max":
        return _half(scores.amax(2))
    if cfg.group_reduce in ("softmax_mean", "softmax_max"):
        # A head that may look nowhere would give NaN; it has no say instead
        over = scores if over is None else over
        top = over.amax(-1, keepdim=True)
        top = torch.where(top.isneginf(), 0.0, top)
        total = (over - top).exp().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        weight = (scores - top).clamp_max(MOST_EXPONENT).exp() / total
        rank = weight.mean(2) if cfg.group_reduce == "softmax_mean" else weight.amax(2)
        # Rounded down to bfloat16: see docs/design.md, section 8
        return (rank.view(torch.int32) & -65536).view(torch.float32).masked_fill(dead.all(2), -torch.inf)
    alive = (~dead).sum(2).clamp_min(1)
    rank = scores.masked_fill(dead, 0.0).sum(2) / alive
    return _half(rank).masked_fill(dead.all(2), -torch.inf)


def _half(rank: Tensor) -> Tensor:
    """Rounded to float16's digits, -inf as it was."""
    return torch.where(rank.isneginf(), rank, rank.clamp(-LARGEST_HALF, LARGEST_HALF).half().float())


def _per_block(tokens: Tensor, n_blocks: int, size: int) -> Tensor:
    """[..., N * block_size] -> [..., N, block_size]."""
    return tokens.view(*tokens.shape[:-1], n_blocks, size)


def _by_labels(cfg: TLSConfig) -> bool:
    return cfg.index in ("lowrank", "oracle")


def _scale(scale: float | None, head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if scale is None else scale


def _check(q: Tensor, index: KVIndex, cfg: TLSConfig) -> None:
    check_tensor("q", q, (index.batch_size, None, None, index.head_dim), "B, HQ, T, D")
    check_query(q, index, cfg)


def check_query(q: Tensor, index: KVIndex, cfg: TLSConfig) -> None:
    """Raise unless queries, index and configuration belong together."""
    if q.device != index.seq_lens.device:
        raise ValueError(f"q: expected device {index.seq_lens.device}, the index's, got {q.device}; move one of them")
    if q.shape[1] % index.n_kv_heads or q.shape[1] == 0:
        raise ValueError(f"q: expected HQ to be a multiple of HKV = {index.n_kv_heads}, got {q.shape[1]}")
    if q.shape[2] < 1:
        raise ValueError("q: expected at least 1 query token (T), got 0")
    if index.max_len < 1:
        raise ValueError("index: expected at least 1 token, got an empty index; append the keys before attending")
    if cfg.block_shares is not None:
        raise ValueError(
            f"cfg: expected one layer's, got block_shares of {len(cfg.block_shares)} layers; pass cfg.for_layer(layer)"
        )
    if (cfg.block_size, cfg.index) != (index.cfg.block_size, index.cfg.index):
        raise ValueError(
            f"cfg: expected the index's block_size={index.cfg.block_size} and index={index.cfg.index!r}, "
            f"got {cfg.block_size} and {cfg.index!r}; build the index again to change them"
        )
