"""The commands and their options."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..attention import Backend, BackendUnavailable, resolve_backend
from ..cache import TLSCache
from ..config import TLSConfig
from ..device import why_not_here
from ..explanation import explain
from ..offload import OffloadConfig
from .compare import compare
from .evaluate import eval_app
from .options import BLOCK_SIZE, BlockSize, config, load_model, load_shape, offload_config, pick_device
from .plan import make_plan, print_plan
from .plot import plot_record
from .report import hardware, print_comparison, reported
from .stats import print_offload
from .texts import library_source, question_about
from .weights import load_smollm2

app = typer.Typer(help="Two-level sparse attention for long-context decoding.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")

NewTokens = Annotated[int, typer.Option(min=2, help="Tokens to decode.")]
BlockBudget = Annotated[str, typer.Option(help="Level 1: tokens kept as blocks; a count, or a share as 1/4.")]
TokenBudget = Annotated[str, typer.Option(help="Level 2: tokens kept inside them; a count, a share, or 'all'.")]
StoreDtypeName = Annotated[str, typer.Option("--store-dtype", help="With --offload: host and pool hold model or int8.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw kept mass and block map into this PNG or SVG.")]


def main() -> None:
    """Entry point of ``flex-tls``."""
    app()


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=256, max=8000, help="Length of the prompt.")] = 6000,
    new_tokens: NewTokens = 64,
    block_budget: BlockBudget = "1/4",
    token_budget: TokenBudget = "1/8",
    block_size: BlockSize = BLOCK_SIZE,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """SmolLM2-135M-Instruct reads Python's own source and answers, with full and with two-level attention."""
    console = Console()
    cfg = config(tokens, block_budget, token_budget, block_size)
    with console.status("loading SmolLM2-135M-Instruct (the first time its weights are converted: a minute)"):
        try:
            model, tokenizer = load_smollm2()
        except RuntimeError as error:
            raise typer.BadParameter(str(error)) from error
    ids = question_about(library_source(), tokenizer, tokens)
    _run(model, tokenizer, ids, cfg, new_tokens, console, json_file, plot)


@app.command()
def generate(
    model_name: Annotated[str, typer.Option("--model", help="Folder or hub id of a causal model.")],
    prompt_file: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Text to read.")],
    new_tokens: NewTokens = 64,
    block_budget: BlockBudget = "8192",
    token_budget: TokenBudget = "1024",
    block_size: BlockSize = BLOCK_SIZE,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    compare_dense: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Decode with full attention too.")
    ] = True,
    offload: Annotated[
        str, typer.Option(help="Keys and values in host memory: async, exact or corrected; none keeps them here.")
    ] = "none",
    gpu_blocks: Annotated[
        int | None, typer.Option(min=1, help="With --offload: blocks on the device per KV head; twice the budget.")
    ] = None,
    store_dtype: StoreDtypeName = "model",
    transfer: Annotated[
        str, typer.Option(help="With --offload on CUDA: kernel, or copy, a copy a block; a CPU has only copies.")
    ] = "kernel",
    stats: Annotated[
        bool, typer.Option("--stats", help="With --offload: what each layer's engine does, live.")
    ] = False,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Your own model and text: decode with two-level attention, next to full attention."""
    console = Console()
    with console.status(f"loading {model_name}"):
        model, tokenizer = load_model(model_name, device, dtype)
    ids = tokenizer(prompt_file.read_text(), return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] < 1:
        raise typer.BadParameter(f"expected text, {prompt_file} holds none", param_hint="--prompt-file")
    cfg = config(ids.shape[1], block_budget, token_budget, block_size)
    away = offload_config(offload, gpu_blocks, store_dtype, transfer)
    _run(model, tokenizer, ids, cfg, new_tokens, console, json_file, plot, compare_dense, away, stats)


@app.command()
def plan(
    model_name: Annotated[str, typer.Option("--model", help="Folder or hub id of a causal model; its weights stay.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a row, answer included.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    gpu_mem: Annotated[float | None, typer.Option(help="GB of device memory; the device's by default.")] = None,
    host_mem: Annotated[float | None, typer.Option(help="GB of host memory; what is available by default.")] = None,
    block_budget: BlockBudget = "8192",
    token_budget: TokenBudget = "1024",
    block_size: BlockSize = BLOCK_SIZE,
    offload: Annotated[str, typer.Option(help="Policy: async, exact or corrected.")] = "async",
    gpu_blocks: Annotated[int | None, typer.Option(min=1, help="Blocks on the device per KV head.")] = None,
    store_dtype: StoreDtypeName = "model",
    missing: Annotated[float, typer.Option(min=0, max=1, help="Share of a step's blocks that it has to fetch.")] = 0.05,
    json_file: JsonFile = None,
) -> None:
    """What a context takes with and without offload, what fits, and on CUDA the least step time and whether it pays."""
    console = Console()
    cfg = config(context, block_budget, token_budget, block_size)
    away = offload_config(offload, gpu_blocks, store_dtype)
    if away is None:
        raise typer.BadParameter("expected async, exact or corrected, got none", param_hint="--offload")
    with reported(console):
        planned = make_plan(model_name, cfg, away, batch, context, gpu_mem, host_mem, missing)
    print_plan(planned, console)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": hardware(), **asdict(planned)}, indent=2))


@app.command()
def inspect(
    model_name: Annotated[
        str | None, typer.Option("--model", help="Say what each layer of this model would run; weights are not read.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="With --model: tokens in the cache.")] = 98304,
    batch_size: Annotated[int, typer.Option(min=1, help="With --model: rows.")] = 1,
    block_budget: BlockBudget = "8192",
    token_budget: TokenBudget = "1024",
    block_size: BlockSize = BLOCK_SIZE,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    json_file: JsonFile = None,
) -> None:
    """What this machine can run, which path each backend would take, and, with --model, each layer."""
    console = Console()
    found: dict[str, Any] = {"machine": hardware(), "packages": _versions(), "backends": _backends()}
    layers: list[tuple[str, ...]] = []
    if model_name is not None:
        cfg = config(context, block_budget, token_budget, block_size)
        model = load_shape(model_name, dtype)
        with reported(console):
            cache = TLSCache(model.config, cfg, batch_size=batch_size, max_len=context, dtype=model.dtype)
            explained = explain(model, cache, device=pick_device(device))
        found["decode step"], layers = explained.facts, explained.table
    for title, rows in found.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, str(value))
        console.print(table)
    if layers:
        table = Table(title="layers", title_justify="left")
        for name in layers[0]:
            table.add_column(name, overflow="fold")
        for cells in layers[1:]:
            table.add_row(*cells)
        console.print(table)
        found["layers"] = [dict(zip(layers[0], cells, strict=True)) for cells in layers[1:]]
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2))


def _run(
    model: Any,
    tokenizer: Any,
    ids: Any,
    cfg: TLSConfig,
    new_tokens: int,
    console: Console,
    json_file: Path | None,
    plot: Path | None,
    dense: bool = True,
    offload: OffloadConfig | None = None,
    stats: bool = False,
) -> None:
    with reported(console):
        result = compare(model, tokenizer, ids, cfg, new_tokens, console, dense, offload, live_stats=stats)
    if not result.record.layers:
        console.print(
            f"the budgets hold all of the {result.prompt_tokens} tokens: every step was dense; lower them",
            style="yellow",
        )
    print_comparison(result, console)
    if result.offload:
        print_offload(result.offload, console, layers=stats)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": hardware(), **result.as_dict()}, indent=2))
    if plot is not None and result.record.layers:
        plot_record(result.record, plot, f"{result.prompt_tokens:,} prompt tokens, {new_tokens} decoded")


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in ("flex_tls", "torch", "triton", "transformers")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backends() -> dict[str, str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if torch.cuda.is_available():
        flex = "CUDA: FlexAttention's decode kernel, compiled by Inductor and Triton"
    elif compiler is None and sys.platform != "win32":
        flex = "cannot compile here: Inductor needs a C++ compiler (g++ or clang++)"
    else:
        flex = f"CPU: FlexAttention's C++ template, compiled by Inductor with {compiler}"
    return {
        "reference": "eager PyTorch, any device; the oracle",
        "flex": flex,
        "triton": _path("triton"),
        "auto": _path("auto"),
    }


def _path(backend: Backend) -> str:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return f"takes {resolve_backend(backend, device, why_not_here(device))!r}"
    except BackendUnavailable as error:
        return str(error)
