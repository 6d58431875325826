"""What the commands print: tables, and the machine that measured."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..attention import BackendUnavailable
from ..evaluate.bootstrap import Interval
from ..evaluate.summary import AttentionSummary, PplSummary, RetrievalSummary
from .compare import Comparison
from .stats import megabytes


def hardware() -> dict[str, Any]:
    """What measured: processor, threads, GPU, versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def reported(console: Console) -> Iterator[None]:
    """What the user can mend is said in a line."""
    try:
        yield
    except (ValueError, MemoryError, BackendUnavailable) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def print_comparison(result: Comparison, console: Console) -> None:
    """The figures of one comparison as a table, with the machine below."""
    cfg, record = result.cfg, result.record
    table = Table(title=f"{result.prompt_tokens:,} prompt tokens", title_justify="left")
    table.add_column("")
    table.add_column("two-level", justify="right")
    table.add_column("full (sdpa)", justify="right")

    def row(name: str, sparse: str, dense: str = "") -> None:
        table.add_row(name, sparse, dense if result.dense is not None else "")

    ours = result.sparse.summary()
    full = result.dense.summary() if result.dense is not None else None
    row(
        "ms per token: median (p10-p90)",
        "{ms_per_token_median:.1f} ({ms_per_token_p10:.1f}-{ms_per_token_p90:.1f})".format(**ours),
        ""
        if full is None
        else "{ms_per_token_median:.1f} ({ms_per_token_p10:.1f}-{ms_per_token_p90:.1f})".format(**full),
    )
    row(
        "tokens per second",
        f"{ours['tokens_per_second']:.1f}",
        "" if full is None else f"{full['tokens_per_second']:.1f}",
    )
    row(
        "KV bytes read per token",
        megabytes(record.kv_bytes_read_per_token),
        megabytes(record.kv_bytes_dense_per_token),
    )
    row("index bytes read per token", megabytes(record.index_bytes_read_per_token))
    row("index bytes held", f"{megabytes(result.index_bytes)} of {megabytes(result.kv_bytes)} KV")
    if result.agreement is not None and result.kl is not None:
        row("top-1 agreement with full attention", f"{result.agreement:.1%}")
        row("KL(full || two-level) per token", f"{result.kl:.4f}")
    row("attention mass kept, mean of sparse layers", f"{record.mean_kept_mass:.1%}")
    worst = min(record.layers, key=lambda layer: float(record.kept_mass[layer].mean()), default=None)
    if worst is not None:
        row(f"attention mass kept, worst layer ({worst})", f"{float(record.kept_mass[worst].mean()):.1%}")
    row("blocks that the step before selected too", f"{record.mean_locality:.1%}")
    console.print()
    console.print(table)
    tokens = "every token" if cfg.token_budget is None else f"{cfg.token_budget:,} tokens"
    console.print(
        f"kept per KV head: {cfg.block_budget:,} tokens of blocks of {cfg.block_size}, then {tokens}; "
        f"dense layers: {cfg.dense_layers}; {len(result.sparse.step_ms)} steps timed; "
        f"prefill {result.prefill_seconds:.1f} s; first compiled step {result.compile_seconds:.1f} s",
        highlight=False,
    )
    _print_machine(console)


def print_ppl(lines: Sequence[PplSummary], console: Console) -> None:
    """One line a method, with 95% intervals over documents, and the machine below."""
    names = ("method", "blocks", "tokens", "KL(dense ||)", "ppl/dense", "agreement", "index", "read")
    table = _table(names)
    for line in (x for x in lines if x.config is not None):
        assert line.config is not None
        cells = [line.method, f"{line.config['block_budget']:,}", f"{line.kept_tokens:,}"]
        cells += [_interval(line.kl, ".4f"), _interval(line.perplexity_ratio, ".4f"), _interval(line.agreement, ".1%")]
        cells += [f"{line.index_share:.1%}", f"{line.read_share:.1%}"]
        table.add_row(*cells)
    console.print(table)
    for line in (x for x in lines if x.config is None):
        console.print(
            f"dense: perplexity {line.perplexity:.3f}, {line.score_tokens:,} tokens in {line.n_documents} documents, "
            f"after {line.context_tokens:,} each",
            highlight=False,
        )
    _print_machine(console)


def print_attention(lines: Sequence[AttentionSummary], console: Console) -> None:
    """One line a method: what the kept blocks and tokens hold of full attention, and the machine below."""
    names = ("method", "blocks", "tokens", "mass in blocks", "in tokens", "heavy in blocks", "in tokens", "locality")
    table = _table(names)
    for line in lines:
        assert line.config is not None
        figures = (line.mass_blocks, line.mass_tokens, line.heavy_blocks, line.heavy_tokens, line.locality)
        cells = (line.method, f"{line.config['block_budget']:,}", f"{line.config['token_budget'] or 'all'}")
        table.add_row(*cells, *(_interval(x, ".1%") for x in figures))
    console.print(table)
    for line in lines:
        console.print(
            f"{line.method}: fewest heavy tokens in blocks in layer {line.worst_layer}, {line.worst_heavy_blocks:.1%}; "
            f"{line.n_documents} documents, after {line.context_tokens:,} tokens each",
            highlight=False,
        )
    _print_machine(console)


def print_retrieval(lines: Sequence[RetrievalSummary], console: Console) -> None:
    """One line a task and method, with 95% intervals over samples, and the machine below."""
    table = _table(("task", "length", "depth", "method", "tokens", "score", "dense less this"))
    for line in lines:
        depth = "" if line.depth is None else f"{line.depth:g}"
        loss = "" if line.loss is None or line.config is None else _interval(line.loss, ".1%")
        cells = (line.task, f"{line.length_tokens:,}", depth, line.method, f"{line.kept_tokens:,}")
        table.add_row(*cells, _interval(line.score, ".1%"), loss)
    console.print(table)
    console.print(f"score: share of references found, {lines[0].n_samples} samples a line", highlight=False)
    _print_machine(console)


def _table(names: Sequence[str]) -> Table:
    """Narrow enough for 80 characters with every interval below its mean."""
    table = Table(title="95% bootstrap intervals", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="left" if name in ("task", "method") else "right", no_wrap=name == "method")
    return table


def _print_machine(console: Console) -> None:
    console.print(" · ".join(f"{k} {v}" for k, v in hardware().items() if v is not None), highlight=False)


def _interval(x: Interval, form: str) -> str:
    """The mean and, below it, its interval if it has one."""
    return f"{x.mean:{form}}" if math.isnan(x.low) else f"{x.mean:{form}}\n{x.low:{form}}-{x.high:{form}}"
