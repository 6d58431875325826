"""What the tests of offloaded caches share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


@pytest.fixture
def no_block_is_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine of every test is checked after every step."""
    from flex_tls.offload import LayerOffload

    step = LayerOffload.step

    def checked(self: LayerOffload, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = step(self, *args, **kwargs)
        self.check_integrity()
        return result

    monkeypatch.setattr(LayerOffload, "step", checked)
