"""What the offload engine did, as a table, once or while it decodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..offload import LayerStats

# Reading the counters waits for the device
REFRESH_S = 0.25
SHOWN_CHARACTERS = 200


def megabytes(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{n_bytes / 1e6:,.1f} MB"


def offload_table(stats: dict[int, LayerStats], *, layers: bool) -> Table:
    """All layers together and, with ``layers``, each below that."""
    names = ("layer", "hits", "missing mass", "waits", "stall per step", "in per step", "out per step", "slots used")
    each = list(stats.values())
    title = f"keys and values in host memory; transfer: {each[0].transfer}; steps: {each[0].steps:,}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("mean", *_cells(each))
    for layer, one in stats.items() if layers else ():
        table.add_row(str(layer), *_cells([one]))
    return table


def print_offload(stats: dict[int, LayerStats], console: Console, *, layers: bool) -> None:
    """The table, and the bytes of host memory and pools below it."""
    each = list(stats.values())
    console.print(offload_table(stats, layers=layers))
    console.print(
        f"host: {megabytes(sum(x.host_bytes for x in each))}; pools on the device: "
        f"{megabytes(sum(x.pool_bytes for x in each))}, {len(each)} layers",
        highlight=False,
    )


class LiveStats:
    """The end of a text and the table below it, both renewed in a terminal while the text grows; gone at the exit.

    ``read`` is called at most every :data:`REFRESH_S` seconds, and never where the console is no terminal.
    """

    def __init__(self, read: Callable[[], dict[int, LayerStats]], console: Console) -> None:
        self._read, self._due = read, 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveStats:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def show(self, text: str) -> None:
        """Show the whole text so far, if it is time."""
        if not self._live.console.is_terminal or time.monotonic() < self._due:
            return
        # The mean comes first: a terminal that is not high enough cuts the last layers
        table = offload_table(self._read(), layers=True)
        self._live.update(Group(Text(text[-SHOWN_CHARACTERS:]), table), refresh=True)
        self._due = time.monotonic() + REFRESH_S


def _cells(stats: Sequence[LayerStats]) -> tuple[str, ...]:
    n = len(stats)
    return (
        f"{sum(x.hit_rate for x in stats) / n:.1%}",
        f"{sum(x.missing_mass for x in stats) / n:.2%}",
        f"{sum(x.waits for x in stats) / n:.1%}",
        f"{sum(x.stall_us for x in stats) / n:.0f} us",
        megabytes(sum(x.step_bytes_in for x in stats) / n),
        megabytes(sum(x.step_bytes_out for x in stats) / n),
        f"{sum(x.used_slots for x in stats) / sum(x.pool_slots for x in stats):.0%}",
    )
