"""``flex-tls eval retrieval`` and ``tasks``: questions made on the spot after RULER, or from LongBench's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..attention import Backend
from ..evaluate import rows
from ..evaluate.longbench import read_questions
from ..evaluate.methods import Method
from ..evaluate.retrieval import Question, answer, haystack, make_question
from ..evaluate.summary import summarise_retrieval
from ..evaluate.tasks import TASKS
from .evaluate_common import (
    DEFAULT_METHODS,
    BackendName,
    BlockBudgets,
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
from .options import BLOCK_SIZE, BlockSize
from .report import print_retrieval, reported


def retrieval(
    model_name: ModelName = None,
    task_names: Annotated[
        str, typer.Option("--tasks", help=f"Names, comma-separated, of: {', '.join(TASKS)}.")
    ] = ",".join(TASKS),
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
    block_size: BlockSize = BLOCK_SIZE,
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
        names = task_names.split(",")
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
        with console.status("making the samples"):
            questions = [
                make_question(name, tokenizer, n, seed + i, sentences, d)
                for n in lengths
                for name in names
                for d in (depths if TASKS[name].has_depth else [None])
                for i in range(samples)
            ]

        wanted = [(q, m) for q in questions for m in chosen[q.length_tokens]]
        found = _answered("retrieval", wanted, model, tokenizer, origin, as_backend(backend), out, console)
        lines = summarise_retrieval(found)
    print_retrieval(lines, console)
    write_summary(json_file, lines)


def tasks(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="JSONL files in LongBench's format.")
    ],
    model_name: ModelName = None,
    length: Annotated[int, typer.Option(min=2, help="Longest prompt in tokens; longer ones lose their middle.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Questions of each file, at most.")] = 20,
    prompts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="LongBench's dataset2prompt.json; ours otherwise.")
    ] = None,
    methods: Methods = "dense," + DEFAULT_METHODS,
    block_budget: BlockBudgets = "1/4",
    token_budget: TokenBudgets = "1/8",
    block_size: BlockSize = BLOCK_SIZE,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: BackendName = "auto",
    out: RowsFile = None,
    commit: Commit = None,
    json_file: JsonFile = None,
) -> None:
    """Questions of LongBench or in its format, from files, with its metrics."""
    console = Console()
    with reported(console):
        templates = None if prompts is None else json.loads(prompts.read_text(encoding="utf-8"))
        model, tokenizer, origin = load_for_rows(model_name, device, dtype, backend, commit, console)
        questions = [q for path in files for q in read_questions(path, tokenizer, length, samples, templates)]
        if not questions:
            raise ValueError("files: expected questions, got none; the files are empty")
        longest = length + max(q.max_new_tokens for q in questions)
        chosen = chosen_methods(methods, length, longest, block_budget, token_budget, block_size, console)
        check_positions(model, longest)
        wanted = [(q, m) for q in questions for m in chosen]
        lines = summarise_retrieval(
            _answered("tasks", wanted, model, tokenizer, origin, as_backend(backend), out, console)
        )
    print_retrieval(lines, console)
    write_summary(json_file, lines)


def _answered(
    kind: str,
    wanted: Sequence[tuple[Question, Method]],
    model: Any,
    tokenizer: Any,
    origin: rows.Origin,
    backend: Backend,
    out: Path | None,
    console: Console,
) -> list[rows.Row]:
    """A row for every question and method that is wanted; those that ``out`` has are not asked again."""
    template = rows.text_digest(tokenizer.chat_template or "")
    seen = {row.key: row for row in (rows.read(out) if out else []) if row.eval == kind}

    def key(question: Question, method: Method) -> rows.Key:
        return rows.key_of(origin, kind, question.digest, method.name, method.config)

    with progress_bar(console, sum(key(q, m) not in seen for q, m in wanted)) as advance:
        for question in {q.digest: q for q, _ in wanted}.values():
            missing = [m for q, m in wanted if q.digest == question.digest and key(q, m) not in seen]
            if not missing:
                continue
            for method, found in answer(model, tokenizer, question, missing, backend=backend):
                row = rows.AnswerRow(
                    eval=kind, **asdict(origin), method=method.name, config=method.config,
                    digest=question.digest, task=question.task, length_tokens=question.length_tokens,
                    prompt_tokens=len(question.token_ids), depth=question.depth, seed=question.seed,
                    template=template, references=list(question.sample.references), **found._asdict(),
                )  # fmt: skip
                if out is not None:
                    rows.append(out, [row])
                seen[row.key] = row
                advance(f"{question.task}, {method.name}")
    return [seen[key(q, m)] for q, m in wanted]
