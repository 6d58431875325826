"""Random problems for property tests: odd sizes, ragged rows, any group; and the float64 measuring stick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from flex_tls import KVIndex, TLSConfig
from flex_tls.config import GroupReduce

KINDS = ("lowrank", "box", "quest", "mean", "oracle")


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    seq_lens: Tensor
    cfg: TLSConfig

    def index(self) -> KVIndex:
        return KVIndex.build(self.k, self.cfg, self.seq_lens, self.q)


def make(
    cfg: TLSConfig,
    *,
    lens: list[int],
    s: int,
    hkv: int = 2,
    group: int = 3,
    t: int = 1,
    d: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(device=device, dtype=dtype)  # noqa: E731
    b = len(lens)
    return Case(
        draw(b, hkv * group, t, d),
        draw(b, hkv, s, d),
        draw(b, hkv, s, d),
        torch.tensor(lens, device=device),
        cfg,
    )


# Of one width, or of several
LABELS: tuple[dict[str, Any], ...] = (
    *({"label_dims": 8, "label_bits": bits} for bits in (2, 4, 8)), {"label_bits": (4, 2)}, {"label_bits": (8, 2, 4)},
    {"label_bits": (4, 2), "filter_dims": 8}, {"label_bits": (4, 8)},
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> TLSConfig:
    size = draw(st.sampled_from((16, 32, 64)))
    sinks = draw(st.integers(0, 40))
    recent = draw(st.integers(1, 50))
    least = TLSConfig(block_size=size, block_budget=10**6, token_budget=None, sink_tokens=sinks, recent_tokens=recent)
    budget = least.forced_blocks * size + draw(st.integers(0, 5 * size))
    tokens = draw(st.none() | st.integers(sinks + recent, budget)) if sinks + recent <= budget else None
    return TLSConfig(
        block_size=size,
        block_budget=budget,
        token_budget=tokens,
        sink_tokens=sinks,
        recent_tokens=recent,
        index=draw(st.sampled_from(kinds)),
        **draw(st.sampled_from(LABELS)),
        group_reduce=draw(st.sampled_from(get_args(GroupReduce))),
        block_reduce=draw(st.sampled_from(("max", "logsumexp"))),
    )


@st.composite
def cases(
    draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, max_t: int = 4, max_hkv: int = 3,
    head_dims: tuple[int, ...] = (8, 16, 24),
) -> Case:  # fmt: skip
    t = draw(st.integers(1, max_t))
    lens = draw(st.lists(st.sampled_from((1, 63, 64, 65)) | st.integers(1, 200), min_size=1, max_size=3))
    lens = [max(n, t) for n in lens]
    return make(
        draw(configs(kinds)),
        lens=lens,
        s=max(lens) + draw(st.integers(0, 9)),
        hkv=draw(st.integers(1, max_hkv)),
        group=draw(st.sampled_from((1, 2, 3, 4, 5, 7, 8))),
        t=t,
        d=draw(st.sampled_from(head_dims)),
        seed=draw(st.integers(0, 2**16)),
    )


def error(x: Tensor, truth: Tensor) -> float:
    """Relative error against a float64 truth; NaN where either has one."""
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def assert_as_exact(got: Tensor, low: Tensor, truth: Tensor) -> None:
    """The measuring stick: ``got`` may be off from the float64 truth as plain PyTorch in that dtype, and little more.

    ``low`` is the eager result in got's dtype. The allowance is one rounding of the result in that dtype,
    or four in float32, in which sums run in another order.
    """
    allowance = max(torch.finfo(got.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert error(got, truth) <= 2 * error(low, truth) + allowance
