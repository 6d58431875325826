"""``flex-tls eval``: what sparse decoding loses against dense attention, as rows with intervals and as pictures."""

from __future__ import annotations

import functools
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..evaluate import rows
from ..evaluate.methods import DENSE, Method
from ..evaluate.perplexity import score_documents
from ..evaluate.summary import summarise_ppl, summarise_retrieval
from .evaluate_attention import attention
from .evaluate_common import (
    DEFAULT_METHODS,
    BackendName,
    BlockBudgets,
    Column,
    Commit,
    Dataset,
    Device,
    Documents,
    Dtype,
    JsonFile,
    Methods,
    ModelName,
    Rope,
    RowsFile,
    Split,
    Texts,
    TokenBudgets,
    as_backend,
    check_positions,
    chosen_methods,
    load_for_rows,
    progress_bar,
    read_texts,
    write_summary,
)
from .evaluate_retrieval import retrieval, tasks
from .options import BLOCK_SIZE, BlockSize
from .plot import plot_accuracy
from .plots import plot_depths
from .report import print_ppl, print_retrieval, reported

eval_app = typer.Typer(help="What sparse decoding loses against dense attention.", no_args_is_help=True)
eval_app.command()(retrieval)
eval_app.command()(tasks)
eval_app.command()(attention)


@eval_app.command()
def ppl(
    files: Texts = None,
    dataset: Dataset = None,
    split: Split = "train",
    text_column: Column = "text",
    model_name: ModelName = None,
    context_tokens: Annotated[int, typer.Option(min=2, help="Tokens before the first scored one.")] = 2048,
    score_tokens: Annotated[int, typer.Option(min=1, help="Tokens to score in each document.")] = 64,
    documents: Documents = 4,
    methods: Methods = DEFAULT_METHODS,
    block_budget: BlockBudgets = "1/4",
    token_budget: TokenBudgets = "1/8",
    block_size: BlockSize = BLOCK_SIZE,
    batch: Annotated[int, typer.Option(min=1, help="Documents decoded side by side.")] = 1,
    step_tokens: Annotated[
        int, typer.Option(min=1, max=16, help="Tokens fed to one decode step; the same result, sooner.")
    ] = 16,
    rope: Rope = None,
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
        chosen = chosen_methods(methods, context_tokens, length, block_budget, token_budget, block_size, console)
        model, tokenizer, origin = load_for_rows(model_name, device, dtype, backend, commit, console, rope)
        check_positions(model, length)
        texts = read_texts(files, dataset, split, text_column, tokenizer, length, documents)
        seen = {row.key: row for row in (rows.read(out) if out else []) if isinstance(row, rows.PplRow)}

        def key(digest: str, method: Method) -> rows.Key:
            return rows.ppl_key_of(origin, digest, method.name, method.config, context_tokens)

        def is_missing(digest: str, method: Method) -> bool:
            return key(digest, method) not in seen

        dense, todo = Method(DENSE, None), []
        for start in range(0, len(texts), batch):
            group = texts[start : start + batch]
            missing = [m for m in chosen if any(is_missing(x.digest, m) for x in group)]
            if missing:
                if all(m.cfg is not None for m in missing) and any(is_missing(x.digest, dense) for x in group):
                    # It runs anyway: what it said is kept
                    missing.insert(0, dense)
                todo.append((group, missing))
        passes = sum(1 + sum(m.cfg is not None for m in missing) for _, missing in todo)
        with progress_bar(console, passes * -(-score_tokens // step_tokens)) as advance:
            for group, missing in todo:
                ids = torch.tensor([x.token_ids for x in group], device=model.device)
                found = score_documents(
                    model, ids, context_tokens, missing,
                    backend=as_backend(backend), step_tokens=step_tokens, on_step=advance,
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
    write_summary(json_file, lines)


@eval_app.command()
def plot(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Rows file of eval ppl, or of eval retrieval --depth.")
    ],
    out: Annotated[Path, typer.Option(help="Picture: PNG, SVG or PDF by its ending.")],
) -> None:
    """From rows: KL against token budget for every method; of retrieval, scores over needle depth and context."""
    console = Console()
    with reported(console):
        found = rows.read(file)
        lines = [line for line in summarise_ppl(found) if line.config is not None]
        deep = [line for line in summarise_retrieval(found) if line.depth is not None]
        if lines:
            plot_accuracy(lines, out)
            print_ppl(lines, console)
        elif deep:
            plot_depths(deep, out)
            print_retrieval(deep, console)
        else:
            raise ValueError(f"rows: {file} holds none of eval ppl with a sparse method, nor of eval retrieval --depth")


def _preset(command_name: str, methods: str, help: str) -> None:
    """A command that is :func:`ppl` with a named set of methods."""

    @functools.wraps(ppl)
    def command(**options: Any) -> None:
        ppl(**options)

    signature = inspect.signature(ppl, eval_str=True)
    parameters = [p.replace(default=methods) if p.name == "methods" else p for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    eval_app.command(command_name, help=help)(command)


_preset("compare", "comparison", "As ppl, for every method: ours, the published ones, and oracles.")
_preset("ablate", "ablation", "As ppl, changing one component of ours at a time.")
_preset("frontier", "frontier", "As ppl, for some sixty indexes at equal budgets: bytes held and read against KL.")
