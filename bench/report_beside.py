"""The report's studies beside the main ones, each from a file of its own: one table each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flex_tls import jsonl
from flex_tls.evaluate import rows as evaluation
from flex_tls.evaluate.bootstrap import Interval, ratio_interval
from flex_tls.evaluate.rows import PplRow
from flex_tls.evaluate.sets import BASE
from flex_tls.evaluate.summary import PplSummary, kl_ratio, summarise_ppl

from . import markdown
from .report_commands import text_commands
from .report_targets import pair_of
from .tries.rows import level1_bytes

# Tries on fewer documents than this are in the rows alone
LEAST_DOCUMENTS = 8


class Study(NamedTuple):
    """A file of ``flex-tls eval ppl``: what it is about, and the options that made it."""

    title: str
    about: str
    options: str


STUDIES = {
    "rope.jsonl": Study(
        "Beyond the model's own positions",
        "Positions scaled by YaRN, dense and sparse alike: what is lost to dense attention at the same scaling.",
        "--rope yarn:2 --context-tokens 12288",
    ),
    "mixed.jsonl": Study(
        "Labels of mixed widths", "The first half or quarter of the channels in more bits than the rest.",
        "--methods ours,ours:label_bits=4+2,ours:label_bits=4+4+2+2,oracle",
    ),
    "shares.jsonl": Study(
        "Block budgets by layer",
        "Every layer's share of the block budget as `tls.measure_block_shares` found it on other documents.",
        "--methods ours,ours:block_shares=...,oracle",
    ),
}  # fmt: skip


def beside_sections(results: Path) -> Iterator[str]:
    """A section for each of :data:`STUDIES`, and the tries'."""
    for file, study in STUDIES.items():
        yield f"## {study.title}\n"
        rows = [row for row in evaluation.read(results / file) if isinstance(row, PplRow)]
        if not rows:
            yield f"No rows yet: `flex-tls eval ppl out/texts {study.options} --out bench/results/{file}`.\n"
            continue
        yield f"{study.about} `bench/results/{file}`, {_origin(rows)}: {text_commands('ppl', rows)}\n"
        yield markdown.table(_study(rows))
    yield from _tries(results)


def _origin(rows: Sequence[Any]) -> str:
    return ", ".join([*sorted({row.device for row in rows}), *sorted({row.commit[:7] for row in rows})])


def _study(rows: Sequence[PplRow]) -> list[tuple[str, ...]]:
    table = [("method", "blocks, tokens", "KL", "times `ours`", "times the oracle's", "perplexity / dense",
              "index, % of KV", "documents")]  # fmt: skip
    lines = [x for x in summarise_ppl(rows) if x.config is not None]
    for line in lines:
        assert line.config is not None
        beside = {x.method: x for x in lines if x.span == line.span and pair_of(x) == _pair(line, lines)}
        ratios = (_times(rows, line, beside.get(name)) for name in (BASE, "oracle"))
        table.append((
            f"`{_short(line.method)}`", f"{line.config['block_budget']:,}, {line.config['token_budget'] or 'all'}",
            markdown.interval(line.kl, 4), *ratios, markdown.interval(line.perplexity_ratio, 4),
            f"{100 * line.index_share:.1f}", str(line.n_documents),
        ))  # fmt: skip
    return table


def _pair(line: PplSummary, lines: Sequence[PplSummary]) -> tuple[int, int]:
    """Budgets of ours with as many tokens attended to: what ranks all tokens, or a window, has no block budget."""
    ours = [x for x in lines if x.method == BASE and x.kept_tokens == line.kept_tokens and x.span == line.span]
    return pair_of(ours[0] if ours else line)


def _times(rows: Sequence[PplRow], line: PplSummary, to: PplSummary | None) -> str:
    return "" if to is None or to == line else markdown.interval(kl_ratio(rows, line, to), 2)


def _short(method: str) -> str:
    """A method's name without the end of a list of thirty shares."""
    return method if len(method) < 60 else method[:50].rpartition("+")[0] + "+..."


def _tries(results: Path) -> Iterator[str]:
    yield "## Tried, not built as they are\n"
    command = "python -m bench run tries"
    found: list[dict[str, Any]] = jsonl.read(results / "tries.jsonl", dict, f"expected a row of {command}")
    if not found:
        yield f"No rows yet: `{command}`.\n"
        return
    groups: dict[tuple[int, int, int, int, str], dict[str, dict[str, Any]]] = {}
    for row in found:
        cfg = row["config"]
        key = (row["context_tokens"], cfg["block_budget"], cfg["token_budget"], cfg["block_size"], row["try"])
        groups.setdefault(key, {})[row["digest"]] = row
    first = found[0]
    yield (
        f"Patches over the package (`bench/README.md` names them): KL over that of `ours` on the same documents, at "
        f"least {LEAST_DOCUMENTS}; {first['score_tokens']} tokens scored. "
        f"`{command} --context {first['context_tokens']} --scored {first['score_tokens']}`, with `--context 7168`, "
        "`--block-size 16` and `--block-budget 1/8 --token-budget 1/16` where the table says so.\n"
    )
    table = [("try", "context", "block size", "blocks, tokens", "KL", "times `ours`", "on `confirming`",
              "bytes of a label", "at level 1", "blocks kept", "documents")]  # fmt: skip
    for (context, blocks, tokens, size, name), rows in groups.items():
        if len(rows) < LEAST_DOCUMENTS:
            continue
        ours = groups[context, blocks, tokens, size, BASE]
        held = {digest: row for digest, row in rows.items() if row["half"] == "confirming"}
        mean = {field: sum(row[field] for row in rows.values()) / len(rows) for field in ("kl", "kept_blocks")}
        table.append((
            f"`{name}`", f"{context:,}", str(size), f"{blocks:,}, {tokens}", f"{mean['kl']:.4f}",
            *("1" if name == BASE else markdown.interval(_ratio(x, ours), 2) if x else "" for x in (rows, held)),
            str(next(iter(rows.values()))["label_bytes"]), f"{level1_bytes(next(iter(rows.values()))):g}",
            f"{mean['kept_blocks']:.1f}", str(len(rows)),
        ))  # fmt: skip
    yield markdown.table(table)


def _ratio(rows: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> Interval:
    both = [digest for digest in rows if digest in ours]
    return ratio_interval([rows[x]["kl"] for x in both], [ours[x]["kl"] for x in both])
