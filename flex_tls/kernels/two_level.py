"""Two-level decoding in one launch: scores, both selections and attention, row by row.

A row is one selection: a KV head and a query token. Its programs share the work of each phase and meet after phases
0, 1 and 3; what is small, the choices, every one of them does for itself. The phases, which can also be launched one by
one:

0. the query in label space, and every block's best label score, or its summary's;
1. the rank of every block;
2. the blocks to keep;
3. the rank of every token of the kept blocks;
4. the tokens to keep, and attention over them.

The formulas: a label score approximates ``scale * q . k`` (flex_tls/labels.py); a block's rank is the mean over the
group's heads of ``exp(best - top) / total``, the softmax over blocks, or the largest of theirs; a token's is the same
with its own score over the same ``top`` and ``total``. Source: AsyncTLS, arXiv 2604.07815.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ask import ask, prefetch_ask
from .attend import attend_range, finish, load_query, set_aside
from .follow import follow
from .keep_best import find_edge, load_words, write_list
from .labels import channels_before, parts_before, places_of
from .norms import is_softmax, join_norms
from .rows import leave, locate, meet, query_of, share
from .score import prefetch_labels, rank_blocks, rank_tokens, score_blocks
from .score_summaries import score_summaries
from .tiles import NATIVE, Tiles, padded

# Where blocks are kept, and the last phase
BLOCKS_KEPT, LAST_PHASE = 2, 4


@triton.constexpr_function
def has_summaries(kind: str) -> bool:
    """Whether level 1 scores blocks by their summaries, not by the labels of their tokens."""
    return kind in ("box", "mean")


@triton.jit
def two_level(
    q, k, v, seq_lens, codes, to_query, low, step, summary, beside, visible, scales, pages, arrived, clock,
    asked, asked_bytes, base, unit, scores, norms, block_words, block_keys, blocks, block_counts, words, keys, ids,
    counts, norm_parts, label_parts, partial, partial_lse, arrivals, out, lse,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    page_stride_k, page_stride_v, scale_stride_h, n_pages, arrivals_stride, score_stride, word_stride, n_heads, T,
    N, K, M, scale, sinks, recent, filter_dims, radius,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, READ: tl.constexpr, BITS: tl.constexpr,
    PLACES: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PER: tl.constexpr, PER_SUMMARIES: tl.constexpr, SCORE_STAGES: tl.constexpr, RANK_BN: tl.constexpr,
    BLOCK_BN: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, KP: tl.constexpr, PER_TOKENS: tl.constexpr,
    TOKEN_BN: tl.constexpr, TOKEN_CHUNKS: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr,
    ATTEND_STAGES: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr, BY_BLOCK: tl.constexpr, PAGED: tl.constexpr,
    SPLIT: tl.constexpr, INT8: tl.constexpr, BLOCK_REDUCE: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr, PP: tl.constexpr, PREFETCH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Phases FIRST to LAST of program (i, row)."""
    if PREFETCH:
        # Hints, and so they may come before the wait, whatever they find
        row, head, position = locate(seq_lens, n_heads, T)
        prefetch_ask(q, to_query, low, step, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T,
                     D, DP, C, GROUP, GP)  # fmt: skip
        first, end = share(tl.minimum(tl.maximum(position // BLOCK_SIZE + 1, 0), N), PROGRAMS)
        prefetch_labels(codes + head * W * N * BLOCK_SIZE, first, end, N, READ, BLOCK_SIZE, 256)
    follow(NATIVE)
    row, head, position = locate(seq_lens, n_heads, T)
    codes += head * W * N * BLOCK_SIZE
    scores += row * GROUP * score_stride
    norms += row * GROUP * 2
    norm_parts += row * PROGRAMS * GROUP * 2
    if has_summaries(KIND):
        label_parts += row * PROGRAMS * GROUP * 2
        summary += head * (N + 1) * D
        beside += head * (N + 1) * (D if KIND == "box" else 1)
    visible_stride = 0
    if MASKED:
        n_bytes = tl.cdiv(N * BLOCK_SIZE, 32) * 4
        visible_stride = T * n_bytes
        visible += head * GROUP * visible_stride + row % T * n_bytes
    block_words += row * BLOCK_CHUNKS * BLOCK_BN // 2
    block_keys += row * BLOCK_CHUNKS * BLOCK_BN
    blocks += row * K
    block_counts += row
    words += row * word_stride
    keys += row * word_stride * 2
    arrivals += row
    # Blocks that hold something for the query; its position is negative where a row is shorter than the chunk
    n_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    POSITIVE: tl.constexpr = is_softmax(REDUCE)
    EXACT: tl.constexpr = KIND == "oracle"
    SUMMARISED: tl.constexpr = has_summaries(KIND)
    # Whatever blocks are ranked by, tokens are by the softmax over all blocks' label scores
    NORMS_APART: tl.constexpr = SUMMARISED & POSITIVE & (not BY_BLOCK)
    queries = q
    if EXACT | SUMMARISED:
        queries = query_of(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, GROUP)
    first, end = share(n_blocks, PROGRAMS)
    if (FIRST == 0) & (not EXACT) & (not (SUMMARISED & BY_BLOCK)):
        ask(q, to_query, low, step, asked_bytes, base, unit, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T,
            filter_dims, D, DP, C, W, BITS, GROUP, GP, PLACES, NATIVE)  # fmt: skip
        tl.debug_barrier()
    asked += row * GROUP * parts_before(BITS, W)
    base += row * GROUP * 2
    unit += row * GROUP
    if FIRST == 0:
        part = tl.program_id(0) * GROUP * 2
        if (not SUMMARISED) | NORMS_APART:
            score_blocks(queries, codes, asked, base, unit, visible, scores,
                         (label_parts if SUMMARISED else norm_parts) + part, position, first, end, N, q_stride_h,
                         visible_stride, score_stride, scale, W, READ, BITS, GROUP, BLOCK_SIZE, PER, SCORE_STAGES,
                         BLOCK_REDUCE, EXACT, MASKED, POSITIVE, NATIVE)  # fmt: skip
        if SUMMARISED:
            # Over the labels' scores, of which the norms alone are wanted
            tl.debug_barrier()
            score_summaries(queries, summary, beside, visible, scores, norm_parts + part, position, first, end,
                            q_stride_h, visible_stride, score_stride, radius, scale, D, DP, GROUP, BLOCK_SIZE,
                            PER_SUMMARIES, SCORE_STAGES, KIND, MASKED, POSITIVE, NATIVE)  # fmt: skip
        if LAST > 0:
            meet(arrivals, PROGRAMS)
    if (FIRST <= 1) & (LAST >= 1):
        tops, shares = (), ()
        if POSITIVE:
            tops, shares = join_norms(norm_parts, None if NORMS_APART else norms, GROUP, PROGRAMS, PP, NATIVE)
        if NORMS_APART:
            join_norms(label_parts, norms, GROUP, PROGRAMS, PP, NATIVE)
        rank_blocks(scores, tops, shares, block_keys, first, end, position, sinks, recent, score_stride, GROUP, RANK_BN,
                    BLOCK_SIZE, MASKED, REDUCE, NATIVE)  # fmt: skip
        if LAST > 1:
            meet(arrivals, PROGRAMS, 2)
    first_block, end_block = share(K, PROGRAMS)
    if (FIRST <= 2) & (LAST >= 2):
        first_words = load_words(block_words, 0, n_blocks, BLOCK_BN)
        edge, ties = find_edge(first_words, block_words, n_blocks, K, POSITIVE, BLOCK_BN, BLOCK_CHUNKS, NATIVE)
        n_kept = write_list(first_words, block_words, n_blocks, edge, ties, blocks, blocks, first_block, end_block, N,
                            BLOCK_BN, BLOCK_CHUNKS, KP, BLOCK_SIZE, False, NATIVE)  # fmt: skip
        tl.store(block_counts, n_kept)
        tl.debug_barrier()
    if (FIRST <= 3) & (LAST >= 3) & (not BY_BLOCK):
        rank_tokens(queries, codes, asked, base, unit, visible, norms, blocks, keys, position, sinks, recent,
                    first_block, end_block, N, q_stride_h, visible_stride, scale, W, BITS, GROUP, BLOCK_SIZE,
                    PER_TOKENS, EXACT, MASKED, REDUCE, NATIVE)  # fmt: skip
        if LAST > 3:
            meet(arrivals + arrivals_stride, PROGRAMS)
    if LAST == 4:
        query = load_query(q, row, head, n_heads, T, q_stride_b, q_stride_h, q_stride_t, D, DP, GROUP, ROWS)
        k += head // n_heads * k_stride_b + head % n_heads * k_stride_h
        v += head // n_heads * v_stride_b + head % n_heads * v_stride_h
        if BY_BLOCK:
            entries = blocks
            n_whole = tl.minimum(end_block, tl.load(block_counts))
            first, end = first_block * BLOCK_SIZE, n_whole * BLOCK_SIZE
        else:
            entries = ids + row * M
            n_tokens = K * BLOCK_SIZE
            token_words = load_words(words, 0, n_tokens, TOKEN_BN)
            edge, ties = find_edge(token_words, words, n_tokens, M, POSITIVE, TOKEN_BN, TOKEN_CHUNKS, NATIVE)
            first, end = share(M, PROGRAMS)
            n_chosen = write_list(token_words, words, n_tokens, edge, ties, blocks, entries, first, end, N * BLOCK_SIZE,
                                  TOKEN_BN, TOKEN_CHUNKS, MP, BLOCK_SIZE, True, NATIVE)  # fmt: skip
            tl.store(counts + row, n_chosen)
            tl.debug_barrier()
            end = tl.minimum(end, n_chosen)
        now = tl.load(clock + head) if SPLIT else 0
        acc, top, total = attend_range(
            query, k, v, scales + head * scale_stride_h, entries, pages + head * N, arrived + head * n_pages, now,
            visible, first, end, position, scale, k_stride_s, v_stride_s, page_stride_k, page_stride_v, visible_stride,
            D, DP, GROUP, ROWS, BLOCK_SIZE, "blocks" if BY_BLOCK else "tokens", PAGED, "resident" if SPLIT else "all",
            INT8, MASKED, TILE, ATTEND_STAGES, PRECISION,
        )  # fmt: skip
        if SPLIT:
            part = row * 2 * PROGRAMS + tl.program_id(0)
            set_aside(acc, top, total, partial, partial_lse, part, D, DP, GROUP, ROWS, NATIVE)
            leave(arrivals, arrivals_stride, PROGRAMS)
        else:
            last = finish(acc, top, total, partial, partial_lse, arrivals + 2 * arrivals_stride, out, lse, row, head, T,
                          D, DP, GROUP, GP, ROWS, PROGRAMS, 0, NATIVE)  # fmt: skip
            if (PROGRAMS > 1) & last:
                # All programs have met, and left
                tl.store(arrivals, 0)
                tl.store(arrivals + arrivals_stride, 0)
    elif FIRST < LAST:
        leave(arrivals, arrivals_stride, PROGRAMS)


class Work(NamedTuple):
    """What the phases hand on, and what they leave: R rows, with room for whole chunks of scores and keys.

    Attributes:
        asked, base, unit: the query in label space; see :func:`flex_tls.kernels.ask.ask`.
        scores: float32 [R, G, N'], score of each block, by its labels or its summary.
        norms: float32 [R, G, 2], the softmax over blocks' label scores: the largest, and 1 / (sum * G).
        block_words: int32 [R, N' / 2], keys of blocks, two in a word.
        blocks, block_counts: int32 [R, K], ascending, N past the count; int32 [R].
        words: int32 [R, (K * block_size)' / 2], keys of the kept blocks' tokens, two in a word.
        ids, counts: int32 [R, M], slots, ascending, N * block_size past the count; int32 [R]. M is 0 without level 2.
    """

    asked: Tensor
    base: Tensor
    unit: Tensor
    scores: Tensor
    norms: Tensor
    block_words: Tensor
    blocks: Tensor
    block_counts: Tensor
    words: Tensor
    ids: Tensor
    counts: Tensor

    @classmethod
    def given(
        cls, asked: Tensor, base: Tensor, unit: Tensor, scores: Tensor, norms: Tensor, blocks: Tensor, counts: Tensor
    ) -> Work:
        """What level 1 left, to go on from: blocks' keys and what comes later are not read."""
        return cls(asked, base, unit, scores, norms, blocks, blocks, counts, blocks, blocks, counts)


def launch_two_level(
    q: Tensor, k: Tensor | None, v: Tensor | None, seq_lens: Tensor, codes: Tensor, to_query: Tensor, low: Tensor,
    step: Tensor, arrivals: Tensor, *, bits: tuple[int, ...], block_size: int, kept_blocks: int,
    token_budget: int | None, sinks: int, recent: int, scale: float, filter_dims: int, block_reduce: str,
    group_reduce: str, tiles: Tiles, kind: str = "lowrank", summary: Tensor | None = None,
    beside: Tensor | None = None, radius: float = 1.0, visible: Tensor | None = None, given: Work | None = None,
    pages: Tensor | None = None, scales: Tensor | None = None, arrived: Tensor | None = None,
    clock: Tensor | None = None,
) -> tuple[Tensor, Tensor, Work]:  # fmt: skip
    """Output [B, HQ, T, D] in q's dtype, lse float32 [B, HQ, T], and what was chosen.

    ``arrivals`` int32 [3, R] or wider: zeros before and after. ``token_budget`` None attends to all of the kept blocks.
    Without k and v it stops when the blocks are chosen (phases 0 to 2; output and lse are left unwritten). With
    ``given``, what that call left, it goes on from there (phases 3 and 4) inside the blocks that ``given`` names.
    ``kind`` of the index: "box" and "mean" have ``summary`` and ``beside`` [B, HKV, N + 1, ...], see
    :mod:`.score_summaries`; "oracle" has keys for codes, float32 [B, HKV, D, S], and no ``bits``.
    ``visible`` int32 [B, HQ, T, N * block_size / 32], rounded up: what each head sees; all by default.
    ``pages`` int32 [B * HKV, N]: block n of a KV head is page ``pages[n]`` of k and v [B, HKV, P, block_size, D];
    with ``scales`` float32 [B, HKV, P, block_size, 2], contiguous, these are int8. With ``arrived`` int32 [B, HKV, P]
    tokens of pages where that is ``clock`` int32 [B, HKV] are left to :mod:`.attend_arrived`: in place of output and
    lse come parts float32 [R, 2 * programs, G, D] and [R, 2 * programs, G], the first half of them written.
    """
    assert group_reduce in ("softmax_mean", "softmax_max", "max", "mean"), group_reduce
    assert block_reduce in ("max", "logsumexp"), block_reduce
    assert kind in ("lowrank", "box", "mean", "oracle"), kind
    b, hq, t, d = q.shape
    _, hkv, w, s = codes.shape
    rows, group, n, channels = b * hkv * t, hq // hkv, s // block_size, to_query.shape[-1]
    kept = min(kept_blocks, n) if given is None else given.blocks.shape[1]
    by_block = token_budget is None or token_budget >= kept * block_size
    chosen = 0 if by_block else token_budget or 0
    programs = tiles.programs
    block_chunk, block_chunks = tiles.chunk(n)
    token_chunk, token_chunks = tiles.chunk(kept * block_size)
    i32, f32 = torch.int32, torch.float32
    new = seq_lens.new_empty
    if given is None:
        given = Work(
            asked=new(rows, group, parts_before(bits, w), dtype=i32), base=new(rows, group, 2, dtype=f32),
            unit=new(rows, group, dtype=f32), scores=new(rows, group, block_chunk * block_chunks, dtype=f32),
            norms=new(rows, group, 2, dtype=f32), block_words=new(rows, block_chunk * block_chunks // 2, dtype=i32),
            blocks=new(rows, kept, dtype=i32), block_counts=new(rows, dtype=i32), words=seq_lens, ids=seq_lens,
            counts=seq_lens,
        )  # fmt: skip
        start = 0
    else:
        start = BLOCKS_KEPT + 1
    work = given._replace(
        words=new(rows, 0 if by_block else token_chunk * token_chunks // 2, dtype=i32),
        ids=new(rows, chosen, dtype=i32), counts=new(rows, dtype=i32),
    )  # fmt: skip
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), new(b, hq, t, dtype=f32)
    parts = programs if arrived is None else 2 * programs
    partial = new(rows, parts, group, d, dtype=f32) if parts > 1 else lse
    partial_lse = new(rows, parts, group, dtype=f32) if parts > 1 else lse
    norm_parts = new(rows, programs, group, 2, dtype=f32) if start == 0 else lse
    visible = None if visible is None else visible.view(torch.uint8)
    label_parts = torch.empty_like(norm_parts) if summary is not None else lse
    stop = LAST_PHASE if k is not None else BLOCKS_KEPT
    keys, values = (q if x is None else x for x in (k, v))
    page_stride_k, page_stride_v = (keys.stride(2), values.stride(2)) if pages is not None else (0, 0)
    places = max(16, padded(w) * places_of(bits)) if bits else 0
    read = sum(channels_before(bits, word) < filter_dims for word in range(w))
    # Interpreted programs run one after the other: they cannot meet, so their phases are launched one by one
    phases = [(start, stop)] if NATIVE or programs == 1 else [(i, i) for i in range(start, stop + 1)]
    for first, last in phases:
        two_level[(programs, rows)](
            q, keys, values, seq_lens, codes, to_query, low, step,
            *(arrivals if x is None else x for x in (summary, beside, visible, scales, pages, arrived, clock)),
            work.asked, work.asked.view(torch.int8), *work[1:6], work.block_words.view(torch.int16), *work[6:9],
            work.words.view(torch.int16), *work[9:], norm_parts, label_parts, partial, partial_lse, arrivals, out, lse,
            q.stride(0), q.stride(1), q.stride(2), keys.stride(0), keys.stride(1), keys.stride(-2),
            values.stride(0), values.stride(1), values.stride(-2), page_stride_k, page_stride_v,
            0 if scales is None else scales.stride(1), 0 if arrived is None else arrived.shape[2], arrivals.stride(0),
            work.scores.shape[2], work.words.shape[1], hkv, t, n, kept, chosen, scale, sinks, recent, filter_dims,
            radius,
            D=d, DP=padded(d, 16), C=channels, W=w, READ=read, BITS=bits, PLACES=places, GROUP=group, GP=padded(group),
            ROWS=padded(group, 16), BLOCK_SIZE=block_size,
            PER=tiles.blocks_of(tiles.score_words, read, block_size, n), PER_SUMMARIES=tiles.summaries_of(padded(d), n),
            SCORE_STAGES=tiles.score_stages, RANK_BN=min(padded(-(-n // programs)), block_chunk), BLOCK_BN=block_chunk,
            BLOCK_CHUNKS=block_chunks, KP=padded(-(-kept // programs)),
            PER_TOKENS=tiles.blocks_of(tiles.rank_words, w, block_size, kept), TOKEN_BN=token_chunk,
            TOKEN_CHUNKS=token_chunks, MP=padded(max(1, -(-chosen // programs))), TILE=tiles.attend_tile,
            ATTEND_STAGES=tiles.attend_stages, KIND=kind, MASKED=visible is not None, BY_BLOCK=by_block,
            PAGED=pages is not None, SPLIT=arrived is not None, INT8=scales is not None, BLOCK_REDUCE=block_reduce,
            REDUCE=group_reduce, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", PROGRAMS=programs,
            PP=padded(programs), PREFETCH=NATIVE and programs > 1 and first == 0 and kind == "lowrank", FIRST=first,
            LAST=last, NATIVE=NATIVE, num_warps=tiles.warps, launch_pdl=NATIVE,
            launch_cooperative_grid=NATIVE and programs > 1,
        )  # fmt: skip
    return (out, lse, work) if arrived is None else (partial, partial_lse, work)
