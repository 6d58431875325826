"""``python -m flex_tls.cli`` is ``flex-tls``."""

from __future__ import annotations

from . import main

main()
