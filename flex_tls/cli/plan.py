"""``flex-tls plan``: bytes of a context with and without offload, what fits, the least time of a step, what pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..cache import TLSCache
from ..config import TLSConfig
from ..offload import OffloadConfig, host_bytes_available

# What :func:`largest` says where nothing bounds it
ANY = 2**30


@dataclass(frozen=True)
class Placement:
    """Where a cache's bytes are, what would fit, and how fast it is at best.

    Attributes:
        device_bytes: weights, keys and values that stay, index and pools.
        pool_bytes: of the pools alone; 0 without offload.
        host_bytes: of keys and values in host memory.
        fits: whether both are there.
        largest_batch: rows of the context that fit; 0 for none, :data:`ANY` if nothing bounds them.
        largest_context: tokens a row that fit at the batch; as above.
        step_ms: least time of a step; None without measured rates.
        tokens_per_s: most tokens a second, at the largest batch; None without rates or such a batch.
    """

    device_bytes: int
    pool_bytes: int
    host_bytes: int
    fits: bool
    largest_batch: int
    largest_context: int
    step_ms: float | None
    tokens_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """Everything that ``plan`` reports; bytes a second as measured on this machine, None without CUDA."""

    batch: int
    context: int
    weight_bytes: int
    gpu_bytes: int | None
    host_bytes: int | None
    device_bytes_per_s: float | None
    link_bytes_per_s: float | None
    missing: float
    resident: Placement
    offloaded: Placement


def make_plan(
    model_name: str, cfg: TLSConfig, offload: OffloadConfig, batch: int, context: int, gpu_gb: float | None,
    host_gb: float | None, missing: float,
) -> Plan:  # fmt: skip
    """Plan for the model's configuration; no weights are read, no buffers allocated.

    Raises:
        ValueError: a model that is not supported, a pool too small.
    """
    config, weight_bytes = _model(model_name)
    cuda = torch.cuda.is_available()
    gpu = int(gpu_gb * 1e9) if gpu_gb is not None else torch.cuda.mem_get_info()[1] if cuda else None
    host = int(host_gb * 1e9) if host_gb is not None else host_bytes_available()
    rates = _rates()

    def placement(away: OffloadConfig | None) -> Placement:
        def cache(b: int, n: int) -> TLSCache:
            return TLSCache(config, cfg, batch_size=b, max_len=n, offload=away)

        def fits(b: int, n: int) -> bool:
            made = cache(b, n)
            on_device = weight_bytes + made.device_nbytes
            return (gpu is None or on_device <= gpu) and (host is None or made.host_nbytes <= host)

        made, rows = cache(batch, context), largest(lambda b: fits(b, context))
        step_ms = tokens_per_s = None
        if rates is not None:
            step_ms = _step_ms(made, weight_bytes, context, missing, *rates)
            if 0 < rows < ANY:
                tokens_per_s = rows * 1e3 / _step_ms(cache(rows, context), weight_bytes, context, missing, *rates)
        return Placement(
            weight_bytes + made.device_nbytes, made.pools_nbytes, made.host_nbytes, fits(batch, context), rows,
            largest(lambda n: fits(batch, n), cfg.block_size), step_ms, tokens_per_s,
        )  # fmt: skip

    read_rate, link_rate = rates or (None, None)
    return Plan(
        batch, context, weight_bytes, gpu, host, read_rate, link_rate, missing, placement(None), placement(offload)
    )


def largest(fits: Callable[[int], bool], unit: int = 1, most: int = ANY) -> int:
    """Largest multiple of ``unit`` that fits, given that what is smaller fits too; 0 if none, ``most`` at most."""
    low, high = 0, 1
    while high * unit < most and fits(high * unit):
        low, high = high, 2 * high
    if high * unit >= most:
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    return low * unit


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as a table."""
    table = Table(title=f"{plan.batch} x {plan.context:,} tokens", title_justify="left")
    for name in ("", "on the device", "offloaded"):
        table.add_column(name, justify="left" if not name else "right")
    both = (plan.resident, plan.offloaded)

    def row(name: str, text: Callable[[Placement], str]) -> None:
        table.add_row(name, *(text(x) for x in both))

    row("device, weights included", lambda x: _gb(x.device_bytes))
    row("device, pools alone", lambda x: _gb(x.pool_bytes))
    row("host", lambda x: _gb(x.host_bytes))
    row("fits", lambda x: "yes" if x.fits else "no")
    row(f"largest batch at {plan.context:,} tokens", lambda x: _most(x.largest_batch))
    row(f"longest context at batch {plan.batch}", lambda x: _most(x.largest_context))
    row("least time of a step", lambda x: "not known" if x.step_ms is None else f"{x.step_ms:.1f} ms")
    row(
        "most tokens a second, at the largest batch",
        lambda x: "not known" if x.tokens_per_s is None else f"{x.tokens_per_s:,.0f}",
    )
    console.print(table)
    known = [f"weights {_gb(plan.weight_bytes)}"]
    known += [f"device memory {_gb(plan.gpu_bytes)}"] if plan.gpu_bytes is not None else []
    known += [f"host memory {_gb(plan.host_bytes)}"] if plan.host_bytes is not None else []
    if plan.device_bytes_per_s is not None and plan.link_bytes_per_s is not None:
        known += [f"reads {plan.device_bytes_per_s / 1e9:,.0f} GB/s", f"link {plan.link_bytes_per_s / 1e9:.1f} GB/s"]
    console.print(", ".join(known), highlight=False)
    console.print(verdict(plan), highlight=False)


def verdict(plan: Plan) -> str:
    """Whether offload pays: what fits, and the more tokens a second at the largest batch."""
    here, away = plan.resident, plan.offloaded
    if not away.largest_batch:
        return "offload does not pay: not a row of that context fits"
    if not here.largest_batch:
        return "offload pays: a row of that context fits in no other way"
    only = f"; {plan.batch} x {plan.context:,} tokens fit in no other way" if away.fits and not here.fits else ""
    rows = f"{_most(away.largest_batch)} rows, without it {_most(here.largest_batch)}"
    if here.tokens_per_s is None or away.tokens_per_s is None:
        return f"offload holds {rows}{only}; which is faster is not known: rates are measured on a CUDA device"
    pays = "pays" if away.tokens_per_s > here.tokens_per_s else "does not pay"
    speeds = f"{away.tokens_per_s:,.0f} tokens a second, without it {here.tokens_per_s:,.0f}"
    return f"offload {pays}: at best {speeds}, at the largest batches: {rows}{only}"


def _step_ms(
    cache: TLSCache, weight_bytes: int, context: int, missing: float, read_rate: float, link_rate: float
) -> float:
    """Bytes over rates: weights, labels, and what is attended to; fetches beside that, or, ``exact``, added to it.

    Of an exact step's fetches a layer's own attention hides some, which is left out.
    """
    cfg, shape = cache.cfg, cache.shape
    n_sparse = sum(not cfg.is_dense(i) for i in range(shape.n_layers))
    away, heads = cache.offload_config, shape.n_kv_heads * cache.batch_size
    token_bytes = 2 * heads * shape.head_dim * cache.dtype.itemsize
    away_bytes = token_bytes if away is None else heads * away.token_bytes(shape.head_dim, cache.dtype.itemsize)
    n_away = len(cache.offloaded_layers)
    kept = min(context, cfg.block_budget if cfg.token_budget is None else cfg.token_budget)
    attended = ((n_sparse - n_away) * kept + (shape.n_layers - n_sparse) * context) * token_bytes
    attended += n_away * kept * away_bytes
    read_s = (weight_bytes + cache.index_nbytes + attended) / read_rate
    if away is None:
        return read_s * 1e3
    fetch_s = missing * min(context, cfg.block_budget) * away_bytes * n_away / link_rate
    return (read_s + fetch_s if away.policy == "exact" else max(read_s, fetch_s)) * 1e3


def _model(name: str) -> tuple[Any, int]:
    """(configuration, bytes of the weights in their dtype)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{name!r} could not be read: {error}", param_hint="--model") from error
    dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call,unused-ignore]
    return config, sum(x.numel() * x.element_size() for x in model.parameters())


def _rates() -> tuple[float, float] | None:
    """Bytes a second that the device reads of its own memory and over the link; None without CUDA."""
    return (_read_rate(), _link_rate()) if torch.cuda.is_available() else None


def _read_rate() -> float:
    x = torch.ones(2**28, device="cuda")
    return x.nbytes / _seconds(lambda: x.sum())


def _link_rate() -> float:
    host, device = torch.ones(2**26, pin_memory=True), torch.empty(2**26, device="cuda")
    return host.nbytes / _seconds(lambda: device.copy_(host, non_blocking=True))


def _seconds(call: Callable[[], object]) -> float:
    """Median of nine calls, by the device's clock."""
    taken: list[float] = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call,unused-ignore]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return sorted(taken[2:])[4]


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"


def _most(n: int) -> str:
    return "any" if n >= ANY else f"{n:,}"
