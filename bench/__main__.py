"""The command line of the benches; ``python -m bench --help``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch

from . import cases, model_commands, options, rows
from .models import SIZES
from .plots import table

ROWS = rows.ROOT / "bench" / "results" / "operator.jsonl"
OFFLOAD_PARTS = ("link", "overlap", "steps", "quality")
QUICK_ROWS = rows.ROOT / "out" / "operator-quick.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.command(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


def run_operator(args: argparse.Namespace) -> int:
    """Measure the cases and append their rows, case by case."""
    from .operator import TARGETS_US, run_case, variants, why_not
    from .providers import PROVIDERS
    from .timing import read_bytes_per_us

    began = time.monotonic()
    suite = cases.SUITES["quick" if args.quick else args.suite]
    names = _matching(args.cases, cases.CASES, "cases") if args.cases else list(suite.cases)
    providers = _matching(args.providers or ",".join(suite.providers), PROVIDERS, "providers")
    out = args.out or (QUICK_ROWS if args.quick else ROWS)
    runs = _runs(args)
    device, machine = _where(args)
    if args.resume:
        wanted = {}
        for name in names:
            able = [p for each in providers if (p := PROVIDERS[each]).runs_here(cases.CASES[name], device)]
            wanted[name] = {variant for variant, _, _ in variants(able, args.split_kv)}
        names = _left(wanted, rows.read(out), machine, "repeated" if args.repeat_inputs else "rotated")
        n_done = len(wanted) - len(names)
        print(f"resuming: {n_done} cases have all rows of this commit in {out}, {len(names)} are left")
    bytes_per_us = read_bytes_per_us(device)
    print(f"read bandwidth, measured: {bytes_per_us / 1e6:.3f} TB/s", flush=True)
    measured: list[rows.Row] = []
    failed: list[str] = []
    longest_s = 0.0
    # Every provider, case and number of splits compiles once; fullgraph=True raises rather than run uncompiled
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        for i, name in enumerate(names):
            start = time.monotonic()
            if args.seconds is not None and start - began + longest_s > args.seconds:
                print(f"stopping after {start - began:.0f} s of {args.seconds:.0f}; left: {' '.join(names[i:])}")
                break
            case = cases.CASES[name]
            n_sets = 1 if args.repeat_inputs else case.n_sets(device)
            if reason := why_not(case, device, n_sets):
                print(f"skipping {name}: {reason}", flush=True)
                continue
            print(f"case {i + 1} of {len(names)}, {name}: {n_sets} input sets", flush=True)
            try:
                done, broken = run_case(
                    case,
                    device,
                    machine,
                    providers=providers,
                    splits=args.split_kv,
                    runs=runs,
                    bytes_per_us=bytes_per_us,
                    n_sets=n_sets,
                    repeat_inputs=args.repeat_inputs,
                )
            except torch.OutOfMemoryError as error:
                print(f"  {name}: {error}")
                failed.append(name)
                continue
            rows.append(out, done)
            measured += done
            failed += [f"{name}: {provider}" for provider in broken]
            took_s = time.monotonic() - start
            longest_s = max(longest_s, took_s)
            figures = ", ".join(f"{row.provider} {row.median_us:.1f}" for row in done)
            print(f"  {name} in {took_s:.1f} s, us: {figures}", flush=True)
    print(f"\n{table(measured)}\n\n{len(measured)} rows appended to {out}")
    for row in measured:
        target = TARGETS_US.get((row.case, row.provider))
        if target is not None:
            verdict = "met" if row.median_us <= target else "MISSED"
            print(f"target {row.case} {row.provider}: {row.median_us:.1f} us of at most {target:.0f} us, {verdict}")
    for what in failed:
        print(f"FAILED {what} (trace above)", file=sys.stderr)
    return 1 if failed else 0


def _left(wanted: Mapping[str, set[str]], found: Iterable[rows.Row], machine: rows.Machine, inputs: str) -> list[str]:
    """Cases that lack a row, on this GPU and commit, of a provider that is ``wanted``.

    Those that have others come last: what failed in them may fail again.
    """
    have: dict[str, set[str]] = {}
    for row in found:
        if (row.gpu, row.commit, row.inputs) == (machine.gpu, machine.commit, inputs):
            have.setdefault(row.case, set()).add(row.provider)
    left = [name for name, providers in wanted.items() if not providers <= have.get(name, set())]
    return sorted(left, key=have.__contains__)


def run_index(args: argparse.Namespace) -> int:
    """Measure what building and growing the index costs, and append rows."""
    from .index_build import CASES, measure
    from .timing import read_bytes_per_us

    device, machine = _where(args)
    default = cases.SUITES["quick"].cases if args.quick else CASES
    names = _matching(args.cases or ",".join(default), cases.CASES, "cases")
    out = args.out or (QUICK_ROWS.with_name("index-quick.jsonl") if args.quick else ROWS.with_name("index.jsonl"))
    bytes_per_us = read_bytes_per_us(device)
    print(f"read bandwidth, measured: {bytes_per_us / 1e6:.3f} TB/s", flush=True)
    with torch.no_grad():
        for name in names:
            case = cases.CASES[name] if device.type == "cuda" else cases.dry(cases.CASES[name])
            found = measure(case, device, machine, args.runs, bytes_per_us)
            rows.append(out, found)
            for row in found:
                share = row.floor_us / row.median_us
                print(f"{name} {row.provider}: {row.median_us:.1f} us, {share:.0%} of the bandwidth", flush=True)
    return 0


def run_products(args: argparse.Namespace) -> int:
    """Measure a step's matrix products and append rows."""
    from .products import measure
    from .timing import read_bytes_per_us

    device, machine = _where(args)
    bytes_per_us = read_bytes_per_us(device)
    print(f"read bandwidth, measured: {bytes_per_us / 1e6:.3f} TB/s", flush=True)
    with torch.no_grad():
        for m in args.rows:
            for row in measure(args.model, m, device, machine, args.runs, bytes_per_us):
                rows.append(args.out, [row])
                share = row.floor_us / row.median_us
                what = f"{args.model} {m} rows, {row.product}, {row.provider}"
                print(f"{what}: {row.median_us:.1f} us, {share:.0%} of the bandwidth", flush=True)
    return 0


def tune_operator(args: argparse.Namespace) -> int:
    """Time settings of the fused kernel and write the table that the package looks them up in."""
    from flex_tls.kernels.tile_table import TABLE

    from .tune import COORDINATES, Clock, tune

    clock = Clock(args.seconds)
    if args.device == "cpu" and not args.quick:
        raise ValueError("device: on a CPU there is only a dry run; pass --quick too")
    default = cases.QUICK_TUNED if args.quick else cases.TUNED
    names = _matching(args.cases or ",".join(default), cases.CASES, "cases")
    coordinates = _matching(args.coordinates, COORDINATES, "coordinates")
    runs = _runs(args)
    device, machine = _where(args)
    chosen = [cases.CASES[name] for name in names]
    with torch.no_grad():
        return tune(
            [cases.dry(case) for case in chosen] if device.type == "cpu" else chosen, device, machine,
            coordinates=coordinates, runs=runs, clock=clock,
            table=args.out or (QUICK_ROWS.with_name("tiles-quick.json") if args.quick else TABLE),
            out=args.rows or (QUICK_ROWS.with_name("tune-quick.jsonl") if args.quick else ROWS.with_name("tune.jsonl")),
        )  # fmt: skip


def run_offload(args: argparse.Namespace) -> int:
    """Measure the offload engine, part by part, and append rows."""
    from . import offload

    device, machine = _where(args)
    parts = _matching(args.parts, dict.fromkeys(OFFLOAD_PARTS), "parts")
    out = args.out or (QUICK_ROWS.with_name("offload-quick.jsonl") if args.quick else ROWS.with_name("offload.jsonl"))
    with torch.no_grad():
        if "link" in parts:
            offload.write(offload.link(device, args.runs, args.quick), machine, out)
        if "overlap" in parts:
            offload.write(offload.overlap(device, args.runs, args.quick), machine, out)
        if "steps" in parts:
            for b in args.batch:
                found = offload.steps(
                    device, args.runs, args.quick, batch_size=b, context=args.context, pool=args.pool[0]
                )
                offload.write(found, machine, out)
        if "quality" in parts:
            offload.write(_offload_quality(args, device), machine, out)
    return 0


def _offload_quality(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    """Rows of real weights and text."""
    from flex_tls.cli.options import config
    from flex_tls.cli.weights import load_smollm2

    from .offload_quality import PROVIDERS, TEXTS, measure, texts

    chosen = _matching(args.texts, dict.fromkeys(TEXTS), "texts")
    model, tokenizer = load_smollm2()
    n, scored, most = args.tokens, 8 if args.quick else 128, model.config.max_position_embeddings
    if not scored < n <= most:
        raise ValueError(f"tokens: expected more than {scored}, which are scored, and at most {most:,}, got {n}")
    model = model.to(device)
    cfg = config(n - scored, args.block_budget, args.token_budget, 32)
    providers = _matching(args.providers, PROVIDERS, "providers")
    # Slots by layer come from the first text, for the others
    balanced: dict[float, tuple[int, ...]] = {}
    ids = texts(tokenizer, n, scored)
    for text in chosen:
        found = ids[text].to(device)
        yield from measure(model, "smollm2-135m", text, found, scored, cfg, args.pool, providers, balanced)


def run_synthetic(args: argparse.Namespace) -> int:
    """Selections over planted structure, length by length."""
    from .synthetic import append, make_context, measure

    device = torch.device(args.device)
    machine = rows.machine(device, args.commit, args.dirty)
    for length in args.context:
        for seed in range(args.seeds):
            context = make_context(length, n_kv_heads=args.kv_heads, seed=seed, device=device)
            measured = measure(context, args.block_budget, args.token_budget, args.block_size)
            found = [{**row, "seed": seed} for row in measured]
            append(args.out, machine, found)
            for row in found:
                shares = ", ".join(f"{key} {row[key]:.3f}" for key in ("mass_tokens", "heavy_blocks", "needles"))
                print(f"{length:,} tokens, seed {seed}, {row['method']}: {shares}", flush=True)
    return 0


def run_tries(args: argparse.Namespace) -> int:
    """Ideas for index and budgets against ours, document by document."""
    from rich.console import Console

    from flex_tls import jsonl
    from flex_tls.cli.evaluate_common import load_for_rows
    from flex_tls.cli.options import config
    from flex_tls.evaluate.documents import read_documents

    from .tries.measure import make_tries, measure
    from .tries.rows import key_of, read, table

    tries = make_tries(
        args.tries.split(","), config(args.context, args.block_budget, args.token_budget, args.block_size)
    )
    model, tokenizer, origin = load_for_rows(None, "cpu", "float32", "reference", None, Console())
    documents = read_documents(args.texts, tokenizer, args.context + args.scored, args.documents)
    found = {key_of(row): row for row in read(args.out)}
    for document in documents:
        budgets = args.block_size, tries[0].cfg.block_budget, tries[0].cfg.token_budget
        missing = [
            each for each in tries
            if (origin.model, args.context, args.scored, *budgets, each.name, document.digest) not in found
        ]  # fmt: skip
        for row in measure(model, origin, document, args.context, missing) if missing else ():
            jsonl.append(args.out, [row])
            found[key_of(row)] = row
            print(f"{document.name}, {row['try']}: KL {row['kl']:.4f}", flush=True)
    print(table(list(found.values())))
    return 0


def plot_operator(args: argparse.Namespace) -> int:
    """Draw the latest rows and print them as a table."""
    from .plots import draw_all

    found = rows.latest(row for row in rows.read(args.rows) if row.bench == "operator")
    if not found:
        raise ValueError(f"rows: {args.rows} holds none of the operator bench; run `python -m bench run operator`")
    # One picture, one machine: that of the newest row
    gpu = max(found, key=lambda row: row.date).gpu
    found = [row for row in found if row.gpu == gpu]
    written = draw_all(found, args.out or args.rows.with_suffix(".svg"))
    print(f"{table(found)}\n\nwrote {', '.join(map(str, written))}")
    return 0


def carry(args: argparse.Namespace) -> int:
    """Write what a machine without a network needs to measure accuracy."""
    from .carry import write_carry

    written = write_carry(args.out)
    for part in sorted({path.relative_to(args.out).parts[0] for path in written}):
        n_bytes = sum(path.stat().st_size for path in written if path.relative_to(args.out).parts[0] == part)
        print(f"{args.out / part}: {n_bytes / 2**20:.1f} MiB")
    return 0


def corpus(args: argparse.Namespace) -> int:
    """Write the texts that accuracy is measured on."""
    from .corpus import write_corpus

    print(f"{len(write_corpus(args.out))} documents under {args.out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the report and its pictures from the rows that there are."""
    from .report import write_report

    print("\n".join(map(str, write_report(args.results, args.out))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, and draw what was measured.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure and append rows").add_subparsers(required=True)
    operator = run.add_parser("operator", help="one decoded token's attention, by every provider")
    operator.add_argument("--out", type=Path, help=f"rows file, appended to (default {ROWS.relative_to(rows.ROOT)})")
    operator.add_argument("--cases", help="names or patterns, comma-separated, such as 'qwen3-8b-b1-*'")
    operator.add_argument(
        "--suite", choices=[name for name in cases.SUITES if name != "quick"], default="default",
        help="96k tokens, every provider (default); lengths and batch sizes (sweep); at 96k, budgets, block sizes, or "
        "other kinds of index and a mask",
    )  # fmt: skip
    operator.add_argument("--providers", help="names or patterns, comma-separated (default those of the suite)")
    operator.add_argument("--seconds", type=float, help="stop before a case that would likely end later than this")
    operator.add_argument(
        "--resume", action="store_true", help="leave out cases that --out has all rows of, same commit"
    )
    operator.add_argument(
        "--repeat-inputs", action="store_true", help="one input set, served from L2 where it fits; rows say so"
    )
    operator.add_argument(
        "--split-kv", type=options.numbers, default=[], help="also time flex with these splits: 8,16,32,64"
    )
    operator.add_argument("--runs", type=int, help="samples per provider and case, at least 2 (default 50, quick 5)")
    options.add_machine(operator, quick=True)
    operator.set_defaults(command=run_operator)
    index = run.add_parser("index", help="building and growing the index")
    index.add_argument("--cases", help="names or patterns, comma-separated, such as 'qwen3-8b-b1-*'")
    index.add_argument("--runs", type=int, default=50, help="samples per provider, at least 2")
    index.add_argument("--out", type=Path, help="rows file, appended to (default bench/results/index.jsonl)")
    options.add_machine(index, quick=True)
    index.set_defaults(command=run_index)
    products = run.add_parser("products", help="a step's matrix products: few rows of inputs, a model's weights")
    products.add_argument("--model", choices=tuple(SIZES), default="qwen3-8b")
    products.add_argument("--rows", type=options.numbers, default=[1, 2, 4, 8], help="of inputs: B * T")
    products.add_argument("--runs", type=int, default=20, help="samples per provider, at least 2")
    products.add_argument("--out", type=Path, default=ROWS.with_name("products.jsonl"), help="rows file, appended to")
    options.add_machine(products)
    products.set_defaults(command=run_products)
    offload = run.add_parser("offload", help="the offload engine: link, overlap, steps with real locality, quality")
    offload.add_argument("--parts", default="link,overlap,steps", help=",".join(OFFLOAD_PARTS))
    offload.add_argument("--batch", type=options.numbers, default=[1, 4], help="steps: batch sizes")
    offload.add_argument("--context", type=int, default=98304, help="steps: tokens cached")
    offload.add_argument("--tokens", type=int, default=6144, help="quality: tokens of each text")
    offload.add_argument(
        "--pool", type=options.shares, default=[2.0], help="slots in block budgets; quality: several, 1.1,2"
    )
    offload.add_argument("--block-budget", default="1/4", help="quality: count or share of the context")
    offload.add_argument("--token-budget", default="1/8", help="quality: count or share of the context")
    offload.add_argument("--providers", default="*", help="quality: names or patterns, comma-separated")
    offload.add_argument(
        "--texts", default="*", help="quality: code, copy, manual, later code, other code, comma-separated"
    )
    offload.add_argument("--runs", type=int, default=20, help="samples per provider, at least 2")
    offload.add_argument("--out", type=Path, help="rows file, appended to (default bench/results/offload.jsonl)")
    options.add_machine(offload, quick=True)
    offload.set_defaults(command=run_offload)
    synthetic = run.add_parser("synthetic", help="what selections catch of planted attention, up to 256k tokens")
    synthetic.add_argument("--context", type=options.numbers, default=[16384, 32768, 65536, 98304, 131072, 262144])
    synthetic.add_argument("--block-budget", type=int, default=8192)
    synthetic.add_argument("--token-budget", type=int, default=1024)
    synthetic.add_argument("--block-size", type=int, default=cases.Case.block_size)
    synthetic.add_argument("--kv-heads", type=int, default=2)
    synthetic.add_argument("--seeds", type=int, default=3)
    synthetic.add_argument("--out", type=Path, default=ROWS.with_name("synthetic.jsonl"))
    options.add_machine(synthetic, device="cpu")
    synthetic.set_defaults(command=run_synthetic)
    tries = run.add_parser("tries", help="ideas for index and budgets on SmolLM2, at equal bytes and budgets; CPU")
    tries.add_argument("texts", type=Path, nargs="*", default=[rows.ROOT / "out" / "texts"], help="files, folders")
    tries.add_argument("--tries", default="bits,blocks,tokens", help="sets or names of bench/tries, comma-separated")
    tries.add_argument("--context", type=int, default=3072, help="tokens before the first scored one")
    tries.add_argument("--scored", type=int, default=64, help="tokens scored in each document")
    tries.add_argument("--documents", type=int, default=24, help="files to read, at most")
    tries.add_argument("--block-budget", default="1/4", help="count or share of the context")
    tries.add_argument("--token-budget", default="1/8", help="count or share of the context")
    tries.add_argument("--block-size", type=int, default=32)
    tries.add_argument("--out", type=Path, default=ROWS.with_name("tries.jsonl"))
    tries.set_defaults(command=run_tries)
    tune = commands.add_parser("tune", help="search settings, write their table").add_subparsers(required=True)
    tuning = tune.add_parser("operator", help="the fused kernel's tiles, by shape")
    tuning.add_argument("--cases", help="names or patterns, comma-separated (default: four at 96k tokens)")
    tuning.add_argument("--coordinates", default="*", help="settings to vary: names or patterns, comma-separated")
    tuning.add_argument("--seconds", type=float, help="stop before a trial that would likely end later than this")
    tuning.add_argument("--runs", type=int, help="samples per setting, at least 2 (default 50, quick 5)")
    tuning.add_argument("--out", type=Path, help="table, changed where measured (default the package's own)")
    tuning.add_argument("--rows", type=Path, help="rows file, appended to (default bench/results/tune.jsonl)")
    options.add_machine(tuning, quick=True)
    tuning.set_defaults(command=tune_operator)
    plot = commands.add_parser("plot", help="draw rows").add_subparsers(required=True)
    drawing = plot.add_parser("operator", help="times by provider, over S and over budgets")
    drawing.add_argument("--rows", type=Path, default=ROWS)
    drawing.add_argument("--out", type=Path, help="first picture, .svg or .png; others beside it")
    drawing.set_defaults(command=plot_operator)
    model_commands.add(run, plot)
    texts = commands.add_parser("corpus", help="fetch the texts that accuracy is measured on")
    texts.add_argument("--out", type=Path, default=rows.ROOT / "out" / "texts")
    texts.set_defaults(command=corpus)
    carried = commands.add_parser("carry", help="weights in three parts, wheels and texts, for a machine offline")
    carried.add_argument("--out", type=Path, default=rows.ROOT / ".carry")
    carried.set_defaults(command=carry)
    reported = commands.add_parser("report", help="docs/report.md and its pictures, from rows of flex-tls eval")
    reported.add_argument("--results", type=Path, default=rows.ROOT / "bench" / "results", help="of accuracy*.jsonl")
    reported.add_argument("--out", type=Path, default=rows.ROOT / "docs" / "report.md")
    reported.set_defaults(command=report)
    return parser


def _where(args: argparse.Namespace) -> tuple[torch.device, rows.Machine]:
    """The device that was asked for, and what rows say of it; printed."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; pass --device cpu --quick for a dry run")
    machine = rows.machine(device, args.commit, args.dirty)
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, triton {machine.triton}", flush=True)
    return device, machine


def _runs(args: argparse.Namespace) -> int:
    """Samples, of the commands that take fewer in a dry run."""
    runs: int = args.runs or (5 if args.quick else 50)
    if runs < 2:
        raise ValueError(f"runs: expected at least 2, got {runs}")
    return runs


def _matching(patterns: str, known: Mapping[str, object], what: str) -> list[str]:
    wanted = patterns.split(",")
    found = [name for name in known if any(fnmatch(name, pattern) for pattern in wanted)]
    idle = [pattern for pattern in wanted if not any(fnmatch(name, pattern) for name in known)]
    if idle:
        raise ValueError(f"{what}: nothing matches {', '.join(idle)}; there are {', '.join(known)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
