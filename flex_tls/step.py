"""One decode step of a whole model, compiled: what a captured loop replays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._code import with_own_code
from .cache_layer import TLSLayer
from .device import why_not_here
from .notice import clock

if TYPE_CHECKING:
    from .cache import TLSCache

# Keyword argument by which a step travels through the model to its attention
STEP = "flex_tls_step"


class _Step:
    """What the model's attention meets during a compiled step: in place of a cache, and as keyword argument."""

    is_compileable = True

    def __init__(
        self, layers: list[TLSLayer], start: Tensor, arrivals: Tensor, sparse: bool, queries: list[Tensor]
    ) -> None:
        self.layers, self.start, self.arrivals, self.sparse = layers, start, arrivals, sparse
        self.queries = queries

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values themselves: :meth:`attend` writes them."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given."""
        return 0

    def attend(self, layer: TLSLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Write and attend: [B, HQ, 1, D]; keeps the queries for an audit."""
        if self.queries:
            self.queries[layer.layer_idx].copy_(q)
        return layer.decode(q, k, v, self.start, scale=scale, sparse=self.sparse, arrivals=self.arrivals)


class DecodeStep:
    """One forward of ``model`` over its cache, compiled whole: (token int64 [B, 1], start int64 [B]) -> logits [B, V].

    ``start``: tokens that each row holds. Writes keys, values and labels at that place, and counts nothing. Where it
    is sparse and the cache audited, ``queries`` are each layer's, [B, HQ, 1, D], after every call.
    """

    def __init__(self, model: Any, cache: TLSCache, sparse: bool, options: Mapping[str, Any] | None = None) -> None:
        layers = cache.tls_layers
        rows = cache.batch_size * cache.shape.n_kv_heads
        device = next(model.parameters()).device
        queries: list[Tensor] = []
        # Also under a caller's inference mode, whose tensors could not be written to outside of it
        with torch.inference_mode(False):
            arrivals = torch.zeros(rows, dtype=torch.int32, device=device)
            if cache.auditor is not None and sparse:
                shape = (cache.batch_size, model.config.num_attention_heads, 1, cache.shape.head_dim)
                queries = [torch.zeros(shape, dtype=cache.dtype, device=device) for _ in layers]
        self.queries = queries

        def forward(token: Tensor, start: Tensor) -> Tensor:
            step = _Step(layers, start, arrivals, sparse, queries)
            out = model(
                token, position_ids=start[:, None], past_key_values=step, use_cache=True, logits_to_keep=1,
                **{STEP: step},
            )  # fmt: skip
            cache.join_in_step()
            logits: Tensor = out.logits[:, -1]
            return logits

        self.forward = torch.compile(
            with_own_code(forward), fullgraph=True, dynamic=False, options=dict(options or {})
        )  # fmt: skip
        self.sparse, self.has_run = sparse, False

    @classmethod
    def of(cls, model: Any, cache: TLSCache, sparse: bool, options: Mapping[str, Any] | None = None) -> DecodeStep:
        """The cache's own step for ``model``: the next turn finds it compiled."""
        key = (model, cache.batch_size, sparse, repr(sorted((options or {}).items())))
        step: DecodeStep | None = cache.compiled_steps.get(key)
        if step is None:
            step = cache.compiled_steps[key] = cls(model, cache, sparse, options)
        return step

    def __call__(self, token: Tensor, start: Tensor, progress: bool = False) -> Tensor:
        """Logits [B, V] of the tokens after ``token``. The first call compiles; ``progress`` shows for how long."""
        with torch.no_grad(), clock("compiling the step", progress and not self.has_run):
            logits: Tensor = self.forward(token, start)
        self.has_run = True
        return logits


def why_not_compiled(cache: TLSCache, device: torch.device) -> str | None:
    """What keeps a cache from the compiled step on ``device``; None if nothing does."""
    if cache.backend not in ("auto", "triton"):
        return f"the compiled step runs the fused kernel, backend='auto' or 'triton', got {cache.backend!r}"
    if cache.recorder is not None:
        return "the compiled step records nothing, which the cache's recorder asks for"
    if cache.cfg.index != "lowrank":
        return f"the compiled step writes labels alone, index='lowrank', got index={cache.cfg.index!r}"
    if cache.offload_config is not None and cache.offload_config.transfer != "kernel":
        return f"the compiled step moves blocks by a kernel, transfer='kernel', got {cache.offload_config.transfer!r}"
    if any(layer.window is not None for layer in cache.tls_layers):
        return "the compiled step has no sliding windows, which this model's layers have"
    if cache.auditor is not None and cache.auditor.on_drift != "report":
        return f"the compiled step keeps its budgets, on_drift='report', got {cache.auditor.on_drift!r}"
    return why_not_here(device)
