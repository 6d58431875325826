"""Long texts to score: the user's files, or the source of Python's standard library, which every machine has."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .rows import text_digest


class Document(NamedTuple):
    """The first tokens of one file. ``name``: its own and its folder's; ``digest``: hex, of the token ids."""

    name: str
    token_ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        return digest(self.token_ids)


def digest(token_ids: Iterable[int]) -> str:
    """Digest of token ids."""
    return text_digest(",".join(map(str, token_ids)))


def library_files() -> list[Path]:
    """The standard library's modules, by name."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as all files below them, by name."""
    found: list[Path] = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return found


def read_documents(paths: Sequence[Path], tokenizer: Any, n_tokens: int, limit: int) -> list[Document]:
    """The first ``n_tokens`` of each file that is long enough, at most ``limit`` files, in order.

    One document a file, and none twice: intervals resample documents, which must be independent. Bytes that are not
    UTF-8 are replaced.

    Raises:
        ValueError: no file is long enough.
    """
    found: dict[tuple[int, ...], Document] = {}
    for path in expand(paths):
        if len(found) == limit:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        # A token takes a byte or more: what is shorter need not be tokenised
        if len(text.encode()) >= n_tokens:
            token_ids = tuple(tokenizer(text).input_ids[:n_tokens])
            if len(token_ids) == n_tokens:
                found.setdefault(token_ids, Document(f"{path.parent.name}/{path.name}", token_ids))
    if not found:
        raise ValueError(
            f"documents: expected files of at least {n_tokens} tokens, none of {len(paths)} given is; lower "
            "--context-tokens or --score-tokens, or give longer files"
        )
    return list(found.values())
