"""``generate``: prefill in chunks, then one compiled step a token, on CUDA captured as one graph.

A step is the whole model, two-level attention, sampling and the stop test; only token ids leave the device, a few steps
behind, so that the host never stalls it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .cache import TLSCache
from .capture import captured
from .device import to_host
from .integrations.huggingface import enabled, end_of_sequence_ids
from .lookup import lookup_steps
from .notice import is_shown
from .prefill import read_prompt
from .sampling import Sampling
from .step import DecodeStep, why_not_compiled
from .stopping import Stops

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
    stop_strings: str | Sequence[str] = (),
    tokenizer: Any = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    streamer: Any = None,
    compiled: bool | None = None,
    prompt_lookup_tokens: int = 0,
    inductor_options: Mapping[str, Any] | None = None,
    chunk_tokens: int | None = None,
    progress: bool | None = None,
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
        stop_strings: end a row too, at the token that completes one, which is kept, as by transformers.
        tokenizer: the model's, for ``stop_strings``.
        pad_token_id: fills rows that ended; the model's, or its first stop token, by default.
        seed: of the sampling; torch's own generator by default.
        streamer: with ``put`` and ``end``, as transformers' streamers: gets ``input_ids`` [B, S] first, then int64 [B]
            per step, a few steps behind.
        compiled: one compiled step, on CUDA one graph; by default on CUDA. False runs the model's own forward.
        prompt_lookup_tokens: speculate: draft up to this many tokens from earlier in the text and check them in one
            forward, for one row. The output is the same, but for offload with ``policy="async"`` or ``"corrected"``:
            there a step leaves out what has not arrived, and the steps are others. Not compiled.
        inductor_options: ``options`` of ``torch.compile`` for the step, as ``{"coordinate_descent_tuning": True}``; a
            longer compilation for a faster step. They may change how sums are rounded.
        chunk_tokens: columns that one forward of the prefill reads, by default 16,384 over all B rows. They bound the
            memory that it takes beside the cache, about 100 kB a token of Qwen3-8B in bfloat16: 1.6 GB by default.
        progress: show a progress bar of the prefill, and how long the step has been compiling; by default if stderr is
            a terminal.

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
    if chunk_tokens is not None and chunk_tokens <= (fewest := cache.cfg.sparse_query_tokens):
        raise ValueError(
            f"chunk_tokens: expected more than sparse_query_tokens={fewest}, got {chunk_tokens}; so few attend sparsely"
        )
    drafted, shown = prompt_lookup_tokens, is_shown(progress)
    by_default = input_ids.is_cuda and not drafted
    compiled = by_default if compiled is None else compiled
    if compiled and (why := "prompt lookup is not compiled" if drafted else why_not_compiled(cache, input_ids.device)):
        raise ValueError(f"compiled: {why}; pass compiled=False")
    _check_drafts(drafted, cache)
    check_options(inductor_options)
    if stop_token_ids is None:
        stop_token_ids = end_of_sequence_ids(model)
    stop_ids = [stop_token_ids] if isinstance(stop_token_ids, int) else stop_token_ids
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    loop = Loop(
        model, cache, input_ids, sampling, Stops(input_ids, stop_ids, strings, tokenizer), pad_token_id=pad_token_id,
        seed=seed, inductor_options=inductor_options, progress=shown,
    )  # fmt: skip
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with torch.no_grad(), enabled(model):
        loop.next(read_prompt(model, cache, input_ids, attention_mask, chunk_tokens=chunk_tokens, progress=shown))
        n = max_new_tokens - 1
        steps = (
            loop.compiled_steps(n) if compiled else lookup_steps(loop, input_ids, n, drafted) if drafted
            else loop.eager_steps(n)
        )  # fmt: skip
        new = _collect(loop, steps, streamer).to(input_ids.device)
    cache.crop(n_given + new.shape[1] - 1)
    return torch.cat([input_ids, new], dim=1)


def _collect(loop: Loop, steps: Generator[Tensor, None, None], streamer: Any) -> Tensor:
    """Tokens int64 [B, n] of the prompt's own logits and of ``steps``, until all rows have ended."""
    tokens: list[Tensor] = []
    # Closed, however this ends, the steps account for what they ran ahead
    with closing(steps):
        for token, ended in chain([loop.report.to("cpu", copy=True)], steps):
            tokens.append(token)
            if streamer is not None:
                streamer.put(token)
            if bool(ended.all()):
                break
    if streamer is not None:
        streamer.end()
    return torch.stack(tokens, 1)


class Loop:
    """Decoding state on the device.

    Attributes:
        token: int64 [B, 1], the next token.
        start: int64 [B], tokens that each row holds.
        ended: bool [B], rows that ended.
        report: int64 [2, B], what the host reads of a step: its token, and whether the row has ended.
        seen: bool [B, V], tokens that occurred; None unless sampling asks for it.
        queries: [B, HQ, 1, D] a layer, of the last compiled step; empty unless the cache is audited.
    """

    def __init__(
        self, model: Any, cache: TLSCache, ids: Tensor, sampling: Sampling | None = None, stops: Stops | None = None, *,
        pad_token_id: int | None = None, seed: int | None = None, inductor_options: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.sampling = model, cache, sampling or Sampling()
        self.stops = stops or Stops(ids, [])
        self.options, self.progress = dict(inductor_options or {}), progress
        device, b = ids.device, ids.shape[0]
        self.token = torch.zeros(b, 1, dtype=torch.int64, device=device)
        self.start = torch.zeros(b, dtype=torch.int64, device=device)
        self.ended = torch.zeros(b, dtype=torch.bool, device=device)
        self.report = torch.zeros(2, b, dtype=torch.int64, device=device)
        own, first = model.generation_config.pad_token_id, self.stops.token_ids[:1].tolist()
        choices = [pad_token_id, own if isinstance(own, int) else None, *first, 0]
        self.pad: int = next(x for x in choices if x is not None)
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self.queries: list[Tensor] = []
        self.seen: Tensor | None = None
        if self.sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(b, model.config.vocab_size, dtype=torch.bool, device=device)
            self.seen.scatter_(1, ids, True)

    def eager_steps(self, n: int) -> Generator[Tensor, None, None]:
        """``n`` steps of the model's own forward; yields each one's report int64 [2, B] on the host."""
        for _ in range(n):
            position = torch.tensor(self.cache.seq_lens, device=self.token.device)[:, None]
            logits = self.model(
                self.token, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # fmt: skip
            self.next(logits)
            yield self.report.to("cpu", copy=True)

    def compiled_steps(self, n: int) -> Generator[Tensor, None, None]:
        """As :meth:`eager_steps`, compiled; on CUDA the host is up to LAG steps behind the device.

        An audit is no part of the step: it follows one, of which it needs one layer's queries. Steps that ran ahead of
        the end are audited too.
        """
        cache, cfg, auditor = self.cache, self.cache.cfg, self.cache.auditor
        cache.fit_where_due()
        if n and not cache.prepare():
            yield from self.eager_steps(1)
            n -= 1
            cache.fit_where_due()
        cache.join()
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
                        cache.fit_where_due()
                        refit_at = cache.refit_at_tokens
                    if run is None or now_sparse != sparse:
                        run, sparse = self.build(now_sparse), now_sparse
                    if auditor is not None:
                        auditor.count_step()
                    run()
                    done += 1
                    longest += 1
                    waiting.append(to_host(self.report))
                    if auditor is not None and auditor.due is not None and sparse:
                        cache.advance(done - counted)
                        counted = done
                        cache.audit(self.queries)
                if done == n or len(waiting) > LAG:
                    report, event = waiting.pop(0)
                    if event is not None:
                        event.synchronize()
                    yield report
        finally:
            cache.advance(done - counted)

    def next(self, logits: Tensor) -> None:
        """Draw from logits [B, V] and note the token."""
        token = self.sampling.draw(logits, self.seen, self.generator)
        token = torch.where(self.ended, self.pad, token)
        self.token.copy_(token[:, None])
        self.ended |= self.stops.ends(token)
        self.report.copy_(torch.stack([token, self.ended.long()]))
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)

    def build(self, sparse: bool) -> Callable[[], None]:
        """A function that runs one step: compiled, and on CUDA one graph replay."""
        step = DecodeStep.of(self.model, self.cache, sparse, self.options)
        self.queries = step.queries

        def run() -> None:
            self.next(step(self.token, self.start, self.progress))
            self.start += 1

        if not self.token.is_cuda:
            return run
        state = [self.token, self.start, self.ended, self.report, self.seen, self.stops.tail, *self.cache.counters]
        return captured(run, [x for x in state if x is not None], self.generator, self.cache.rejoin)


def check_options(options: Mapping[str, Any] | None) -> None:
    """Raise ValueError for ``inductor_options`` that Inductor does not know."""
    try:
        torch.compile(lambda: None, options=dict(options or {}))
    except RuntimeError as error:
        raise ValueError(f"inductor_options: expected options of torch.compile, got {options}: {error}") from error


def _check_drafts(n: int, cache: TLSCache) -> None:
    most = cache.cfg.sparse_query_tokens - 1
    if not 0 <= n <= most:
        raise ValueError(
            f"prompt_lookup_tokens: expected 0 to {most}, so that drafts and their token are a step of at most "
            f"sparse_query_tokens={most + 1}, got {n}; a longer chunk attends densely"
        )
    if n and cache.batch_size != 1:
        raise ValueError(f"prompt_lookup_tokens: expected a cache of one row, got batch_size={cache.batch_size}")
