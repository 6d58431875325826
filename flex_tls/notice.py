"""What a person sees while something takes long: a bar for what can be counted, a clock for what cannot."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CLOCK_SECONDS = 0.5


def is_shown(progress: bool | None) -> bool:
    """Whether to show anything; None: if stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def bar(what: str, total: int, unit: str, shown: bool) -> Any:
    """A tqdm bar on stderr; use it as a context."""
    # transformers needs tqdm
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

    return tqdm(total=total, desc=what, unit=unit, disable=not shown)


@contextmanager
def clock(what: str, shown: bool) -> Iterator[None]:
    """A line on stderr with the time that has passed, while the body blocks this thread."""
    if not shown:
        yield
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

    over = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}") as line:

        def tick() -> None:
            while not over.wait(CLOCK_SECONDS):
                line.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
