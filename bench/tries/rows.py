"""Rows of tries, and their table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flex_tls import jsonl
from flex_tls.evaluate.bootstrap import mean_interval, ratio_interval

from ..corpus import HALVES

BASE = "ours"


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Two rows of one key measured the same thing."""
    budgets = row["config"]["block_size"], row["config"]["block_budget"], row["config"]["token_budget"]
    return row["model"], row["context_tokens"], row["score_tokens"], *budgets, row["try"], row["digest"]


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of a file."""
    return jsonl.read(path, _row, "expected a row of `python -m bench run tries`")


def _row(found: dict[str, Any]) -> dict[str, Any]:
    key_of(found)
    return found


def level1_bytes(row: dict[str, Any]) -> float:
    """What level 1 reads for a token of the context; whole labels in rows from before this was a field."""
    return float(row.get("level1_bytes", row["label_bytes"]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a budget and try: KL, and its ratio to ours on the same documents, with 95 % intervals."""
    head = (
        "blocks of, blocks, tokens",
        "try",
        "label bytes",
        "at level 1",
        "kept blocks",
        "kept tokens",
        "KL",
        "/ ours",
        *HALVES,
        "documents",
    )
    lines = [head, ("---",) * len(head)]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key_of(row)[:-1], {})[row["digest"]] = row
    for key, found in groups.items():
        base = groups.get((*key[:-1], BASE), {})
        cfg = next(iter(found.values()))["config"]
        kept = (math.fsum(row[x] for row in found.values()) / len(found) for x in ("kept_blocks", "kept_tokens"))
        kl = mean_interval([row["kl"] for row in found.values()])
        ratios = []
        for halves in (HALVES, *((half,) for half in HALVES)):
            both = [x for x, row in found.items() if x in base and (len(halves) > 1 or row["half"] in halves)]
            ratio = ratio_interval([found[x]["kl"] for x in both], [base[x]["kl"] for x in both]) if both else None
            ratios.append(f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "")
        lines.append(
            (
                f"{cfg['block_size']}, {cfg['block_budget']:,}, {cfg['token_budget']:,}",
                f"`{key[-1]}`",
                str(next(iter(found.values()))["label_bytes"]),
                f"{level1_bytes(next(iter(found.values()))):g}",
                *(f"{x:.1f}" for x in kept),
                f"{kl.mean:.4f} ({kl.low:.4f}-{kl.high:.4f})",
                *ratios,
                str(len(found)),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
