"""The command line ``flex-tls``: ``demo``, ``generate`` and ``inspect``."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
