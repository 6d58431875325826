"""``flex-tls eval retrieval``: RULER's tasks, made on the spot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..evaluate import rows
from ..evaluate.methods import Method
from ..evaluate.retrieval import answer, haystack, make_question
from ..evaluate.summary import summarise_retrieval
from ..evaluate.tasks import TASKS
from .evaluate_common import (
    DEFAULT_METHODS,
    BackendName,
    BlockBudgets,
    BlockSize,
    Commit,
    Device,
    Dtype,
    JsonFile,
    Methods,
    ModelName,
    RowsFile,
    TokenBudgets,
    as_backend,
    check_positions,
    chosen_methods,
    load_for_rows,
    progress_bar,
    write_summary,
)
from .report import print_retrieval, reported


def retrieval(
    model_name: ModelName = None,
    tasks: Annotated[str, typer.Option(help=f"Names, comma-separated, of: {', '.join(TASKS)}.")] = ",".join(TASKS),
    length: Annotated[str, typer.Option(help="Tokens of a prompt, comma-separated.")] = "4096",
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task and length.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first sample; the next ones count up.")] = 0,
    depth: Annotated[
        str | None, typer.Option(help="Where needles lie, comma-separated: 0,0.5,1; random by default.")
    ] = None,
    haystack_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--haystack", exists=True, help="Text to hide needles in; Python's language reference by default."
        ),
    ] = None,
    methods: Methods = "dense," + DEFAULT_METHODS,
    block_budget: BlockBudgets = "1/4",
    token_budget: TokenBudgets = "1/8",
    block_size: BlockSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: BackendName = "auto",
    out: RowsFile = None,
    commit: Commit = None,
    json_file: JsonFile = None,
) -> None:
    """Needles, tracked variables, counted words and copied passages after RULER, made on the spot at any length."""
    console = Console()
    with reported(console):
        names = tasks.split(",")
        unknown = sorted(set(names) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown)}")
        lengths = [int(n) for n in length.split(",")]
        depths = [None] if depth is None else [float(d) for d in depth.split(",")]
        room = max(TASKS[name].max_new_tokens for name in names)
        chosen = {
            n: chosen_methods(methods, n, n + room, block_budget, token_budget, block_size, console) for n in lengths
        }
        model, tokenizer, origin = load_for_rows(model_name, device, dtype, backend, commit, console)
        check_positions(model, max(lengths) + room)
        sentences = haystack(haystack_files or [])
        template = rows.text_digest(tokenizer.chat_template or "")
        seen = {row.key: row for row in (rows.read(out) if out else []) if isinstance(row, rows.RetrievalRow)}
        with console.status("making the samples"):
            questions = [
                make_question(name, tokenizer, n, seed + i, sentences, d)
                for n in lengths
                for name in names
                for d in (depths if TASKS[name].has_depth else [None])
                for i in range(samples)
            ]

        def key(digest: str, method: Method) -> rows.Key:
            return rows.key_of(origin, "retrieval", digest, method.name, method.config)

        wanted = [(q, m) for q in questions for m in chosen[q.length_tokens]]
        with progress_bar(console, sum(key(q.digest, m) not in seen for q, m in wanted)) as advance:
            for question in questions:
                missing = [m for m in chosen[question.length_tokens] if key(question.digest, m) not in seen]
                if not missing:
                    continue
                for method, found in answer(model, tokenizer, question, missing, backend=as_backend(backend)):
                    row = rows.RetrievalRow(
                        eval="retrieval", **asdict(origin), method=method.name, config=method.config,
                        digest=question.digest, task=question.task, length_tokens=question.length_tokens,
                        prompt_tokens=len(question.token_ids), depth=question.depth, seed=question.seed,
                        template=template, references=list(question.sample.references), **found._asdict(),
                    )  # fmt: skip
                    if out is not None:
                        rows.append(out, [row])
                    seen[row.key] = row
                    advance(f"{question.task}, {method.name}")
        lines = summarise_retrieval([seen[key(q.digest, m)] for q, m in wanted])
    print_retrieval(lines, console)
    write_summary(json_file, lines)
