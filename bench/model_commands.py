"""The benches of whole models on the command line: ``run decode``, ``run prefill``, ``run first-token``, ...."""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import flex_tls as tls

from . import options, rows
from .models import SIZES, random_model, weight_bytes

RESULTS = rows.ROOT / "bench" / "results"


def add(run: Any, plot: Any) -> None:
    """Add the commands below ``run`` and ``plot``."""
    decode = run.add_parser("decode", help="one step of a whole model, random weights, by every provider")
    decode.add_argument("--contexts", type=options.numbers, default=[98304], help="tokens cached: 256,8192,98304")
    decode.add_argument("--runs", type=int, default=50, help="samples per provider and case, at least 2")
    decode.add_argument("--profile", action="store_true", help="also where the time of our steps goes, on CUDA")
    decode.set_defaults(command=run_decode)
    prefill = run.add_parser("prefill", help="reading a prompt, random weights, by every provider")
    prefill.add_argument("--contexts", type=options.numbers, default=[98304], help="tokens of the prompt: 8192,98304")
    prefill.add_argument("--runs", type=int, default=3, help="samples per provider and case, at least 2")
    prefill.set_defaults(command=run_prefill)
    for name, parser in (("decode", decode), ("prefill", prefill)):
        parser.add_argument("--batch", type=options.numbers, default=[1], help="batch sizes: 1,2,4")
        parser.add_argument("--providers", help="comma-separated; see bench/README.md")
        parser.add_argument("--seconds", type=float, help="build no more providers, and begin no case, after this long")
        parser.add_argument("--resume", action="store_true", help="leave out what --out has rows of, same commit")
        parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl")
    throughput = run.add_parser("throughput", help="the largest batch that fits, keys and values on device or host")
    throughput.add_argument("--contexts", type=options.numbers, default=[98304], help="tokens cached: 49152,98304")
    throughput.add_argument("--providers", help="comma-separated; see bench/README.md")
    throughput.add_argument("--most", type=int, help="rows of a batch at most")
    throughput.add_argument("--gpu-gb", type=float, help="device memory that torch may take, 1e9 bytes; all by default")
    throughput.add_argument("--host-gb", type=float, help="host memory for keys and values, 1e9 bytes; what is free")
    throughput.add_argument("--runs", type=int, default=20, help="samples per provider and case, at least 2")
    throughput.add_argument("--out", type=Path, default=RESULTS / "offload.jsonl")
    throughput.set_defaults(command=run_throughput, resume=False, seconds=None)
    first = run.add_parser("first-token", help="until the compiled step's first token, in fresh processes")
    first.add_argument("--contexts", type=options.numbers, default=[98304], help="tokens of the prompt: 8192,98304")
    first.add_argument("--batch", type=options.numbers, default=[1], help="batch sizes: 1,2,4")
    first.add_argument("--tuned", action="store_true", help="with Inductor's coordinate_descent_tuning")
    first.add_argument("--out", type=Path, default=RESULTS / "first-token.jsonl")
    first.set_defaults(command=run_first_token)
    for parser in (decode, prefill, throughput, first):
        parser.add_argument("--model", choices=tuple(SIZES), default="qwen3-8b")
        parser.add_argument("--layers", type=int, help="fewer layers than the model has, to save time")
        parser.add_argument("--block-budget", type=int, default=8192)
        parser.add_argument("--token-budget", type=int, default=1024)
        options.add_machine(parser)
    drawing = plot.add_parser("decode", help="steps over the context, prompts, and where a step's time goes")
    drawing.add_argument(
        "--rows", type=Path, default=RESULTS / "decode.jsonl", help="prefill.jsonl and stages beside it"
    )
    drawing.add_argument("--out", type=Path, help="first picture, .svg or .png; others beside it")
    drawing.set_defaults(command=plot_decode)


# transformers' forward is compiled again for every context
@torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096)
def run_decode(args: argparse.Namespace) -> int:
    """Measure decode steps and append their rows, case by case; long contexts first."""
    from .decode import DEFAULT, PROVIDERS, Bed, measure
    from .stages import profile, stage_row

    names = _providers(args, DEFAULT, PROVIDERS)
    run = _Run(args)
    profiled_steps = 5
    for b in args.batch:
        bed: Bed | None = None
        for context in sorted(args.contexts, reverse=True):
            todo = run.left(names, b, context)
            if not todo or not run.has_time(f"B={b} {context}"):
                continue
            run.begin()
            if bed is None:
                try:
                    bed = Bed(run.model, run.cfg, b, context)
                except MemoryError as error:
                    print(f"skipping B={b} {context}: {error}", flush=True)
                    continue
            bed.set_context(context)
            print(f"{args.model} B={b} {context} tokens", flush=True)
            found, steps, failed = measure(bed, args.model, todo, args.runs, run.machine, run.floor_ms, run.until)
            run.add(found, failed)
            if args.profile and bed.device.type == "cuda":
                where = args.out.with_name(f"{args.out.stem}-stages.jsonl")
                for name in steps:
                    if not name.startswith("transformers"):
                        kernels = profile(steps[name], profiled_steps)
                        row = stage_row(
                            kernels, profiled_steps, args.model, b, run.n_layers, context, name, run.machine
                        )
                        rows.append(where, [row])
                        print(f"  {name}, us: {_listed(row.stage_us)}", flush=True)
            del steps
            _release()
            run.end()
        del bed
        torch._dynamo.reset()
        _release()
    return run.report()


def run_prefill(args: argparse.Namespace) -> int:
    """Measure prompts and append their rows, case by case."""
    from .prefill import DEFAULT, measure

    names = _providers(args, DEFAULT, None)
    run = _Run(args)
    for b in args.batch:
        for context in args.contexts:
            todo = run.left(names, b, context)
            if not todo or not run.has_time(f"B={b} {context}"):
                continue
            run.begin()
            print(f"{args.model} B={b} {context} tokens", flush=True)
            try:
                found = measure(run.model, run.cfg, args.model, b, context, todo, args.runs, run.machine, run.floor_ms)
                run.add(found, [])
            except MemoryError as error:
                print(f"skipping B={b} {context}: {error}", flush=True)
            _release()
            run.end()
    return run.report()


def run_first_token(args: argparse.Namespace) -> int:
    """Measure the wait before the compiled step's first token."""
    from .first_token import run

    return run(args)


def run_throughput(args: argparse.Namespace) -> int:
    """Measure each provider at the largest batch that fits, and append its row."""
    from .offload import write
    from .throughput import TRANSFORMERS, WAYS, measure

    names = _providers(args, ("dense", "two_level", "offload_async", "offload_int8"), (*WAYS, TRANSFORMERS))
    if args.gpu_gb is not None and args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_gb * 1e9 / total))
    run = _Run(args)
    host_bytes = None if args.host_gb is None else int(args.host_gb * 1e9)
    limits = {"gpu_gb": args.gpu_gb, "host_gb": args.host_gb, "model": args.model}
    with torch.no_grad():
        for context in args.contexts:
            found = measure(run.model, run.cfg, context, names, args.runs, host_bytes=host_bytes, most=args.most)
            write(({**row, **limits} for row in found), run.machine, args.out)
    return 0


def plot_decode(args: argparse.Namespace) -> int:
    """Draw the latest rows and print them as a table."""
    from .model_plots import draw_all, table

    folder = args.rows.parent
    measured = rows.read(args.rows, rows.ModelRow) + rows.read(folder / "prefill.jsonl", rows.ModelRow)
    stages = rows.read(args.rows.with_name(f"{args.rows.stem}-stages.jsonl"), rows.StageRow)
    if not measured:
        raise ValueError(f"rows: {args.rows} holds none; run `python -m bench run decode`")
    # One picture, one machine: that of the newest row
    gpu = max(measured, key=lambda row: row.date).gpu
    latest = {row.key[2:]: row for row in measured if row.gpu == gpu}
    newest = {(row.case, row.B, row.context, row.provider): row for row in stages if row.gpu == gpu}
    written = draw_all(list(latest.values()), list(newest.values()), args.out or args.rows.with_suffix(".svg"))
    print(f"{table(list(latest.values()))}\n\nwrote {', '.join(map(str, written))}")
    return 0


class _Run:
    """What both benches do around their cases: machine, model, time limit, rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        from .timing import read_bytes_per_us

        if args.runs < 2:
            raise ValueError(f"runs: expected at least 2, got {args.runs}")
        device = torch.device(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: no CUDA device here; pass --device cpu --model tiny for a dry run")
        self.args, self.began, self.longest_s, self.started = args, time.monotonic(), 0.0, 0.0
        self.cfg = tls.TLSConfig(block_budget=args.block_budget, token_budget=args.token_budget)
        self.machine = rows.machine(device, args.commit, args.dirty)
        print(
            f"{self.machine.gpu}, driver {self.machine.driver}, torch {self.machine.torch}, "
            f"triton {self.machine.triton}", flush=True,
        )  # fmt: skip
        bytes_per_us = read_bytes_per_us(device)
        _release()
        self.model = random_model(args.model, args.layers, device)
        self.n_layers: int = self.model.config.num_hidden_layers
        self.floor_ms = weight_bytes(self.model) / bytes_per_us / 1e3
        print(f"weights {weight_bytes(self.model) / 1e9:.2f} GB, floor {self.floor_ms:.2f} ms a step", flush=True)
        self.done: set[tuple[object, ...]] = set()
        if args.resume:
            self.done = {row.key for row in rows.read(args.out, rows.ModelRow)}
        self.failed: list[str] = []
        self.measured: list[rows.ModelRow] = []

    @property
    def until(self) -> float:
        """When it should be over, of the monotonic clock."""
        return math.inf if self.args.seconds is None else self.began + float(self.args.seconds)

    def left(self, names: Sequence[str], b: int, context: int) -> list[str]:
        """Providers that have no row of this case yet."""
        bench = "prefill" if self.args.command is run_prefill else "decode"
        cfg, m = self.cfg, self.machine
        case = (m.gpu, m.commit, bench, self.args.model, self.n_layers, b, context)
        budgets = cfg.block_budget, cfg.token_budget
        keys = {name: (*case, rows.blocks_of(name, cfg.block_size), *budgets, name) for name in names}
        return [name for name, key in keys.items() if key not in self.done]

    def has_time(self, case: str) -> bool:
        """Whether another case would likely end in time."""
        passed = time.monotonic() - self.began
        if self.began + passed + self.longest_s <= self.until:
            return True
        limit = self.args.seconds
        print(
            f"no time for {case}: {passed:.0f} s of {limit:.0f} are gone, a case took {self.longest_s:.0f}", flush=True
        )
        return False

    def begin(self) -> None:
        self.started = time.monotonic()

    def end(self) -> None:
        self.longest_s = max(self.longest_s, time.monotonic() - self.started)

    def add(self, found: Sequence[rows.ModelRow], failed: Sequence[str]) -> None:
        """Keep rows, in the file too, and say what they are."""
        rows.append(self.args.out, found)
        self.measured += found
        self.failed += failed
        for row in found:
            hits = "" if row.hit_rate is None else f", hits {row.hit_rate:.3f}, {row.fetched_bytes:,.0f} bytes fetched"
            print(f"  {row.provider}: {row.ms_median:.3f} ms, p99 {row.ms_p99:.3f}{hits}", flush=True)

    def report(self) -> int:
        """The table, and the exit status."""
        from .model_plots import table

        print(f"\n{table(self.measured)}\n\n{len(self.measured)} rows appended to {self.args.out}")
        for name in self.failed:
            print(f"FAILED {name} (trace above)")
        return 1 if self.failed else 0


def _providers(args: argparse.Namespace, default: Sequence[str], known: Any) -> list[str]:
    names = args.providers.split(",") if args.providers else list(default)
    if known is not None and (missing := [name for name in names if name not in known]):
        raise ValueError(f"providers: expected some of {', '.join(known)}, got {', '.join(missing)}")
    return names


def _listed(stages: dict[str, float]) -> str:
    ordered: Iterator[tuple[str, float]] = iter(sorted(stages.items(), key=lambda item: -item[1]))
    return ", ".join(f"{name} {us:.0f}" for name, us in ordered)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
