"""``two_level_attention``: checks its inputs, chooses a backend, and runs it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args, overload

from torch import Tensor

from ._check import check_tensor
from .config import TLSConfig
from .flex import attend_flex
from .index import KVIndex
from .mods import MaskMod, ScoreMod
from .reference import attention_reference
from .selection import BlockSelection, TokenSelection, check_query, select

Backend = Literal["auto", "reference", "flex", "triton"]


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run here. It never falls back; only ``"auto"`` chooses."""


class Attended(NamedTuple):
    """Result of one call: out [B, HQ, T, D]; lse float32 [B, HQ, T], natural log, if asked for; and the selections."""

    out: Tensor
    lse: Tensor | None
    blocks: BlockSelection
    tokens: TokenSelection


def resolve_backend(backend: Backend) -> Literal["reference", "flex"]:
    """The backend that ``backend`` stands for; raises for one that cannot run."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    if backend == "triton":
        raise BackendUnavailable("backend='triton' is not part of this version yet; use 'flex' or 'auto'")
    return "flex" if backend == "auto" else backend


@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def two_level_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to what two levels of selection keep. Append the new keys to ``index`` first, then attend.

    Args:
        q: queries [B, HQ, T, D], the last T tokens of each row, causal among themselves; any G = HQ / HKV.
        k, v: cache [B, HKV, S, D], S = ``index.capacity_tokens``. Slots past a row's length must be finite.
        index: index over ``k``; its ``seq_lens`` say how long each row is.
        cfg: budgets, in tokens per KV head and query token.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score`` in logical coordinates, on scaled scores.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool`` in logical coordinates. Define mods once, not in every step.
        scale: of the scores, 1/sqrt(D) by default.
        backend: ``"reference"`` (eager oracle), ``"flex"`` (compiled FlexAttention, CUDA and CPU), ``"auto"``.
        return_lse: also return the log-sum-exp of the kept scores, float32 [B, HQ, T], natural log.

    Returns:
        [B, HQ, T, D] in q's dtype. A query with nothing to see gets 0 (lse -inf).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that do not fit, an empty index, another block size.
        BackendUnavailable: an explicit backend that cannot run here.

    Source: AsyncTLS, arXiv 2604.07815.
    """
    result = attend(
        q, k, v, index, cfg, score_mod=score_mod, mask_mod=mask_mod, scale=scale, backend=backend, return_lse=return_lse
    )
    if return_lse:
        assert result.lse is not None
        return result.out, result.lse
    return result.out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Attended:
    """:func:`two_level_attention` with the selections that it used."""
    chosen = resolve_backend(backend)
    check_tensor("q", q, (index.batch_size, None, None, index.head_dim), "B, HQ, T, D")
    shape = (index.batch_size, index.n_kv_heads, index.capacity_tokens, index.head_dim)
    check_tensor("k", k, shape, "B, HKV, S, D", like=q)
    check_tensor("v", v, shape, "B, HKV, S, D", like=q)
    check_query(q, index, cfg)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if chosen == "flex":
        return Attended(*attend_flex(q, k, v, index, cfg, score_mod, mask_mod, scale, return_lse))
    blocks, tokens = select(q, index, cfg, score_mod, mask_mod, scale)
    out, lse = attention_reference(q, k, v, tokens, scale=scale, score_mod=score_mod, mask_mod=mask_mod)
    return Attended(out, lse.float() if return_lse else None, blocks, tokens)
