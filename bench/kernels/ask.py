"""Queries in label space, in a launch of their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flex_tls.kernels.ask import ask
from flex_tls.kernels.follow import follow
from flex_tls.kernels.labels import parts_before, places_of
from flex_tls.kernels.rows import locate
from flex_tls.kernels.tiles import NATIVE, padded


@triton.jit
def ask_rows(
    q, seq_lens, to_query, low, step, asked, base, unit, q_stride_b, q_stride_h, q_stride_t, n_heads, T, filter_dims,
    D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GP: tl.constexpr, PLACES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Program (0, row)."""
    follow(NATIVE)
    row, head, _ = locate(seq_lens, n_heads, T)
    ask(q, to_query, low, step, asked, base, unit, row, head, q_stride_b, q_stride_h, q_stride_t, n_heads, T,
        filter_dims, D, DP, C, W, BITS, GROUP, GP, PLACES, NATIVE)  # fmt: skip


def launch_ask(
    q: Tensor, seq_lens: Tensor, to_query: Tensor, low: Tensor, step: Tensor, *, bits: tuple[int, ...],
    filter_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """asked int32 [R, G, parts], base float32 [R, G, 2], unit float32 [R, G]; see ``flex_tls/kernels/ask.py``."""
    b, hq, t, d = q.shape
    _, hkv, _, c = to_query.shape
    rows, group = b * hkv * t, hq // hkv
    asked = torch.empty(rows, group, parts_before(bits, len(bits)), dtype=torch.int32, device=q.device)
    base = torch.empty(rows, group, 2, device=q.device)
    unit = torch.empty(rows, group, device=q.device)
    ask_rows[(1, rows)](
        q, seq_lens, to_query, low, step, asked.view(torch.int8), base, unit, *q.stride()[:3],
        hkv, t, filter_dims,
        D=d, DP=padded(d, 16), C=c, W=len(bits), BITS=bits, GROUP=group, GP=padded(group),
        PLACES=max(16, padded(len(bits)) * places_of(bits)), NATIVE=NATIVE, num_warps=4,
        launch_pdl=NATIVE,
    )  # fmt: skip
    return asked, base, unit
