"""The commands under the report's figures, read off the rows that these are of: counts, budgets, methods, tasks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from flex_tls.config import TLSConfig
from flex_tls.evaluate.rows import AnswerRow, AttentionRow, PplRow
from flex_tls.evaluate.sets import BASE, SETS
from flex_tls.evaluate.tasks import TASKS

from .corpus import HALVES

# What a set of methods is called as a command
COMMANDS = {"compare": "comparison", "ablate": "ablation", "frontier": "frontier"}


def text_commands(name: str, rows: Sequence[PplRow] | Sequence[AttentionRow]) -> str:
    """The ``flex-tls eval NAME`` that gave ``rows``, one for each span of tokens and model.

    A command of :data:`COMMANDS` is followed by the methods that its set lacks: these were an ``eval ppl``.
    """
    found = []
    for _, group in _groups(rows, lambda r: (r.model, r.dtype, r.context_tokens, r.score_tokens)):
        first, documents = group[0], {row.document for row in group}
        halves = {document.partition("/")[0] for document in documents}
        folder = f"out/texts/{min(halves)}" if len(halves) == 1 and halves <= set(HALVES) else "out/texts"
        _, scaled, rope = first.model.partition(", RoPE ")
        options = (
            f"{folder} --documents {len(documents)} --context-tokens {first.context_tokens} --score-tokens "
            f"{first.score_tokens} --dtype {first.dtype}{_budgets(group)}" + f" --rope {rope}" * bool(scaled)
        )
        methods = _unique(row.method for row in group)
        members = {"dense", *(SETS[COMMANDS[name]] if name in COMMANDS else ())}
        # Some members are no set
        whole = len(members.intersection(methods)) > len(members) / 2
        others = ",".join(x for x in methods if x not in (members if whole else {"dense"}))
        if name not in COMMANDS:
            found.append(f"`flex-tls eval {name} {options} --methods {others}`")
        elif whole:
            found.append(f"`flex-tls eval {name} {options}`")
            if others:
                found[-1] += f", as `eval ppl` with `--methods {others}`"
        elif others:
            found.append(f"`flex-tls eval ppl {options} --methods {others}`")
    return "; ".join(found)


def retrieval_commands(rows: Sequence[AnswerRow]) -> str:
    """The ``flex-tls eval retrieval`` that gave ``rows``: one for each length and set of methods that tasks share."""
    methods = {
        key: ",".join(_unique(row.method for row in group))
        for key, group in _groups(rows, lambda r: (r.length_tokens, r.task, r.depth is None))
    }
    found = []
    for (length, names), group in _groups(
        rows, lambda r: (r.length_tokens, methods[r.length_tokens, r.task, r.depth is None])
    ):
        tasks = _unique(row.task for row in group)
        samples = max(len({row.seed for row in group if row.task == task}) for task in tasks)
        depths = ",".join(f"{d:g}" for d in sorted({row.depth for row in group if row.depth is not None}))
        found.append(
            f"`flex-tls eval retrieval --length {length} --samples {samples}"
            + f" --tasks {','.join(tasks)}" * (set(tasks) != set(TASKS))
            + f" --depth {depths}" * bool(depths)
            + f" --methods {names} --dtype {group[0].dtype}{_budgets(group)}`"
        )
    return "; ".join(found)


def _budgets(rows: Sequence[Any]) -> str:
    """Budgets, and other blocks than the default's, that methods were made from: ours, else the one that came first."""
    sparse = [row for row in rows if row.config is not None]
    names = [row.method for row in sparse]
    name = BASE if BASE in names else names[0] if names else ""
    pairs = _unique(
        (row.config["block_budget"], row.config["token_budget"] or "all") for row in sparse if row.method == name
    )
    blocks, tokens = (",".join(str(pair[i]) for pair in pairs) for i in (0, 1))
    sizes = {row.config["block_size"] for row in sparse if row.method == name and "block_size=" not in name}
    size = "".join(f" --block-size {n}" for n in sizes - {TLSConfig.block_size})
    return f" --block-budget {blocks} --token-budget {tokens}{size}" if pairs else ""


def _groups(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    groups: dict[Hashable, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
