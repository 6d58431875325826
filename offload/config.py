"""How a cache that does not fit the device is held: one frozen, validated object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Policy = Literal["async", "exact", "corrected"]
Transfer = Literal["kernel", "copy"]
StoreDtype = Literal["model", "int8"]


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """Settings of the offload engine. The pool's size is given in one way at most; twice the block budget by default.

    Attributes:
        gpu_blocks: block slots on the device per row and KV head; one number, or one for each offloaded layer.
        gpu_bytes: device bytes of the pools of all offloaded layers, rows and KV heads together.
        gpu_fraction: slots as a share of the blocks that the cache has room for, above 0 and at most 1.
        policy: what a step does about selected blocks that are not on the device. ``"async"``: they are left out and
            arrive for the next step, nothing waits. ``"exact"``: the step waits for them, and equals the cache without
            offload; a compiled one attends to what is there while they come. ``"corrected"``: as async, but KV heads
            that would miss too much wait.
        missing_mass_bound: for ``"corrected"``: share of the selected blocks' estimated attention mass that a KV head
            may miss without waiting.
        attend_resident: attend also to blocks that are on the device from earlier steps: level 2 then chooses its
            tokens among more blocks, which costs the reading of their labels and makes up for the missing ones
            (docs/design.md, section 10). By default so, but not with ``"exact"``, which attends to what it selected.
        transfer: on CUDA, ``"kernel"``: one Triton kernel reads the pinned host memory, the step can be captured;
            ``"copy"``: a copy a block, for which each step waits for the device. On a CPU there are only copies by the
            host. :func:`.engine.transfer_path` says which it is; ``tls.explain`` and ``cache.stats()`` report it.
        transfer_programs: programs of that kernel, which share the device with the model's own.
        store_dtype: ``"model"``: host and pool hold keys and values in the model's dtype. ``"int8"``: in 8 bits, with
            a float32 scale for each token's key and one for its value; 2 * D + 8 bytes a token and KV head, about half
            of a 16-bit dtype's, on the host, on the way and in the pool. Costs an error of up to 1/254 of a key's or
            value's largest magnitude. They are rounded so when they are written, before anything reads them, a prompt's
            own attention included: what they become depends neither on which blocks are on the device nor on a
            prompt's chunks.
            The compiled step reads 8 bits as they are; an eager one first makes a copy of its layer's pool in the
            model's dtype.
    """

    gpu_blocks: int | tuple[int, ...] | None = None
    gpu_bytes: int | None = None
    gpu_fraction: float | None = None
    policy: Policy = "async"
    missing_mass_bound: float = 0.05
    attend_resident: bool | None = None
    transfer: Transfer = "kernel"
    transfer_programs: int = 32
    store_dtype: StoreDtype = "model"

    def __post_init__(self) -> None:
        for name, choices in (
            ("policy", get_args(Policy)), ("transfer", get_args(Transfer)), ("store_dtype", get_args(StoreDtype)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}"
                )
        given = [name for name in ("gpu_blocks", "gpu_bytes", "gpu_fraction") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: expected one size for the pool, got {' and '.join(given)}; leave one out")
        blocks = self.gpu_blocks if isinstance(self.gpu_blocks, tuple) else (self.gpu_blocks,)
        if (isinstance(self.gpu_blocks, tuple) and None in blocks) or blocks == ():
            raise ValueError(f"gpu_blocks: expected a number of blocks for each layer, got {self.gpu_blocks!r}")
        for name, value in (
            *(("gpu_blocks", n) for n in blocks), ("gpu_bytes", self.gpu_bytes),
            ("transfer_programs", self.transfer_programs),
        ):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.gpu_fraction is not None and not 0.0 < self.gpu_fraction <= 1.0:
            raise ValueError(f"gpu_fraction: expected a share above 0 and at most 1, got {self.gpu_fraction}")
        if not 0.0 <= self.missing_mass_bound <= 1.0:
            raise ValueError(f"missing_mass_bound: expected a share between 0 and 1, got {self.missing_mass_bound}")
        if self.policy == "exact" and self.attend_resident:
            raise ValueError(
                "attend_resident: expected False with policy='exact', which attends to what it selected, got True"
            )

    @property
    def attends_resident(self) -> bool:
        """:attr:`attend_resident`, or its default."""
        return self.policy != "exact" if self.attend_resident is None else self.attend_resident

    @property
    def waits_above(self) -> float:
        """Missing share of the estimated mass above which a KV head waits: -1 always, infinity never."""
        return {"exact": -1.0, "async": math.inf, "corrected": self.missing_mass_bound}[self.policy]

    @property
    def may_wait(self) -> bool:
        """Whether a step of the policy can wait at all."""
        return self.policy != "async"

    def token_bytes(self, head_dim: int, itemsize: int) -> int:
        """Bytes of one token's key and value of one KV head, on the host and in the pool alike.

        ``itemsize``: bytes of a number of the model's.
        """
        return 2 * (head_dim + 4) if self.store_dtype == "int8" else 2 * head_dim * itemsize

    def pool_blocks(
        self, *, n_layers: int, n_heads: int, n_blocks: int, kept_blocks: int, least: int, block_bytes: int
    ) -> tuple[int, ...]:
        """Slots of each offloaded layer's pool, never more than the cache has blocks.

        Args:
            n_layers: layers that are offloaded.
            n_heads: rows times KV heads (B * HKV).
            n_blocks: N.
            kept_blocks: K, blocks that a query token keeps.
            least: slots without which a step could not run.
            block_bytes: keys and values of one block of one KV head.

        Raises:
            ValueError: a pool below ``least``; says what would do.
        """
        if self.gpu_bytes is not None:
            sizes = (self.gpu_bytes // (max(n_layers, 1) * n_heads * block_bytes),) * n_layers
            name, enough = "gpu_bytes", f"{least * n_layers * n_heads * block_bytes:,} bytes"
        elif self.gpu_fraction is not None:
            # A share such as 1/49 of 49 blocks is one block, not a rounding error less
            sizes = (int(self.gpu_fraction * n_blocks + 1e-6),) * n_layers
            name, enough = "gpu_fraction", f"{least / n_blocks:.4f}"
        elif isinstance(self.gpu_blocks, tuple):
            if len(self.gpu_blocks) != n_layers:
                raise ValueError(
                    f"gpu_blocks: expected {n_layers} numbers, one for each offloaded layer, got {len(self.gpu_blocks)}"
                )
            sizes, name, enough = self.gpu_blocks, "gpu_blocks", f"{least} blocks"
        else:
            sizes = (self.gpu_blocks or max(2 * kept_blocks, least),) * n_layers
            name, enough = "gpu_blocks", f"{least} blocks"
        sizes = tuple(min(size, n_blocks) for size in sizes)
        if sizes and min(sizes) < min(least, n_blocks):
            raise ValueError(
                f"{name}: expected at least {enough}, so that what a step selects ({kept_blocks} blocks) and writes "
                f"fits the pool, got {min(sizes)} blocks; enlarge it or lower block_budget"
            )
        return sizes
