"""The ``flex`` backend: selection and FlexAttention in one graph that Inductor compiles, on CUDA and on CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .compiled import compiled
from .config import TLSConfig
from .index import KVIndex
from .masks import block_mask, fold_groups, token_score_mod, unfold_groups
from .masks.blocks import QUERY_BLOCK
from .mods import MaskMod, ScoreMod
from .reference import attention_reference
from .selection import BlockSelection, TokenSelection, select

Result = tuple[Tensor, Tensor | None, BlockSelection, TokenSelection]


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float,
    return_lse: bool,
) -> Result:
    """Compiled two-level attention; shapes, configuration and mods are compiled in, lengths are not.

    On CPU FlexAttention gives no log-sum-exp: ``return_lse`` costs a second pass over the keys there.
    Inside a caller's own ``torch.compile`` the plain function is traced into the caller's graph instead.
    """
    if torch.compiler.is_compiling():
        return _attend(q, k, v, index, cfg, score_mod, mask_mod, scale, return_lse, callers_graph=True)
    run = compiled(_attend, (q, k, v), (cfg, index.cfg, scale, return_lse), score_mod, mask_mod)
    with torch.no_grad():
        result: Result = run(q, k, v, index, cfg, score_mod, mask_mod, scale, return_lse)
    return result


def kernel_options(device: torch.device, n_rows: int, n_heads: int) -> dict[str, Any]:
    """FlexAttention's options for ``n_rows`` folded query rows and ``n_heads`` = B * HKV heads.

    On CUDA the decode kernel is asked for by name, so that torch raises where it does not apply instead of taking a
    kernel that would read the block lists otherwise. Enough splits over the selection to fill the GPU, no more
    (docs/design.md, section 4: 64 at 8 heads, 8 at 128).
    """
    if device.type != "cuda":
        # Larger than any cache: torch's C++ template for one query row is chosen by the shape of the *unfolded* queries
        # and would compute one head of each group (seen on torch 2.13); the general template has no such branch
        return {"PARTITION_SIZE": 2**30}
    if n_rows >= QUERY_BLOCK:
        return {"BACKEND": "TRITON"}
    return {"BACKEND": "TRITON_DECODE", "SPLIT_KV": min(64, max(8, 512 // n_heads))}


@torch.library.custom_op("flex_tls::own_buffer", mutates_args=())
def _own_buffer(x: Tensor) -> Tensor:
    """A contiguous copy that Inductor cannot fuse or look through.

    The C++ template of flex_attention refuses queries, and tensors captured by a mod, that are still being computed,
    and what the caller does with its output (torch 2.13). In a graph of our own they
    are inputs and outputs, and need no copy.
    """
    return x.clone(memory_format=torch.contiguous_format)


@_own_buffer.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: KVIndex,
    cfg: TLSConfig,
    score_mod: ScoreMod | None,
    mask_mod: MaskMod | None,
    scale: float,
    return_lse: bool,
    callers_graph: bool = False,
) -> Result:
    blocks, tokens = select(q, index, cfg, score_mod, mask_mod, scale)
    folded = fold_groups(q, k.shape[1])
    if callers_graph and not q.is_cuda:
        folded = _own_buffer(folded)
        tokens = replace(tokens, words=_own_buffer(tokens.words), positions=_own_buffer(tokens.positions))
    # The C++ template of torch's CPU backend has no log-sum-exp
    lse_from_kernel = return_lse and q.is_cuda
    result = flex_attention(  # type: ignore[call-overload]
        folded,
        k,
        v,
        score_mod=token_score_mod(tokens, score_mod, mask_mod),
        block_mask=block_mask(blocks),
        scale=scale,
        return_lse=lse_from_kernel,
        kernel_options=kernel_options(q.device, folded.shape[2], k.shape[0] * k.shape[1]),
    )
    if callers_graph and not q.is_cuda:
        result = _own_buffer(result)
    if lse_from_kernel:
        out, lse = result
        return unfold_groups(out, blocks.group), unfold_groups(lse, blocks.group), blocks, tokens
    if return_lse:
        lse = attention_reference(q, k, v, tokens, scale=scale, score_mod=score_mod, mask_mod=mask_mod)[1].float()
    return unfold_groups(result, blocks.group), lse if return_lse else None, blocks, tokens
