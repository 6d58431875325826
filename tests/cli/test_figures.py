"""Pictures into files."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from flex_tls.cli.figures import save


def drawn() -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], marker="o", label="a line")
    axes.legend()
    return figure


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_the_same_picture_is_the_same_file(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "new" / f"first.{ending}", tmp_path / f"second.{ending}"
    save(drawn(), first)
    # What matplotlib takes for the time
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    save(drawn(), second)
    assert first.read_bytes() == second.read_bytes()
