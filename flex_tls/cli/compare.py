"""One prompt, read once, answered with full attention and with two-level attention, with the figures that matter."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..cache import TLSCache
from ..config import TLSConfig
from ..evaluate.prefilled import dynamic_copy
from ..integrations.huggingface import disable, enable, end_of_sequence_ids
from ..offload import LayerStats, OffloadConfig
from ..record import Record, Recorder
from .stats import LiveStats

PREFILL_CHUNK = 1024


@dataclass
class Run:
    """One decoding: its text, token ids, and milliseconds of every step after the first."""

    text: str
    token_ids: list[int]
    step_ms: list[float]
    logits: Tensor = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Figures for the report; steps are timed one by one on the host, after the device is done."""
        steps = torch.tensor(self.step_ms)
        low, median, high = (float(steps.quantile(p)) for p in (0.1, 0.5, 0.9))
        return {
            "text": self.text,
            "steps_timed": len(self.step_ms),
            "ms_per_token_median": median,
            "ms_per_token_p10": low,
            "ms_per_token_p90": high,
            "tokens_per_second": 1000 / median,
        }


@dataclass
class Comparison:
    """Everything that ``demo`` and ``generate`` report; ``dense`` and what compares with it may not have been run."""

    cfg: TLSConfig
    prompt_tokens: int
    prefill_seconds: float
    compile_seconds: float
    index_bytes: int
    kv_bytes: int
    sparse: Run
    dense: Run | None
    agreement: float | None
    kl: float | None
    record: Record
    # Of the offload engine, while the sparse run decoded; empty without offload
    offload: dict[int, LayerStats]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        record = self.record
        return {
            "config": asdict(self.cfg),
            "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": self.prefill_seconds,
            "compile_seconds": self.compile_seconds,
            "index_bytes": self.index_bytes,
            "kv_bytes": self.kv_bytes,
            "two_level": self.sparse.summary(),
            "dense": None if self.dense is None else self.dense.summary(),
            "top1_agreement": self.agreement,
            "kl_dense_to_two_level": self.kl,
            "kept_mass_mean": record.mean_kept_mass,
            "kept_mass_per_layer": {layer: float(mass.mean()) for layer, mass in record.kept_mass.items()},
            "locality_mean": record.mean_locality,
            "kv_bytes_read_per_token": record.kv_bytes_read_per_token,
            "kv_bytes_dense_per_token": record.kv_bytes_dense_per_token,
            "index_bytes_read_per_token": record.index_bytes_read_per_token,
            "offload": {layer: asdict(stats) for layer, stats in self.offload.items()},
        }


@torch.no_grad()
def compare(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    cfg: TLSConfig,
    new_tokens: int,
    console: Console,
    dense: bool = True,
    offload: OffloadConfig | None = None,
    live_stats: bool = False,
) -> Comparison:
    """Read ids int64 [1, S] once, then decode ``new_tokens`` greedily per kind of attention.

    Agreement, KL(dense || two-level) and recall are teacher-forced: two-level attention is fed the tokens of the full
    one (its own if ``dense`` is off), so that one early difference does not count for every later token.
    End-of-sequence tokens are suppressed: both decode the same number of tokens. ``live_stats``: show what the offload
    engine does while two-level attention decodes.
    """
    n = ids.shape[1]
    cache = TLSCache(
        model.config, cfg, max_len=n + new_tokens + 1, dtype=model.dtype, device=model.device, offload=offload
    )
    banned = end_of_sequence_ids(model)

    def step(past: Any) -> Callable[[Tensor], Tensor]:
        return lambda token: model(token, past_key_values=past, logits_to_keep=1).logits[:, -1].float()

    enable(model)
    try:
        start = time.perf_counter()
        first = _prefill(step(cache), ids, console)
        prefill_seconds = time.perf_counter() - start
        other = dynamic_copy(cache, model.config) if dense else None
        with console.status("compiling the decode step (once per shape; up to a minute on a CPU)"):
            start = time.perf_counter()
            step(cache)(ids[:, -1:])
            compile_seconds = time.perf_counter() - start
        cache.crop(n)
        full = None
        if other is not None:
            disable(model)
            console.rule("full attention (sdpa)")
            full = _decode(step(other), first, new_tokens, banned, tokenizer, console, None)
            enable(model)
        console.rule("two-level attention")
        live = LiveStats(cache.stats, console) if live_stats and cache.offloaded_layers else None
        sparse = _decode(step(cache), first, new_tokens, banned, tokenizer, console, live)
        stats = cache.stats()
        cache.crop(n)
        cache.recorder = Recorder()
        forced = sparse if full is None else full
        again = _forced(step(cache), first, forced.token_ids, console)
        record = cache.recorder.result()
    finally:
        disable(model)
    agreement = kl = None
    if full is not None:
        agreement = float((full.logits.argmax(-1) == again.argmax(-1)).float().mean())
        log_p, log_q = full.logits.double().log_softmax(-1), again.double().log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return Comparison(
        cfg,
        n,
        prefill_seconds,
        compile_seconds,
        cache.index_nbytes,
        cache.kv_nbytes,
        sparse,
        full,
        agreement,
        kl,
        record,
        stats,
    )


def _prefill(run: Callable[[Tensor], Tensor], ids: Tensor, console: Console) -> Tensor:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading the prompt", total=ids.shape[1])
        for begin in range(0, ids.shape[1], PREFILL_CHUNK):
            chunk = ids[:, begin : begin + PREFILL_CHUNK]
            logits = run(chunk)
            bar.advance(task, chunk.shape[1])
    return logits


def _decode(
    run: Callable[[Tensor], Tensor],
    first: Tensor,
    n: int,
    banned: list[int],
    tokenizer: Any,
    console: Console,
    live: LiveStats | None,
) -> Run:
    """Greedy: n tokens, of which the first comes from the prompt's own logits ``first`` [1, V].

    The text is printed as it comes or, with ``live``, shown there and printed at the end.
    """
    token_ids: list[int] = []
    times: list[float] = []
    rows = [first]
    shown = ""
    with live or nullcontext():
        while True:
            allowed = rows[-1].clone()
            allowed[:, banned] = -torch.inf
            token = allowed.argmax(-1, keepdim=True)
            token_ids.append(int(token))
            text = tokenizer.decode(token_ids)
            if live is not None:
                live.show(text)
            # A character may still be in the making
            elif not text.endswith("\ufffd"):
                console.print(text[len(shown) :], end="", markup=False, highlight=False, soft_wrap=True)
                shown = text
            if len(token_ids) == n:
                break
            start = time.perf_counter()
            rows.append(run(token))
            if token.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
    console.print(text[len(shown) :], markup=False, highlight=False, soft_wrap=True)
    return Run(text, token_ids, times, torch.cat(rows).cpu())


def _forced(run: Callable[[Tensor], Tensor], first: Tensor, token_ids: list[int], console: Console) -> Tensor:
    """Logits [n, V] at the same places as :func:`_decode`'s, with given tokens."""
    with console.status("measuring agreement and kept mass on the same tokens"):
        rows = [run(torch.tensor([[token]], device=first.device)) for token in token_ids[:-1]]
    return torch.cat([first, *rows]).cpu()
