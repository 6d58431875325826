"""What the commands of ``flex-tls eval`` share: options, the model and where its rows come from, progress, summary."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from .._check import dtype_name
from ..attention import Backend, check_backend
from ..device import driver_version
from ..evaluate import rows
from ..evaluate.documents import Document, library_files, read_dataset, read_documents
from ..evaluate.methods import Method
from ..evaluate.sets import make_methods
from .options import config, load_model, scale_rope
from .report import hardware

Texts = Annotated[
    list[Path] | None,
    typer.Argument(exists=True, help="Texts, or folders of them; Python's standard library by default."),
]
Documents = Annotated[int, typer.Option(min=1, help="Texts to read, at most.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="In place of files, NAME or NAME:CONFIG of a Hugging Face data set, or a folder; streamed."),
]
Split = Annotated[str, typer.Option(help="Of --dataset.")]
Column = Annotated[str, typer.Option(help="Of --dataset: where its texts are.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Folder, hub id or GGUF file; SmolLM2-135M-Instruct by default.")
]
Methods = Annotated[
    str,
    typer.Option(
        help="Names, comma-separated, with settings: ours,ours:label_dims=16,quest; or comparison, ablation, frontier."
    ),
]
DEFAULT_METHODS = "ours,window,quest,oracle"

BlockBudgets = Annotated[str, typer.Option("--block-budget", help="Counts or shares, comma-separated: 1/4,1/8.")]
TokenBudgets = Annotated[str, typer.Option("--token-budget", help="As many, or 'all': 1/8,1/16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
BackendName = Annotated[
    str,
    typer.Option("--backend", help="reference, flex or triton; auto: triton where it can run, else reference."),
]
RowsFile = Annotated[
    Path | None, typer.Option("--out", help="Rows file (JSONL), appended to; what it holds is not measured again.")
]
Rope = Annotated[
    str | None, typer.Option(help="RoPE scaling for contexts beyond the model's positions: yarn:2 or linear:2.")
]
Commit = Annotated[str | None, typer.Option(help="For a checkout without git's history; asked of git by default.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the summary to this file.")]


def chosen_methods(
    specs: str,
    context: int,
    longest: int,
    block_budgets: str,
    token_budgets: str,
    block_size: int,
    console: Console,
) -> list[Method]:
    """Every method under every pair of budgets; says what of a named set does not go with a pair."""
    blocks, tokens = block_budgets.split(","), token_budgets.split(",")
    if len(blocks) != len(tokens):
        raise ValueError(f"--token-budget: expected {len(blocks)}, one for each --block-budget, got {len(tokens)}")
    cfgs = [config(context, *pair, block_size) for pair in zip(blocks, tokens, strict=True)]
    methods, left_out = make_methods(specs.split(","), cfgs, longest)
    for reason in left_out:
        console.print(f"left out: {reason}", style="yellow", markup=False, highlight=False)
    return methods


def load_for_rows(
    name: str | None,
    device: str,
    dtype: str,
    backend: str,
    commit: str | None,
    console: Console,
    rope: str | None = None,
) -> tuple[Any, Any, rows.Origin]:
    """(model, tokenizer, what their rows share)."""
    as_backend(backend)
    with console.status(f"loading {name or 'SmolLM2-135M-Instruct (converted the first time: a minute)'}"):
        model, tokenizer = load_model(name, device, dtype)
    if rope is not None:
        scale_rope(model, rope)
    machine = hardware()
    origin = rows.Origin(
        model=(name or "SmolLM2-135M-Instruct") + ("" if rope is None else f", RoPE {rope}"),
        dtype=dtype_name(model.dtype),
        device=str(machine["gpu"] if model.device.type == "cuda" else machine["cpu"]),
        flex_tls=__version__,
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        commit=_commit() if commit is None else commit,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        python=str(machine["python"]),
        triton=importlib.metadata.version("triton") if find_spec("triton") else "",
        driver=driver_version() if model.device.type == "cuda" else "",
    )
    return model, tokenizer, origin


def read_texts(
    files: list[Path] | None, dataset: str | None, split: str, column: str, tokenizer: Any, length: int, limit: int
) -> list[Document]:
    """The texts that the options ask for, each cut to ``length`` tokens."""
    if dataset is None:
        return read_documents(files or library_files(), tokenizer, length, limit)
    if files:
        raise ValueError(f"--dataset: expected it or files, got {dataset!r} and {len(files)} of them")
    return read_dataset(dataset, tokenizer, length, limit, split=split, column=column)


def as_backend(name: str) -> Backend:
    """The option's text as a backend, checked."""
    check_backend(cast(Backend, name))
    return cast(Backend, name)


def check_positions(model: Any, n_tokens: int) -> None:
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


def write_summary(path: Path | None, lines: Sequence[Any]) -> None:
    """Summary lines as JSON; an interval without ends has null there."""
    if path is not None:
        plain = json.loads(json.dumps([asdict(line) for line in lines]), parse_constant=lambda _: None)
        path.write_text(json.dumps({"machine": hardware(), "results": plain}, indent=2))


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; what is yielded takes it one step on, with a word on what is being done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
