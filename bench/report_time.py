"""The report's second half, from the benches' rows: how long attention and steps take, and what a small pool costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from flex_tls import jsonl
from flex_tls.cli.figures import save

from .markdown import link, table
from .model_plots import COLOURS
from .models import SIZES
from .rows import ModelRow, Row, most_sampled, read

# Columns of the operator's table; ratios are to the first
DENSE = "sdpa_cudnn_gqa"
OPERATORS = {
    DENSE: "dense, cuDNN",
    "triton_total": "ours",
    "triton_filter16": "ours, `filter_dims=16`",
    "triton_mixed": "ours, `label_bits=(4, 2)`",
    "quest_block_budget": "Quest, block budget",
    "quest_token_budget": "Quest, token budget",
    "double_sparsity": "Double Sparsity",
}


def time_sections(results: Path, pictures: Path, base: Path) -> Iterator[str]:
    """Sections on ``results``' rows; pictures of their own go to ``pictures``, a page in ``base`` links to all."""
    steps = read(results / "decode.jsonl", ModelRow)
    offload: list[dict[str, Any]] = jsonl.read(results / "offload.jsonl", dict, "expected a row of the offload bench")
    yield from _operator(results, base)
    yield from _steps(steps, results, base)
    yield from _throughput(offload, steps, pictures, base)
    yield from _policies(offload)


def _operator(results: Path, base: Path) -> Iterator[str]:
    yield "## One token's attention\n"
    command = "python -m bench run operator --suite sweep --resume"
    runs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in most_sampled(read(results / "operator.jsonl")):
        if row.inputs == "rotated" and row.provider in OPERATORS:
            runs.setdefault((row.gpu, row.case, row.commit), {})[row.provider] = row
    # Of one run each, so that a ratio is of what took turns: the last that has both sides of it
    whole = {key[:2]: found for key, found in runs.items() if found.keys() >= {DENSE, "triton_total"}}
    if not whole:
        yield f"No rows yet: `{command}`.\n"
        return
    yield (
        f"Microseconds, selection included, and times faster than dense attention in the same run (the paper's figure "
        f"4). `{command}`, `--suite budgets`, `--suite blocks`; cases in blocks of 32 at their own commits, whose "
        "default they were\n"
    )
    yield from _picture(results / "operator-lengths-qwen3-8b.svg", base, "Times faster than dense, over the context")
    rows = [("GPU", "case", *OPERATORS.values(), "runs", "commit")]
    order = sorted(whole.items(), key=lambda x: (x[0][0], *_shape(x[1]["triton_total"])))
    for (gpu, case), found in order:
        dense = found[DENSE].median_us
        cells = [_faster(found[p].median_us, dense) if p in found else "" for p in OPERATORS if p != DENSE]
        ours = found["triton_total"]
        rows.append((gpu, f"`{case}`", _us(dense), *cells, str(ours.runs), ours.commit[:7]))
    yield table(rows)


def _steps(steps: Sequence[ModelRow], results: Path, base: Path) -> Iterator[str]:
    yield "## A step of the whole model\n"
    command = "python -m bench run decode --batch 1,4 --contexts 256,8192,98304,131072"
    newest = {(row.gpu, row.case, row.n_layers, row.B, row.context, row.provider, row.blocks_of): row
              for row in steps}  # fmt: skip
    if not newest:
        yield f"No rows yet: `{command}`.\n"
        return
    yield (
        "Milliseconds, the newest row of each, and the dense loop's over it where both took turns in one run, tuned "
        "over tuned and skinny over skinny. "
        f"`python -m bench run decode --batch {_listed(row.B for row in steps)} --contexts "
        f"{_listed(row.context for row in steps)}`, with `--providers` of the table, `--model qwen3-14b`, "
        "and `--layers` where it says that there were fewer\n"
    )
    yield from _picture(results / "decode.svg", base, "Milliseconds of a step over the context")
    rows = [("GPU", "model", "layers", "rows", "tokens", "provider", "blocks of", "ms (p10 to p90)", "dense / this",
             "tokens/s", "runs", "commit")]  # fmt: skip
    for key, row in sorted(newest.items(), key=lambda x: (x[0][:5], x[1].ms_median)):
        dense = next((newest[x] for name in _baselines(row.provider) if (x := (*key[:5], name, None)) in newest), None)
        together = dense is not None and dense.commit == row.commit and dense.provider != row.provider
        ratio = f"{dense.ms_median / row.ms_median:.2f}" if dense is not None and together else ""
        rows.append((
            row.gpu, row.case, str(row.n_layers), str(row.B), f"{row.context:,}", f"`{row.provider}`",
            str(row.blocks_of or ""), f"{row.ms_median:.2f} ({row.ms_p10:.2f} to {row.ms_p90:.2f})", ratio,
            f"{row.tokens_per_second:,.0f}", str(row.runs), row.commit[:7],
        ))  # fmt: skip
    yield table(rows)


def _baselines(provider: str) -> tuple[str, ...]:
    """Dense steps of the same products and options, the nearest first."""
    if "_skinny" in provider:
        nearest = "dense_skinny_overlapped" if provider.endswith("_overlapped") else "dense_skinny"
        return nearest, "dense_skinny"
    if provider.endswith("_overlapped"):
        return "dense_overlapped", "dense"
    return ("dense_tuned",) if provider.endswith("_tuned") else ("dense",)


def _throughput(
    offload: Sequence[dict[str, Any]], steps: Sequence[ModelRow], pictures: Path, base: Path
) -> Iterator[str]:
    yield "## Throughput\n"
    command = "python -m bench run throughput"
    rows = [row for row in offload if row.get("part") == "throughput" and row["model"] != "tiny"]
    # Where all is on the device the decode bench has the steps, of the largest batch too
    largest: dict[tuple[str, int, str], ModelRow] = {}
    for step in steps:
        key = (step.gpu, step.context, step.provider)
        known = any(key[:2] == (row["gpu"], row["context"]) for row in rows)
        whole = step.case == "qwen3-8b" and step.n_layers == SIZES[step.case].layers
        if known and whole and step.provider in ("dense", "two_level"):
            largest[key] = max(largest.get(key, step), step, key=lambda row: (row.B, row.date))
    rows += [
        {"gpu": step.gpu, "context": step.context, "gpu_gb": None, "provider": step.provider, "B": step.B,
         "us_median": 1e3 * step.ms_median, "tokens_per_second": step.tokens_per_second, "runs": step.runs,
         "commit": step.commit}
        for step in largest.values()
    ]  # fmt: skip
    # The host's memory says how large a batch is, and so is another case
    newest = {(row["gpu"], row["context"], row["gpu_gb"] or 0, row["provider"], row["B"]): row for row in rows}
    if not newest:
        yield f"No rows yet: `{command}`.\n"
        return
    yield (
        "Tokens a second at the largest batch that fits device and host, or that `--gpu-gb`, `--host-gb` and `--most` "
        "allow, one provider after the other, and of several commits (the paper's figure 6). Selections of offloaded "
        f"caches follow a made trace. `{command} --contexts {_listed(row['context'] for row in rows)}`"
        + "".join(f", `--gpu-gb {x:g}`" for x in sorted({row["gpu_gb"] for row in rows} - {None}))
        + "\n"
    )
    ordered = [newest[key] for key in sorted(newest)]
    path = pictures / "throughput.svg"
    save(_bars(ordered), path)
    yield f"![Tokens a second]({link(path, base)})\n"
    lines = [("GPU", "tokens a row", "GB of GPU memory", "provider", "rows", "ms a step", "tokens/s", "times the dense",
              "hits", "MB fetched a step", "runs", "commit")]  # fmt: skip
    for row in ordered:
        dense = _best_dense(ordered, row)
        lines.append((
            row["gpu"], f"{row['context']:,}", f"{row['gpu_gb']:.0f}" if row["gpu_gb"] else "all",
            f"`{row['provider']}`", str(row["B"]), f"{row['us_median'] / 1e3:.1f}", f"{row['tokens_per_second']:,.0f}",
            _times(row["tokens_per_second"] / dense) if dense and row["provider"] != "dense" else "",
            f"{row['hit_rate']:.1%}" if "hit_rate" in row else "",
            f"{row['fetched_bytes'] / 1e6:,.0f}" if "fetched_bytes" in row else "", str(row["runs"]),
            row["commit"][:7],
        ))  # fmt: skip
    yield table(lines)


def _policies(offload: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## What a pool on the device loses\n"
    command = "python -m bench run offload --parts quality"
    found = {
        (row["text"], row["provider"], row["pool_over_budget"], row["block_budget"], row["gpu"]): row
        for row in offload
        if row["bench"] == "offload_quality"
    }
    if not found:
        yield f"No rows yet: `{command}`.\n"
        return
    yield (
        "Staleness and policies: keys and values in host memory, real weights, and a pool of a multiple of the block "
        f"budget. KL to the same cache without offload, and to dense attention. `{command}{_pool_options(found)}`\n"
    )
    rows = [("GPU", "text", "policy", "pool / budget", "blocks, tokens", "hits", "mass missing", "steps that wait",
             "KL to no offload", "KL to dense", "without offload", "tokens", "commit")]  # fmt: skip
    rows += [
        (row["gpu"], row["text"], f"`{row['provider']}`", f"{row['pool_over_budget']:g}",
         f"{row['block_budget']:,}, {row['token_budget']:,}", f"{row['hit_rate']:.1%}", f"{row['missing_mass']:.2%}",
         f"{row['waits']:.0%}", f"{row['kl_to_no_offload']:.4f}", f"{row['kl_dense_to_this']:.4f}",
         f"{row['kl_dense_to_no_offload']:.4f}", str(row["scored"]), row["commit"][:7])
        for row in found.values()
    ]  # fmt: skip
    yield table(rows)


def _pool_options(found: Mapping[Any, dict[str, Any]]) -> str:
    """Options of the rows' command."""
    rows = list(found.values())
    texts, providers = (",".join(dict.fromkeys(row[field] for row in rows)) for field in ("text", "provider"))
    return (
        f" --tokens {_listed(row['context'] + row['scored'] for row in rows)} --pool "
        f"{_listed(row['pool_over_budget'] for row in rows)} --block-budget "
        f"{_listed(row['block_budget'] for row in rows)} --token-budget {_listed(row['token_budget'] for row in rows)} "
        f"--providers {providers} --texts '{texts}'" + " --device cpu" * all(row["gpu"] == "cpu" for row in rows)
    )


def _listed(values: Iterable[float]) -> str:
    """Different numbers as an option takes them."""
    return ",".join(f"{x:.10g}" for x in sorted(set(values)))


def _bars(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 0.32 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [
        f"{row['context'] // 1024}k, {row['provider']}, B {row['B']}, {row['gpu']}"
        + (f", {row['gpu_gb']:.0f} GB of it" if row["gpu_gb"] else "")
        for row in rows
    ]
    reads_all = ("dense", "transformers_offloaded")
    colours = [COLOURS["dense" if row["provider"] in reads_all else "two_level"] for row in rows]
    bars = axes.barh(range(len(rows)), [row["tokens_per_second"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['tokens_per_second']:,.0f}" for row in rows], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("tokens a second, all rows together")
    axes.set_title("The largest batch that fits; blue: every token is read", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _best_dense(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float:
    """Tokens a second of the dense loop at the row's context and memory, on its GPU; 0 if not measured."""
    same = ("gpu", "context", "gpu_gb")
    return max(
        (x["tokens_per_second"] for x in rows if x["provider"] == "dense" and all(x[k] == row[k] for k in same)),
        default=0.0,
    )


def _picture(path: Path, base: Path, title: str) -> Iterator[str]:
    """A picture that another command draws, where it has been drawn."""
    if path.exists():
        yield f"![{title}]({link(path, base)})\n"


def _shape(row: Row) -> tuple[int, ...]:
    return row.HQ, row.B, row.S, row.block_size, row.block_budget, row.token_budget or 0


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def _faster(us: float, dense: float) -> str:
    return f"{_us(us)} ({dense / us:.1f})"


def _times(x: float) -> str:
    return f"{x:.1f}" if x >= 0.1 else f"{x:.3f}"
