"""What the commands print: tables, and the machine that measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .compare import Comparison


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


def megabytes(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{n_bytes / 1e6:,.1f} MB"


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
        f"layers 0-{cfg.dense_layers - 1} dense; {len(result.sparse.step_ms)} steps timed; "
        f"prefill {result.prefill_seconds:.1f} s; first compiled step {result.compile_seconds:.1f} s",
        highlight=False,
    )
    console.print(" · ".join(f"{k} {v}" for k, v in hardware().items() if v is not None), highlight=False)
