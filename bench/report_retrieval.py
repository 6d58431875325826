"""The report's sections on answers: retrieval, by task and on average, and needles in planted contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flex_tls import jsonl
from flex_tls.cli.plots import plot_depths
from flex_tls.evaluate.rows import AnswerRow, Row
from flex_tls.evaluate.summary import summarise_losses, summarise_retrieval
from flex_tls.evaluate.tasks import TASKS

from . import markdown
from .report_commands import retrieval_commands


def retrieval_section(found: Sequence[Row], pictures: Path, base: Path) -> Iterator[str]:
    """Losses on average and by task; a map over depth and length where rows have depths."""
    yield "## Retrieval\n"
    command = "flex-tls eval retrieval --length 4096,7936 --samples 20 --dtype float32"
    rows = [row for row in found if isinstance(row, AnswerRow)]
    if not rows:
        yield f"No rows yet: `{command} --out bench/results/accuracy-retrieval.jsonl`.\n"
        yield "With `--depth 0,0.25,0.5,0.75,1` also a map of scores over depth and length.\n"
        return
    yield f"RULER's tasks. {retrieval_commands([row for row in rows if row.eval == 'retrieval'])}\n"
    yield from _average(rows)
    lines = summarise_retrieval(rows)
    if any(line.depth is not None for line in lines):
        path = pictures / "depths.svg"
        plot_depths(lines, path)
        yield f"![Score over depth and length]({markdown.link(path, base)})\n"
    yield from _by_index(rows)
    table = [("task", "tokens", "depth", "method", "kept", "score", "dense less this", "samples")]
    table += [
        (x.task, f"{x.length_tokens:,}", "" if x.depth is None else f"{x.depth:g}", f"`{x.method}`",
         f"{x.kept_tokens:,}", markdown.percent(x.score),
         "" if x.loss is None or x.config is None else markdown.percent(x.loss), str(x.n_samples))
        for x in lines
    ]  # fmt: skip
    yield "By task:\n"
    yield markdown.table(table)


def _average(rows: Sequence[AnswerRow]) -> Iterator[str]:
    lines = summarise_losses(rows)
    if not lines:
        return
    yield (
        "What is lost to dense attention on average of the tasks, which count alike; intervals draw samples again "
        "within each task:\n"
    )
    table = [("tokens", "method", "kept", "dense", "dense less this", "samples", "tasks")]
    for x in lines:
        names = f"all {len(TASKS)}" if set(x.tasks) == set(TASKS) else ", ".join(x.tasks)
        table.append((
            f"{x.length_tokens:,}", f"`{x.method}`", f"{x.kept_tokens:,}", markdown.percent(x.dense),
            markdown.percent(x.loss), str(x.n_samples), names,
        ))  # fmt: skip
    yield markdown.table(table)


def _by_index(rows: Sequence[AnswerRow]) -> Iterator[str]:
    """Needles at chosen depths, of the questions that dense attention answered too, by the bytes of the index."""
    lines = summarise_losses(rows, at_depths=True)
    if not lines:
        return
    yield (
        "Needles at chosen depths by the bytes of the index, means of the tasks, which count alike; intervals draw "
        "samples again within each task:\n"
    )
    table = [("model", "tokens", "index, % of KV", "read, % of KV", "method", "score", "dense less this", "samples",
              "tasks")]  # fmt: skip
    table += [
        (f"{Path(x.model).name}, {x.dtype}", f"{x.length_tokens:,}", f"{100 * x.index_share:.1f}",
         f"{100 * x.read_share:.1f}", f"`{x.method}`", markdown.percent(x.score), markdown.percent(x.loss),
         str(x.n_samples), ", ".join(x.tasks))
        for x in sorted(lines, key=lambda x: (x.model, x.dtype, x.length_tokens, x.index_share, x.method))
    ]  # fmt: skip
    yield markdown.table(table)


def synthetic_section(results: Path) -> Iterator[str]:
    """What selections hold of planted attention."""
    yield "## Long contexts, planted structure\n"
    command = "python -m bench run synthetic"
    found: list[dict[str, Any]] = jsonl.read(results / "synthetic.jsonl", dict, f"expected a row of {command}")
    if not found:
        yield f"No rows yet: `{command}`.\n"
        return
    for size in sorted({row["config"]["block_size"] for row in found}):
        yield from _planted([row for row in found if row["config"]["block_size"] == size], command)


def _planted(found: list[dict[str, Any]], command: str) -> Iterator[str]:
    """Rows in blocks of one size."""
    first = found[0]
    cfg = first["config"]
    options = (
        f"--context {','.join(str(s) for s in sorted({row['S'] for row in found}))} "
        f"--block-budget {cfg['block_budget']} --token-budget {cfg['token_budget']} "
        f"--block-size {cfg['block_size']} --kv-heads {first['HKV']} "
        f"--seeds {len({row['seed'] for row in found})}"
    )
    yield (
        f"Keys and queries are made (`bench/synthetic.py`), head dimension {first['D']}, blocks of "
        f"{cfg['block_size']}: power-law attention along 48 directions, drifting topics, and a needle a query that "
        f"takes half of its attention. Means over seeds, {first['HKV']} KV heads and {first['queries']} queries. "
        f"`{command} {options}`, on {first['gpu']}, commit "
        f"{', '.join(sorted({row['commit'][:7] for row in found}))}.\n"
    )
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in found:
        cfg = row["config"]
        kept = f"{cfg['block_budget']:,}, {cfg['token_budget'] or 'all'}"
        groups.setdefault((row["S"], row["method"], kept), []).append(row)
    fields = ("mass_blocks", "mass_tokens", "heavy_blocks", "heavy_tokens", "needles")
    table = [("tokens", "method", "blocks, tokens", "mass in blocks", "mass on tokens", "heavy in blocks",
              "heavy among tokens", "needles found", "read, % of KV", "seeds")]  # fmt: skip
    for (s, method, kept), rows in sorted(groups.items(), key=lambda x: x[0][0]):
        shares = (f"{sum(row[field] for row in rows) / len(rows):.1%}" for field in fields)
        table.append((f"{s:,}", f"`{method}`", kept, *shares, f"{100 * rows[0]['read_share']:.1f}", str(len(rows))))
    yield markdown.table(table)
