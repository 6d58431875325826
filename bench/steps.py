"""Caches filled as if a long text had been read, and captured steps that decode the same place again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

import flex_tls as tls
from flex_tls.decode import Loop
from flex_tls.integrations.huggingface import enabled
from flex_tls.offloaded_layer import OffloadedLayer

FIT_TOKENS = 2048
CHUNK_TOKENS = 8192

Step = Callable[[], object]


def fill(cache: tls.TLSCache, context: int) -> None:
    """Random keys and values, a piece at a time, as if ``context`` tokens had been read; prefill would take minutes."""
    b = cache.batch_size
    for layer in cache.tls_layers:
        index = layer.index
        if not isinstance(layer, OffloadedLayer):
            for buffer in layer.buffers():
                buffer.normal_()
        for first in range(0, context, CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, context - first)
            if isinstance(layer, OffloadedLayer):
                shape = (b, cache.shape.n_kv_heads, n, cache.shape.head_dim)
                keys, values = torch.randn(2, *shape, dtype=cache.dtype, device=cache.device).unbind()
                layer.opened().write(keys, values, [first] * b, [n] * b)
            else:
                keys = layer.buffers()[0][:, :, first : first + n]
            if index is not None:
                if first == 0:
                    index.fit(keys[:, :, :FIT_TOKENS])
                index.labels.write(keys, torch.full((b,), first, device=keys.device))
    cache.advance(context)


def captured_step(
    model: Any, cache: tls.TLSCache, *, options: Mapping[str, Any] | None = None,
    during: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Step:  # fmt: skip
    """One captured step; every replay decodes the same place of the context again.

    ``options``: Inductor's. ``during``: entered whenever the model itself runs, to be captured or, on a CPU, replayed.
    """
    device = next(model.parameters()).device
    loop = Loop(
        model, cache, torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device), inductor_options=options,
        progress=True,
    )  # fmt: skip
    loop.start.copy_(torch.tensor(cache.seq_lens))
    selects = any(layer.index is not None for layer in cache.tls_layers)

    def running() -> ExitStack:
        stack = ExitStack()
        for context in (torch.no_grad(), enabled(model), during()):
            stack.enter_context(context)
        return stack

    with running():
        replay = loop.build(sparse=selects and max(cache.seq_lens) + 1 > cache.cfg.dense_up_to_tokens)

    def step() -> None:
        if device.type == "cuda":
            replay()
        else:
            # Nothing is captured: the model itself runs
            with running():
                replay()
        loop.start.sub_(1)

    return step
