"""Texts of a data set: by the library itself where it is installed, otherwise by one that is made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from flex_tls.evaluate import documents
from flex_tls.evaluate.documents import read_dataset

TEXTS = ["too short", "a" * 50, "b" * 60, "a" * 70, "c" * 50, "d" * 50]


def letters(text: str) -> SimpleNamespace:
    """A tokenizer of single letters."""
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


class Library(ModuleType):
    """``datasets`` with one data set; counts what is read of it, and notes how it was asked for."""

    asked: Any = None
    error: Exception | None = None
    n_read = 0

    def load_dataset(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        self.asked = (args, kwargs)
        if self.error is not None:
            raise self.error
        return self._read()

    def _read(self) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(TEXTS):
            self.n_read += 1
            yield {"id": i, "text": text}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made_up = Library("datasets")
    monkeypatch.setitem(sys.modules, "datasets", made_up)
    return made_up


def test_long_enough_texts_are_taken_once_and_read_no_further(library: Library) -> None:
    found = read_dataset("books:old", letters, 40, 3, split="test")
    assert [(x.name, chr(x.token_ids[0]), len(x.token_ids)) for x in found] == [
        ("books:old/test/1", "a", 40), ("books:old/test/2", "b", 40), ("books:old/test/4", "c", 40),
    ]  # fmt: skip
    assert library.asked == (("books", "old"), {"split": "test", "streaming": True})
    assert library.n_read == 5


def test_a_name_without_configuration_asks_for_none(library: Library) -> None:
    read_dataset("me/books", letters, 5, 1)
    assert library.asked == (("me/books", None), {"split": "train", "streaming": True})


def test_short_texts_are_not_looked_at_for_ever(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_EXAMPLES", 4)
    with pytest.raises(ValueError, match="texts of at least 80 tokens, none of the first 4 in 'books' is"):
        read_dataset("books", letters, 80, 1)
    assert library.n_read == 4


def test_what_cannot_be_read_says_why(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"column: expected one that holds text, got 'body'; there are id, text"):
        read_dataset("books", letters, 5, 1, column="body")
    with pytest.raises(ValueError, match=r"column: expected one that holds text, got 'id'"):
        read_dataset("books", letters, 5, 1, column="id")
    library.error = FileNotFoundError("no such thing")
    with pytest.raises(ValueError, match="dataset: 'books' could not be read: no such thing"):
        read_dataset("books", letters, 5, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'flex_tls\[datasets\]'"):
        read_dataset("books", letters, 5, 1)


def test_a_folder_is_read_by_the_library_itself(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "texts.jsonl").write_text(lines)
    found = read_dataset(str(tmp_path), letters, 40, 2, column="body")
    assert [chr(x.token_ids[0]) for x in found] == ["a", "b"]
    with pytest.raises(ValueError, match="none"):
        read_dataset(str(tmp_path), letters, 40, 2, column="body", split="none")
