"""``flex-tls eval``: what sparse decoding loses against dense attention, as rows with intervals and as a picture."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from ..attention import Backend, check_backend
from ..evaluate import rows
from ..evaluate.documents import library_files, read_documents
from ..evaluate.methods import Method, make_method
from ..evaluate.perplexity import score_documents
from ..evaluate.retrieval import answer, haystack, make_question
from ..evaluate.summary import summarise_ppl, summarise_retrieval
from ..evaluate.tasks import TASKS
from .options import config, load_model
from .plot import plot_accuracy
from .report import hardware, print_ppl, print_retrieval, reported

eval_app = typer.Typer(help="What sparse decoding loses against dense attention.", no_args_is_help=True)

ModelName = Annotated[
    str | None, typer.Option("--model", help="Folder, hub id or GGUF file; SmolLM2-135M-Instruct by default.")
]
Methods = Annotated[str, typer.Option(help="Names, comma-separated, with settings: ours,ours:label_dims=16,quest.")]
BlockBudgets = Annotated[str, typer.Option("--block-budget", help="Counts or shares, comma-separated: 1/4,1/8.")]
TokenBudgets = Annotated[str, typer.Option("--token-budget", help="As many, or 'all': 1/8,1/16.")]
BlockSize = Annotated[int, typer.Option(help="Tokens per block: 16, 32, 64 or 128.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
BackendName = Annotated[
    str, typer.Option("--backend", help="reference, flex or triton; auto: triton where it can run, else reference.")
]
RowsFile = Annotated[
    Path | None, typer.Option("--out", help="Rows file (JSONL), appended to; what it holds is not measured again.")
]
Commit = Annotated[str | None, typer.Option(help="For a checkout without git's history; asked of git by default.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the summary to this file.")]

DEFAULT_METHODS = "ours,window,quest,oracle"


@eval_app.command()
def ppl(
    files: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, help="Texts, or folders of them; Python's standard library by default."),
    ] = None,
    model_name: ModelName = None,
    context_tokens: Annotated[int, typer.Option(min=2, help="Tokens before the first scored one.")] = 2048,
    score_tokens: Annotated[int, typer.Option(min=1, help="Tokens to score in each document.")] = 64,
    documents: Annotated[int, typer.Option(min=1, help="Files to read, at most.")] = 4,
    methods: Methods = DEFAULT_METHODS,
    block_budget: BlockBudgets = "1/4",
    token_budget: TokenBudgets = "1/8",
    block_size: BlockSize = 32,
    batch: Annotated[int, typer.Option(min=1, help="Documents decoded side by side.")] = 1,
    step_tokens: Annotated[
        int, typer.Option(min=1, max=16, help="Tokens fed to one decode step; the same result, sooner.")
    ] = 16,
    kept_mass: Annotated[
        bool, typer.Option("--kept-mass", help="Also measure kept attention mass per layer; reads all keys.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: BackendName = "auto",
    out: RowsFile = None,
    commit: Commit = None,
    json_file: JsonFile = None,
) -> None:
    """Perplexity, KL(dense || sparse) and top-1 agreement, token by token through the decode path."""
    console = Console()
    length = context_tokens + score_tokens
    with reported(console):
        chosen = _methods(methods, context_tokens, length, block_budget, token_budget, block_size)
        model, tokenizer, origin = _load(model_name, device, dtype, backend, commit, console)
        _check_positions(model, length)
        texts = read_documents(files or library_files(), tokenizer, length, documents)
        seen = {row.key: row for row in (rows.read(out) if out else []) if isinstance(row, rows.PplRow)}

        def key(digest: str, method: Method) -> rows.Key:
            return rows.ppl_key_of(origin, digest, method.name, method.config, context_tokens)

        def is_missing(digest: str, method: Method) -> bool:
            row = seen.get(key(digest, method))
            return row is None or (kept_mass and method.cfg is not None and not method.evicts and row.kept_mass is None)

        todo = []
        for start in range(0, len(texts), batch):
            group = texts[start : start + batch]
            missing = [m for m in chosen if any(is_missing(x.digest, m) for x in group)]
            if missing:
                todo.append((group, missing))
        passes = sum(1 + sum(m.cfg is not None for m in missing) for _, missing in todo)
        with _bar(console, passes * -(-score_tokens // step_tokens)) as advance:
            for group, missing in todo:
                ids = torch.tensor([x.token_ids for x in group], device=model.device)
                found = score_documents(
                    model, ids, context_tokens, missing,
                    backend=_backend(backend), step_tokens=step_tokens, kept_mass=kept_mass, on_step=advance,
                )  # fmt: skip
                for method, scores in found:
                    new = [
                        rows.PplRow(
                            eval="ppl", **asdict(origin), method=method.name, config=method.config,
                            digest=text.digest, document=text.name, context_tokens=context_tokens,
                            score_tokens=score_tokens, step_tokens=step_tokens, **asdict(score),
                        )
                        for text, score in zip(group, scores, strict=True)
                        if is_missing(text.digest, method)
                    ]  # fmt: skip
                    if out is not None:
                        rows.append(out, new)
                    seen |= {row.key: row for row in new}
        lines = summarise_ppl([seen[key(text.digest, method)] for method in chosen for text in texts])
    print_ppl(lines, console)
    _write(json_file, lines)


@eval_app.command()
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
        chosen = {n: _methods(methods, n, n + room, block_budget, token_budget, block_size) for n in lengths}
        model, tokenizer, origin = _load(model_name, device, dtype, backend, commit, console)
        _check_positions(model, max(lengths) + room)
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
        with _bar(console, sum(key(q.digest, m) not in seen for q, m in wanted)) as advance:
            for question in questions:
                missing = [m for m in chosen[question.length_tokens] if key(question.digest, m) not in seen]
                if not missing:
                    continue
                for method, found in answer(model, tokenizer, question, missing, backend=_backend(backend)):
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
    _write(json_file, lines)


@eval_app.command()
def plot(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Rows file of eval ppl.")],
    out: Annotated[Path, typer.Option(help="Picture: PNG, SVG or PDF by its ending.")],
) -> None:
    """KL against token budget for every method, from rows."""
    console = Console()
    with reported(console):
        found = rows.read(file)
        lines = [line for line in summarise_ppl(found) if line.config is not None]
        if not lines:
            raise ValueError(f"rows: {file} holds none of eval ppl with a sparse method")
        plot_accuracy(lines, out)
    print_ppl(lines, console)


def _methods(
    specs: str, context: int, longest: int, block_budgets: str, token_budgets: str, block_size: int
) -> list[Method]:
    """Every method under every pair of budgets; dense attention, and what is equal, once."""
    blocks, tokens = block_budgets.split(","), token_budgets.split(",")
    if len(blocks) != len(tokens):
        raise ValueError(f"--token-budget: expected {len(blocks)}, one for each --block-budget, got {len(tokens)}")
    found: dict[Method, None] = {}
    for pair in zip(blocks, tokens, strict=True):
        cfg = config(context, *pair, block_size)
        found |= dict.fromkeys(make_method(spec, cfg, longest) for spec in specs.split(","))
    return list(found)


def _load(
    name: str | None, device: str, dtype: str, backend: str, commit: str | None, console: Console
) -> tuple[Any, Any, rows.Origin]:
    _backend(backend)
    with console.status(f"loading {name or 'SmolLM2-135M-Instruct (converted the first time: a minute)'}"):
        model, tokenizer = load_model(name, device, dtype)
    machine = hardware()
    origin = rows.Origin(
        model=name or "SmolLM2-135M-Instruct",
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(machine["gpu"] if model.device.type == "cuda" else machine["cpu"]),
        flex_tls=__version__,
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        commit=_commit() if commit is None else commit,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return model, tokenizer, origin


def _backend(name: str) -> Backend:
    check_backend(cast(Backend, name))
    return cast(Backend, name)


def _check_positions(model: Any, n_tokens: int) -> None:
    """Beyond its positions a model's own dense attention is no baseline."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and n_tokens > most:
        raise ValueError(f"length: expected at most {most} tokens, the model's positions, got {n_tokens} in all")


def _commit() -> str:
    """What git says of this checkout; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _write(path: Path | None, lines: Sequence[Any]) -> None:
    """Summary lines as JSON; an interval without ends has null there."""
    if path is not None:
        plain = json.loads(json.dumps([asdict(line) for line in lines]), parse_constant=lambda _: None)
        path.write_text(json.dumps({"machine": hardware(), "results": plain}, indent=2))


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; what is yielded takes it one step on, with a word on what is being done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
