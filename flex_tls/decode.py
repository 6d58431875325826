"""``generate``: prefill in chunks, then one compiled step a token, on CUDA captured as one graph.

A step is the whole model, two-level attention, sampling and the stop test; only token ids leave the device, a few steps
behind, so that the host never stalls it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .cache import TLSCache
from .cache_layer import TLSLayer
from .fused import why_not_here
from .integrations.huggingface import STEP, enabled, end_of_sequence_ids
from .sampling import Sampling
from .static import decode_layer

PREFILL_CHUNK_TOKENS = 4096
# Steps that may be under way before the host looks at the oldest one's tokens
LAG = 4


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    cache: TLSCache,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_token_ids: int | list[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    streamer: Any = None,
    compiled: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """Continue ``input_ids`` with ``model``; greedy output is that of ``model.generate`` with the same cache.

    Args:
        model: a transformers decoder; need not be enabled.
        input_ids: int64 [B, S], left padded, on the model's device. What the cache holds already (an earlier turn) must
            be its beginning and is not read again.
        cache: with room for S + max_new_tokens.
        attention_mask: [B, S], zeros where there is padding; None without padding.
        max_new_tokens: most tokens a row gets.
        sampling: greedy by default.
        stop_token_ids: end a row; the model's end-of-sequence tokens by default, an empty list for none.
        pad_token_id: fills rows that ended; the model's, or its first stop token, by default.
        seed: of the sampling; torch's own generator by default.
        streamer: with ``put(int64 [B])`` per step and ``end()``, as transformers' streamers; a few steps behind.
        compiled: one compiled step, on CUDA one graph; by default on CUDA. False runs the model's own forward.
        progress: show a progress bar of the prefill.

    Returns:
        int64 [B, S + n], n at most ``max_new_tokens``; the cache holds all but the last token.

    Raises:
        ValueError: shapes, lengths, or a configuration that cannot be compiled (says why).
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids: expected shape [B, S] with at least one token, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    n_cached, n_given = cache.get_seq_length(), input_ids.shape[1]
    if n_cached >= n_given:
        raise ValueError(f"input_ids: expected more than the {n_cached} tokens that the cache holds, got {n_given}")
    if n_given + max_new_tokens > cache.max_len:
        raise ValueError(
            f"max_new_tokens: expected room for {n_given + max_new_tokens} tokens, got a cache with "
            f"max_len={cache.max_len}; make it longer or ask for fewer tokens"
        )
    compiled = input_ids.is_cuda if compiled is None else compiled
    if compiled and (why := why_not_compiled(cache, input_ids.device)):
        raise ValueError(f"compiled: {why}; pass compiled=False")
    if stop_token_ids is None:
        stop_token_ids = end_of_sequence_ids(model)
    stops = [stop_token_ids] if isinstance(stop_token_ids, int) else stop_token_ids
    loop = _Loop(model, cache, sampling or Sampling(), input_ids, stops, pad_token_id, seed)
    with torch.no_grad(), enabled(model):
        loop.prefill(input_ids, attention_mask, progress)
        steps = loop.compiled_steps(max_new_tokens - 1) if compiled else loop.eager_steps(max_new_tokens - 1)
        new = _collect(steps, loop, streamer)
    cache.crop(n_given + new.shape[1] - 1)
    return torch.cat([input_ids, new], dim=1)


def _collect(steps: Generator[Tensor, None, None], loop: _Loop, streamer: Any) -> Tensor:
    """Tokens int64 [B, n] of the prompt's own logits and of ``steps``, until all rows have ended."""
    ended = torch.zeros(loop.token.shape[0], dtype=torch.bool)
    rows: list[Tensor] = []
    stops = loop.stops.cpu()
    # Closed, however this ends, the steps account for what they ran ahead
    with closing(steps):
        for token in chain([loop.token[:, 0].to("cpu", copy=True)], steps):
            rows.append(token)
            if streamer is not None:
                streamer.put(token)
            ended |= torch.isin(token, stops)
            if bool(ended.all()):
                break
    if streamer is not None:
        streamer.end()
    return torch.stack(rows, 1).to(loop.token.device)


class _Step:
    """What the model's attention meets during a compiled step: in place of a cache, and as keyword argument."""

    is_compileable = True

    def __init__(self, layers: list[TLSLayer], start: Tensor, arrivals: Tensor, sparse: bool) -> None:
        self.layers, self.start, self.arrivals, self.sparse = layers, start, arrivals, sparse

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values themselves: :meth:`attend` writes them."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given."""
        return 0

    def attend(self, layer: TLSLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Write and attend: [B, HQ, 1, D]."""
        return decode_layer(
            q, k, v, *layer.buffers(), layer.index, self.start, layer.shared.cfg,
            scale=scale, sparse=self.sparse, arrivals=self.arrivals,
        )  # fmt: skip


class _Loop:
    """Decoding state on the device: the next token [B, 1], lengths [B], rows that ended [B]."""

    def __init__(
        self, model: Any, cache: TLSCache, sampling: Sampling, ids: Tensor, stops: list[int], pad: int | None,
        seed: int | None,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.sampling = model, cache, sampling
        device, b = ids.device, ids.shape[0]
        self.token = torch.zeros(b, 1, dtype=torch.int64, device=device)
        self.start = torch.zeros(b, dtype=torch.int64, device=device)
        self.ended = torch.zeros(b, dtype=torch.bool, device=device)
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        config = model.generation_config
        own = config.pad_token_id if isinstance(config.pad_token_id, int) else None
        self.pad = pad if pad is not None else own if own is not None else stops[0] if stops else 0
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(b, model.config.vocab_size, dtype=torch.bool, device=device)
            self.seen.scatter_(1, ids, True)

    def prefill(self, ids: Tensor, mask: Tensor | None, progress: bool) -> None:
        """Read what the cache does not hold yet, and draw the first token."""
        first, n = self.cache.get_seq_length(), ids.shape[1]
        # Rows without a token in a chunk would spoil it: padding and the first tokens go together
        pad = 0 if mask is None else int((mask == 0).sum(1).max())
        ends = [*range(max(first, pad) + PREFILL_CHUNK_TOKENS, n, PREFILL_CHUNK_TOKENS), n]
        bar = _progress(n - first, progress)
        for end in ends:
            logits = self.model(
                ids[:, first:end], attention_mask=None if mask is None else mask[:, :end],
                position_ids=_positions(mask, first, end, ids), past_key_values=self.cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            bar.update(end - first)
            first = end
        bar.close()
        self._next(logits)

    def eager_steps(self, n: int) -> Generator[Tensor, None, None]:
        """``n`` steps of the model's own forward; yields tokens int64 [B] on the host."""
        for _ in range(n):
            position = torch.tensor(self.cache.seq_lens, device=self.token.device)[:, None]
            logits = self.model(
                self.token, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # fmt: skip
            self._next(logits)
            yield self.token[:, 0].to("cpu", copy=True)

    def compiled_steps(self, n: int) -> Generator[Tensor, None, None]:
        """As :meth:`eager_steps`, compiled; on CUDA the host is up to LAG steps behind the device."""
        cache, cfg = self.cache, self.cache.cfg
        self.start.copy_(torch.tensor(cache.seq_lens))
        done = counted = 0
        waiting: list[tuple[Tensor, Any]] = []
        run, sparse = None, False
        longest, refit_at = max(cache.seq_lens), cache.refit_at_tokens
        try:
            while done < n or waiting:
                if done < n:
                    now_sparse = longest + 1 > cfg.dense_up_to_tokens
                    if longest >= refit_at:
                        cache.advance(done - counted)
                        counted = done
                        cache.refit_if_outgrown()
                        refit_at = cache.refit_at_tokens
                    if run is None or now_sparse != sparse:
                        run, sparse = self._build(now_sparse), now_sparse
                    run()
                    done += 1
                    longest += 1
                    waiting.append(_to_host(self.token))
                if done == n or len(waiting) > LAG:
                    token, event = waiting.pop(0)
                    if event is not None:
                        event.synchronize()
                    yield token[:, 0]
        finally:
            cache.advance(done - counted)

    def _next(self, logits: Tensor) -> None:
        """Draw from logits [B, V] and note the token."""
        token = self.sampling.draw(logits, self.seen, self.generator)
        token = torch.where(self.ended, self.pad, token)
        self.token.copy_(token[:, None])
        self.ended |= torch.isin(token, self.stops)
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)

    def _build(self, sparse: bool) -> Any:
        """A function that runs one step: compiled, and on CUDA one graph replay."""
        step = DecodeStep.of(self.model, self.cache, sparse)

        def run() -> None:
            self._next(step(self.token, self.start))
            self.start += 1

        if not self.token.is_cuda:
            return run
        # Warm-up writes where the first step will write again; what it draws is taken back
        state = [self.token, self.start, self.ended] + ([] if self.seen is None else [self.seen])
        kept = [x.clone() for x in state]
        randomness = None if self.generator is None else self.generator.get_state()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
                for x, old in zip(state, kept, strict=True):
                    x.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None and randomness is not None:
            self.generator.set_state(randomness)
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            run()
        return graph.replay


class DecodeStep:
    """One forward of ``model`` over its cache, compiled whole: (token int64 [B, 1], start int64 [B]) -> logits [B, V].

    ``start``: tokens that each row holds. Writes keys, values and labels at that place, and counts nothing.
    """

    def __init__(self, model: Any, cache: TLSCache, sparse: bool) -> None:
        layers = cache.tls_layers
        keys = layers[0].buffers()[0]
        arrivals = torch.zeros(keys.shape[0] * keys.shape[1], dtype=torch.int32, device=keys.device)

        def forward(token: Tensor, start: Tensor) -> Tensor:
            step = _Step(layers, start, arrivals, sparse)
            out = model(
                token, position_ids=start[:, None], past_key_values=step, use_cache=True, logits_to_keep=1,
                **{STEP: step},
            )  # fmt: skip
            logits: Tensor = out.logits[:, -1]
            return logits

        self.forward = torch.compile(forward, fullgraph=True, dynamic=False)

    @classmethod
    def of(cls, model: Any, cache: TLSCache, sparse: bool) -> DecodeStep:
        """The cache's own step for ``model``: the next turn finds it compiled."""
        key = (model, cache.batch_size, sparse)
        step: DecodeStep | None = cache.compiled_steps.get(key)
        if step is None:
            step = cache.compiled_steps[key] = cls(model, cache, sparse)
        return step

    def __call__(self, token: Tensor, start: Tensor) -> Tensor:
        """Logits [B, V] of the tokens after ``token``."""
        with torch.no_grad():
            logits: Tensor = self.forward(token, start)
        return logits


def why_not_compiled(cache: TLSCache, device: torch.device) -> str | None:
    """What keeps a cache from the compiled step on ``device``; None if nothing does."""
    if cache.cfg.index != "lowrank":
        return f"the compiled step scores token labels, index='lowrank', got index={cache.cfg.index!r}"
    if any(layer.window is not None for layer in cache.tls_layers):
        return "the compiled step has no sliding windows, which this model's layers have"
    if cache.auditor is not None:
        return "the compiled step compares no selection with its true attention, which audit_every asks for"
    return why_not_here(device)


def _to_host(token: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event that says when it has arrived."""
    if not token.is_cuda:
        return token.clone(), None
    copy = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
    copy.copy_(token, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    event.record()
    return copy, event


def _positions(mask: Tensor | None, first: int, end: int, ids: Tensor) -> Tensor:
    """Positions int64 [B, end - first], from 0 at each row's first token."""
    if mask is None:
        return torch.arange(first, end, device=ids.device).expand(ids.shape[0], -1)
    return (mask[:, :end].long().cumsum(1) - 1).clamp_min(0)[:, first:]


def _progress(total: int, shown: bool) -> Any:
    # transformers needs tqdm
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

    return tqdm(total=total, desc="reading the prompt", unit="tok", disable=not shown)
