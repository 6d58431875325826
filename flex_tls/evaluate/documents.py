"""Long texts to score: the user's files, a data set, or the source of Python's standard library, always there."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .rows import text_digest

# Of a data set: one of short texts could go on for ever
MOST_EXAMPLES = 10_000


class Document(NamedTuple):
    """The first tokens of one text. ``name``: where it is from; ``digest``: hex, of the token ids."""

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
    texts = ((f"{p.parent.name}/{p.name}", p.read_text(encoding="utf-8", errors="replace")) for p in expand(paths))
    wanted = f"files of at least {n_tokens} tokens, none of {len(paths)} given"
    return _documents(texts, tokenizer, n_tokens, limit, wanted)


def read_dataset(
    name: str, tokenizer: Any, n_tokens: int, limit: int, *, split: str = "train", column: str = "text"
) -> list[Document]:
    """As :func:`read_documents`, from a data set that the library ``datasets`` reads: streamed, as far as is needed.

    Args:
        name: of a data set on the Hugging Face hub, or a folder of text, JSON or Parquet files; ``NAME:CONFIG`` for one
            of several configurations.
        split, column: where the texts are. At most the first :data:`MOST_EXAMPLES` are looked at.

    Raises:
        ValueError: ``datasets`` is not installed or cannot read this, or no text is long enough.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            "dataset: expected the library datasets, which is not installed; pip install 'flex_tls[datasets]'"
        ) from error
    path, _, config = name.partition(":")
    try:
        examples = islice(load_dataset(path, config or None, split=split, streaming=True), MOST_EXAMPLES)
        texts = ((f"{name}/{split}/{i}", _text(example, column)) for i, example in enumerate(examples))
        wanted = f"texts of at least {n_tokens} tokens, none of the first {MOST_EXAMPLES:,} in {name!r}"
        return _documents(texts, tokenizer, n_tokens, limit, wanted)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"dataset: {name!r} could not be read: {error}") from error


def _text(example: dict[str, Any], column: str) -> str:
    text = example.get(column)
    if not isinstance(text, str):
        raise ValueError(f"column: expected one that holds text, got {column!r}; there are {', '.join(example)}")
    return text


def _documents(
    texts: Iterable[tuple[str, str]], tokenizer: Any, n_tokens: int, limit: int, wanted: str
) -> list[Document]:
    """Documents of (name, text), read no further than is needed."""
    found: dict[tuple[int, ...], Document] = {}
    for name, text in texts:
        # A token takes a byte or more: what is shorter need not be tokenised
        if len(text.encode()) >= n_tokens:
            token_ids = tuple(tokenizer(text).input_ids[:n_tokens])
            if len(token_ids) == n_tokens:
                found.setdefault(token_ids, Document(name, token_ids))
        if len(found) == limit:
            break
    if not found:
        raise ValueError(
            f"documents: expected {wanted} is; lower --context-tokens or --score-tokens, or give longer texts"
        )
    return list(found.values())
