"""The report's sections on parts: an operator's two levels and attention, the index, the wait for a compiled step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .markdown import table
from .rows import FirstTokenRow, Row, latest, read

# An operator, the same without its first level, and without either
WHOLE, GIVEN_BLOCKS, GIVEN_TOKENS = "triton_total", "triton_given_blocks", "triton_given_tokens"
# What it costs to have an index: at a prompt, in every step, and in every n-th
INDEX = {
    "label_keys": "labels of the whole context, one layer",
    "fit": "projection and quantiser, one layer",
    "append": "one token's key, value and label, one layer",
    "audit": "one layer's audit",
}


def parts_sections(results: Path) -> Iterator[str]:
    """Sections on ``results``' rows."""
    yield from _levels(results)
    yield from _index(results)
    yield from _first_token(results)


def _levels(results: Path) -> Iterator[str]:
    yield "## What each level takes\n"
    command = "python -m bench run operator --suite budgets"
    runs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in read(results / "operator.jsonl"):
        if row.inputs == "rotated" and row.provider in (WHOLE, GIVEN_BLOCKS, GIVEN_TOKENS):
            runs.setdefault((row.gpu, row.case, row.commit), {})[row.provider] = row
    whole = {key: found for key, found in runs.items() if len(found) == 3}
    if not whole:
        yield f"No rows yet: `{command}`.\n"
        return
    yield (
        "Microseconds of one token's attention, by what is left when a choice is given: level 1 reads every token's "
        "label, level 2 those of the kept blocks, attention the kept tokens. Attention alone is a kernel of its own, "
        f"with more programs: level 2's column also has what attention costs more in the fused one. `{command}`\n"
    )
    lines = [("GPU", "case", "level 1", "level 2 and the rest", "attention alone", "all", "level 1, of all", "runs",
              "commit")]  # fmt: skip
    for (gpu, case, commit), found in whole.items():
        total, from_blocks, from_tokens = (found[p].median_us for p in (WHOLE, GIVEN_BLOCKS, GIVEN_TOKENS))
        lines.append((
            gpu, f"`{case}`", f"{total - from_blocks:.1f}", f"{from_blocks - from_tokens:.1f}", f"{from_tokens:.1f}",
            f"{total:.1f}", f"{1 - from_blocks / total:.0%}", str(found[WHOLE].runs), commit[:7],
        ))  # fmt: skip
    yield table(lines)


def _index(results: Path) -> Iterator[str]:
    yield "## What the index costs\n"
    command = "python -m bench run index"
    rows = [row for row in latest(read(results / "index.jsonl")) if row.provider in INDEX]
    if not rows:
        yield f"No rows yet: `{command}`.\n"
        return
    yield f"Fit and audit read the keys more than once. `{command}`\n"
    lines = [("GPU", "case", "what", "us (p10 to p90)", "of the read bandwidth", "runs", "commit")]
    lines += [
        (row.gpu, f"`{row.case}`", INDEX[row.provider],
         f"{row.median_us:,.1f} ({row.p10_us:,.1f} to {row.p90_us:,.1f})", f"{row.floor_us / row.median_us:.0%}",
         str(row.runs), row.commit[:7])
        for row in sorted(rows, key=lambda x: (x.gpu, x.B, x.S, list(INDEX).index(x.provider)))
    ]  # fmt: skip
    yield table(lines)


def _first_token(results: Path) -> Iterator[str]:
    yield "## The wait before the first compiled token\n"
    command = "python -m bench run first-token --contexts 8192"
    rows = read(results / "first-token.jsonl", FirstTokenRow)
    if not rows:
        yield f"No rows yet: `{command}`.\n"
        return
    newest = {(row.gpu, row.case, row.n_layers, row.B, row.context, row.provider): row for row in rows}
    yield (
        "Seconds from calling `tls.generate` in a new process, the model on the device; warm: Inductor's and Triton's "
        f"caches are those of a process before it. `{command}`\n"
    )
    lines = [("GPU", "model", "layers", "rows", "tokens", "caches", "seconds", "of them the prompt", "commit")]
    lines += [
        (row.gpu, row.case, str(row.n_layers), str(row.B), f"{row.context:,}", row.provider, f"{row.seconds:.1f}",
         f"{row.prompt_seconds:.1f}", row.commit[:7])
        for row in newest.values()
    ]  # fmt: skip
    yield table(lines)
