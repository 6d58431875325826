"""``two_level_attention``: checks its inputs, chooses a backend, and runs it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from ._check import check_tensor
from .bound import missed_mass_bound
from .config import TLSConfig
from .flex import attend_flex
from .fused import attend_fused, selections, why_not_fused
from .index import KVIndex
from .mods import MaskMod, ScoreMod
from .reference import attention_reference
from .selection import BlockSelection, TokenSelection, check_query, select

Backend = Literal["auto", "reference", "flex", "triton"]


class BackendUnavailable(RuntimeError):
    """An explicitly chosen backend cannot run here. It never falls back; only ``"auto"`` chooses."""


class Attended(NamedTuple):
    """Result of one call: out [B, HQ, T, D]; lse float32 [B, HQ, T], natural log, if asked for; the selections.

    ``bound`` float32 [B, HQ, T], if asked for: at most this share of the attention was missed.
    """

    out: Tensor
    lse: Tensor | None
    blocks: BlockSelection | None
    tokens: TokenSelection | None
    bound: Tensor | None = None


def check_backend(backend: Backend) -> None:
    """Raise unless there is a backend of this name."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")


def resolve_backend(
    backend: Backend, device: torch.device, obstacle: str | None
) -> Literal["reference", "flex", "triton"]:
    """The backend that ``backend`` stands for, given what keeps the fused kernels from running (None: nothing).

    Raises:
        BackendUnavailable: ``"triton"`` was asked for and cannot run; says why.
    """
    check_backend(backend)
    if backend == "auto":
        return "triton" if obstacle is None and device.type == "cuda" else "flex"
    if backend == "triton" and obstacle is not None:
        raise BackendUnavailable(f"backend='triton' cannot run this: {obstacle}; use 'flex' or 'auto'")
    return backend


@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ...,
    return_lse: Literal[False] = ..., return_bound: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ...,
    return_lse: Literal[True], return_bound: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ...,
    return_lse: Literal[False] = ..., return_bound: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def two_level_attention(
    q: Tensor, k: Tensor, v: Tensor, index: KVIndex, cfg: TLSConfig, *, score_mod: ScoreMod | None = ...,
    mask_mod: MaskMod | None = ..., scale: float | None = ..., backend: Backend = ...,
    return_lse: Literal[True], return_bound: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
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
    return_bound: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attend to what two levels of selection keep. Append the new keys to ``index`` first, then attend.

    Args:
        q: queries [B, HQ, T, D], the last T tokens of each row, causal among themselves; any G = HQ / HKV.
        k, v: cache [B, HKV, S, D], S = ``index.capacity_tokens``. Slots past a row's length must be finite.
        index: index over ``k``; its ``seq_lens`` say how long each row is.
        cfg: budgets, in tokens per KV head and query token.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score`` in logical coordinates, on scaled scores.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool`` in logical coordinates. Define mods once, not in every step.
        scale: of the scores, 1/sqrt(D) by default.
        backend: ``"reference"`` (eager oracle), ``"flex"`` (compiled FlexAttention, CUDA and CPU), ``"triton"`` (fused,
            CUDA, no score_mod, up to 16 query tokens), ``"auto"``: triton where it can run, flex elsewhere.
        return_lse: also return the log-sum-exp of the kept scores, float32 [B, HQ, T], natural log.
        return_bound: also return an upper bound on the share of full attention's weight that was not kept, float32
            [B, HQ, T]; for index "quest" or "box", without a score_mod. See :func:`flex_tls.bound.missed_mass_bound`.

    Returns:
        [B, HQ, T, D] in q's dtype, then what else was asked for. A query with nothing to see gets 0 (lse -inf).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that do not fit, an empty index, another block size.
        BackendUnavailable: an explicit backend that cannot run here.

    Source: AsyncTLS, arXiv 2604.07815.
    """
    result = attend(
        q, k, v, index, cfg,
        score_mod=score_mod, mask_mod=mask_mod, scale=scale, backend=backend, return_lse=return_lse,
        return_bound=return_bound, selected=False,
    )  # fmt: skip
    more = [x for x in (result.lse, result.bound) if x is not None]
    return (result.out, *more) if more else result.out


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
    return_bound: bool = False,
    selected: bool = True,
) -> Attended:
    """:func:`two_level_attention` with the selections that it used; ``selected=False`` if nobody looks at them."""
    if return_bound:
        if score_mod is not None:
            raise ValueError("return_bound: expected no score_mod, which may raise any score; leave one of them out")
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        result = attend(q, k, v, index, cfg, mask_mod=mask_mod, scale=scale, backend=backend, return_lse=True)
        assert result.lse is not None
        assert result.tokens is not None
        bound = missed_mass_bound(q, index, result.tokens, result.lse, scale=scale, mask_mod=mask_mod)
        return result._replace(lse=result.lse if return_lse else None, bound=bound)
    check_tensor("q", q, (index.batch_size, None, None, index.head_dim), "B, HQ, T, D")
    shape = (index.batch_size, index.n_kv_heads, index.capacity_tokens, index.head_dim)
    check_tensor("k", k, shape, "B, HKV, S, D", like=q)
    check_tensor("v", v, shape, "B, HKV, S, D", like=q)
    check_query(q, index, cfg)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    obstacle = why_not_fused(q, k, v, has_score_mod=score_mod is not None, scale=scale)
    chosen = resolve_backend(backend, q.device, obstacle)
    if chosen == "triton":
        parts = attend_fused(q, k, v, index, cfg, scale, mask_mod=mask_mod)
        chose = selections(parts, q, index, cfg) if selected else (None, None)
        return Attended(parts[0], parts[1] if return_lse else None, *chose)
    if chosen == "flex":
        return Attended(*attend_flex(q, k, v, index, cfg, score_mod, mask_mod, scale, return_lse))
    blocks, tokens = select(q, index, cfg, score_mod, mask_mod, scale)
    out, lse = attention_reference(q, k, v, tokens, scale=scale, score_mod=score_mod, mask_mod=mask_mod)
    return Attended(out, lse.float() if return_lse else None, blocks, tokens)
