"""Attention over a pool of block slots, by kernels: on a GPU as compiled, elsewhere interpreted."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from flex_tls.offload import DevicePool
from flex_tls.offload.config import StoreDtype
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
import flex_tls.static  # noqa: F401 - registers append_to_pool
from flex_tls.attention import attend
from flex_tls.config import TLSConfig
from flex_tls.fused import labels_of, options_of
from flex_tls.fused_pool import Chosen, attend_arrived, attend_chosen, attend_resident, choose_blocks
from flex_tls.index import KVIndex
from flex_tls.kernels.tile_table import forced
from flex_tls.kernels.tiles import INTERPRETED, rule
from flex_tls.reference import attention_reference
from tests.cases import Case, assert_as_exact, cases
from tests.cases import make as make_case
from tests.offload.machine import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16
# The interpreter cuts bfloat16 off where everything else rounds
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))


class Pooled(NamedTuple):
    """A step's choice over a pool that holds it, and what comes of it: ``low`` by PyTorch, ``truth`` in float64."""

    q: Tensor
    pool: DevicePool
    chosen: Chosen
    index: KVIndex
    scale: float
    lens: Tensor
    low: Tensor
    truth: Tensor


def pooled(
    case: Case, dtype: torch.dtype, store_dtype: StoreDtype, size_of_values: float, spare: int,
    generator: torch.Generator,
) -> Pooled:  # fmt: skip
    """Slots in any order; whatever was not chosen is NaN."""
    q, k, v = (x.to(DEVICE, dtype) for x in (case.q, case.k, case.v * size_of_values))
    cfg, size, lens = case.cfg, case.cfg.block_size, case.seq_lens.to(DEVICE)
    index = KVIndex.build(k, cfg, lens, q)
    (b, hkv, _, d), n, scale = k.shape, index.n_blocks, k.shape[3] ** -0.5
    chosen = choose_blocks(q, index, cfg, scale, lens)
    pool = DevicePool(
        batch_size=b, n_kv_heads=hkv, n_slots=chosen.blocks.shape[1] + spare, n_blocks=n, block_size=size, head_dim=d,
        dtype=dtype, device=torch.device(DEVICE), store_dtype=store_dtype,
    )  # fmt: skip
    poison(pool)
    parts = pool.packed(torch.nn.functional.pad(torch.stack((k, v), 3), (0, 0, 0, 0, 0, n * size - k.shape[2])))
    blocks, counts = chosen.blocks.view(b, hkv, -1), chosen.counts.view(b, hkv)
    for row in range(b):
        for head in range(hkv):
            held = blocks[row, head, : int(counts[row, head])].long()
            slots = torch.randperm(pool.n_slots, generator=generator)[: held.numel()].to(DEVICE)
            pool.slot_of_block[row, head, held] = slots.int()
            for device, part in zip(pool.parts, parts, strict=True):
                device[row, head, slots] = part[row, head].unflatten(0, (n, size))[held]
    s = k.shape[2]
    keys, values = (x[:, :, :s] for x in pool.unpacked(parts).unbind(3))
    tokens = attend(q, keys, values, index, cfg, scale=scale, backend="triton").tokens
    assert tokens is not None
    exact = [x.double() for x in parts]
    wide = exact[0] if len(exact) == 1 else exact[0] * exact[1][..., None]
    truth, _ = attention_reference(q.double(), *wide[:, :, :s].unbind(3), tokens, scale=scale)
    low = attention_reference(q, keys, values, tokens, scale=scale)[0]
    return Pooled(q, pool, chosen, index, scale, lens, low, truth)


POOLED = (
    cases(kinds=("lowrank",), max_t=1, max_hkv=2, head_dims=(64, 80, 128)), st.sampled_from(DTYPES),
    st.sampled_from(("model", "int8")), st.sampled_from((1.0, 2.0**-10)), st.integers(0, 3), st.integers(0, 2**16),
)  # fmt: skip
# Weights times the scales of such values are too small for float16: ten times the error
SMALL_VALUES = (
    make_case(
        TLSConfig(block_size=16, block_budget=160, token_budget=None, sink_tokens=16, recent_tokens=16, label_dims=8),
        lens=[150, 200], s=200, d=64,
    ), torch.float16, "int8", 2.0**-10, 2, 0,
)  # fmt: skip


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(*POOLED)
@example(*SMALL_VALUES)
def test_attention_over_a_pool_is_as_exact_as_over_the_keys_it_stands_for(
    case: Case, dtype: torch.dtype, store_dtype: StoreDtype, size_of_values: float, spare: int, seed: int
) -> None:
    """Any group, ragged rows."""
    x = pooled(case, dtype, store_dtype, size_of_values, spare, torch.Generator().manual_seed(seed))
    got = attend_chosen(x.q, x.pool, x.chosen, x.index, case.cfg, x.scale, x.lens)
    assert_as_exact(got, x.low, x.truth)


# Each example compiles four kernels natively
@settings(max_examples=10 if DEVICE == "cpu" else 4, phases=(Phase.explicit, Phase.generate))
@given(*POOLED, st.booleans())
@example(*SMALL_VALUES, True)
def test_what_is_there_and_what_comes_are_together_as_exact(
    case: Case, dtype: torch.dtype, store_dtype: StoreDtype, size_of_values: float, spare: int, seed: int, alone: bool
) -> None:
    """Neither half reads a slot that is the other's: those are NaN meanwhile. A row has one program, or several."""
    single = INTERPRETED._replace(programs=1) if DEVICE == "cpu" else rule(132, head_bytes=512, rows=132)
    with forced(single) if alone else nullcontext():
        check_two_halves(case, dtype, store_dtype, size_of_values, spare, torch.Generator().manual_seed(seed))


def check_two_halves(
    case: Case, dtype: torch.dtype, store_dtype: StoreDtype, size_of_values: float, spare: int,
    generator: torch.Generator,
) -> None:  # fmt: skip
    x = pooled(case, dtype, store_dtype, size_of_values, spare, generator)
    pool = x.pool
    pool.clock.fill_(7)
    comes = (torch.rand(pool.arrived.shape, generator=generator) < 0.4).to(DEVICE)
    pool.arrived.copy_(6 + comes.int())
    whole = [held.clone() for held in pool.parts]

    def spoil(slots: Tensor) -> None:
        for held, was in zip(pool.parts, whole, strict=True):
            held.copy_(was)
            held[slots] = 127 if held.dtype == torch.int8 else float("nan")

    spoil(comes)
    resident = attend_resident(x.q, pool, x.chosen, x.index, case.cfg, x.scale, x.lens)
    spoil(~comes)
    got = attend_arrived(x.q, pool, resident, x.chosen, x.index, x.scale, x.lens)
    assert_as_exact(got, x.low, x.truth)
    assert not bool(x.index.arrivals.any())


@pytest.mark.parametrize("store_dtype", ["model", "int8"])
@pytest.mark.parametrize("token_budget", [None, 40])
def test_the_ops_over_a_pool_are_registered_as_pytorch_wants_them(
    store_dtype: StoreDtype, token_budget: int | None
) -> None:
    cfg = TLSConfig(
        block_size=SIZE, block_budget=5 * SIZE, token_budget=token_budget, sink_tokens=SIZE, recent_tokens=SIZE,
        label_dims=8,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    case = make_case(cfg, lens=[150], s=160, hkv=1, group=2)
    x = pooled(case, torch.float32, store_dtype, 1.0, 1, generator)
    pool, labels = x.pool, x.index.labels
    checks = ("test_schema", "test_faketensor")
    held, tables = (x.q, pool.slots, pool.scales, pool.slot_of_block), (pool.arrived, pool.clock)
    pool.clock.fill_(7)
    pool.arrived.copy_(6 + (torch.arange(pool.n_slots) % 2).int())
    options = options_of(x.index, cfg, x.scale)
    for when in ((None, None), tables):
        torch.library.opcheck(
            torch.ops.flex_tls.attend_slots.default,
            (*held, *when, x.lens, *labels_of(x.index), *x.chosen),
            {"token_budget": token_budget, **options},
            test_utils=checks,
        )
    resident = attend_resident(x.q, pool, x.chosen, x.index, cfg, x.scale, x.lens)
    # The half that the op writes; nothing else reads it
    for part in (resident.parts, resident.parts_lse):
        part[:, part.shape[1] // 2 :] = 0
    kept_tokens = x.chosen.blocks.shape[1] * SIZE
    torch.library.opcheck(
        torch.ops.flex_tls.attend_arrived.default,
        (*held, *tables, x.lens, labels.codes, x.index.arrivals, *resident, SIZE, kept_tokens, x.scale),
        test_utils=checks,
    )
    k, v = (torch.randn(1, 1, 1, 16, generator=generator).to(DEVICE) for _ in range(2))
    # The last token again: its block is always kept, and so has a slot
    torch.library.opcheck(
        torch.ops.flex_tls.append_to_pool.default,
        (k, v, x.lens - 1, pool.slots, pool.slot_of_block, labels.codes, labels.to_code, labels.offset, labels.words,
         pool.scales),
        test_utils=checks,
    )  # fmt: skip
