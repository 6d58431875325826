"""Page-locked memory, counted: in front of CUDA's runtime, or in its place where there is no device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from flex_tls.offload import HostStore


class Registry:
    """Stands for ``torch.cuda.cudart()``. ``refused``: the number, from 1 on, of a registration that fails."""

    def __init__(self, real: Any = None) -> None:
        self.real = real
        self.refused: int | None = None
        self.asked = 0
        # Bytes by address
        self.held: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self.held.values())

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:
        self.asked += 1
        if self.asked == self.refused:
            return self.refuse(address, n_bytes)
        assert address not in self.held
        status = 0 if self.real is None else int(self.real.cudaHostRegister(address, n_bytes, flags))
        if status == 0:
            self.held[address] = n_bytes
        return status

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0 if self.real is None else int(self.real.cudaHostUnregister(address))

    def refuse(self, address: int, n_bytes: int) -> int:
        """A status other than 0; CUDA's own where it is there, which refuses what is registered already."""
        if self.real is None:
            return 2
        assert int(self.real.cudaHostRegister(address, n_bytes, 0)) == 0
        status = int(self.real.cudaHostRegister(address, n_bytes, 0))
        self.real.cudaHostUnregister(address)
        return status

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def count_page_locked(monkeypatch: pytest.MonkeyPatch, device: str) -> Registry:
    """What caches on ``device`` lock and give back from here on; those on a CPU are made to lock too."""
    registry = Registry(torch.cuda.cudart() if torch.cuda.is_available() else None)
    if registry.real is None:
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr("flex_tls.offload.store._forget_error", lambda: None)
    if device == "cpu":
        monkeypatch.setattr("flex_tls.offloaded_layer.HostStore", partial(_locked, HostStore))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: registry)
    return registry


def _locked(made: type[HostStore], **kwargs: Any) -> HostStore:
    return made(**{**kwargs, "pinned": True})
