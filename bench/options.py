"""Options that the commands of the bench share."""

from __future__ import annotations

import argparse


def add_machine(parser: argparse.ArgumentParser, *, device: str = "cuda", quick: bool = False) -> None:
    """Where a command measures, and what its rows say of the tree."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    if quick:
        parser.add_argument(
            "--quick", action="store_true", help="tiny shapes: every line runs, no figure means anything"
        )
    parser.add_argument("--commit", help="for a checkout without git's history; asked of git by default")
    parser.add_argument("--dirty", action="store_true", help="with --commit: the tree differs from that commit")


def numbers(text: str) -> list[int]:
    """``1,2,4``."""
    return [int(part) for part in text.split(",") if part]


def shares(text: str) -> list[float]:
    """``1.1,2``."""
    return [float(part) for part in text.split(",") if part]
