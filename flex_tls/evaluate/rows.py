"""Results as rows, one JSON line a document or sample and method: appended as they come, skipped when present."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import jsonl

Key = tuple[str, ...]
# Fields of TLSConfig that came after the first rows, at what these were measured with
ADDED = {"sparse_from_tokens": 0, "block_shares": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What the rows of one run share: the model, and what measured.

    ``triton`` and ``driver`` (of the GPU): "" where there is none, and in rows from before they were noted.
    """

    model: str
    dtype: str
    device: str
    flex_tls: str
    torch: str
    transformers: str
    commit: str
    date: str
    python: str = ""
    triton: str = ""
    driver: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Origin):
    """Fields of every row.

    Attributes:
        eval: its kind, of :data:`KINDS`.
        method: its name, with settings.
        config: the fields of its ``TLSConfig``; None for dense attention.
        backend: that ran it: "triton", "flex" or "reference"; "sdpa" for dense attention, "eviction" for H2O's.
        index_share, read_share: bytes of the index, and bytes that a step reads, as shares of the bytes of keys and
            values in 16 bits (:func:`.methods.cost`).
        digest: of the token ids that were read.
    """

    eval: str
    method: str
    config: dict[str, Any] | None
    backend: str
    index_share: float
    read_share: float
    digest: str

    @property
    def key(self) -> Key:
        """Two rows of one key measured the same thing."""
        return key_of(self, self.eval, self.digest, self.method, self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PplRow(Row):
    """One document under one method; means over its scored tokens.

    Attributes:
        document: name of the file.
        context_tokens: tokens before the first scored one.
        score_tokens: tokens scored, teacher-forced.
        step_tokens: of them, fed to one decode step.
        kl: KL(dense || method) per token, natural log.
        nll, nll_dense: negative log-likelihood per token, of the method and of dense attention in the same run.
        agreement: share of tokens whose likeliest next token is dense attention's.
        top1, log_p: of each scored token, the likeliest in its place and its own log-probability; dense rows have them.
    """

    document: str
    context_tokens: int
    score_tokens: int
    step_tokens: int
    kl: float
    nll: float
    nll_dense: float
    agreement: float
    top1: list[int] | None = None
    log_p: list[float] | None = None

    @property
    def key(self) -> Key:
        """As in :class:`Row`, and the split into context and scored tokens."""
        return ppl_key_of(self, self.digest, self.method, self.config, self.context_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRow(Row):
    """One sample of one task, made on the spot ("retrieval") or from a file ("tasks"), under one method.

    Attributes:
        task: name of the task or data set.
        length_tokens: length that was asked for; ``prompt_tokens``: what it came to.
        depth: where the needles asked for lie, 0 at the start and 1 at the end; None for random places.
        seed: of the sample; its line in the file, from 0.
        template: digest of the tokenizer's chat template; "" without one.
        references: what the answer should hold.
        prediction: what the model wrote.
        score: of the prediction by the task's metric, 0 to 1.
    """

    task: str
    length_tokens: int
    prompt_tokens: int
    depth: float | None
    seed: int
    template: str
    references: list[str]
    prediction: str
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionRow(Row):
    """What one method's selections catch of full attention in one document; fields as in :class:`.probe.Catch`."""

    document: str
    context_tokens: int
    score_tokens: int
    layers: list[int]
    mass_blocks: list[list[float]]
    mass_tokens: list[list[float]]
    heavy_blocks: list[list[float]]
    heavy_tokens: list[list[float]]
    locality: list[float]
    missed_bound: list[list[float]]

    @property
    def key(self) -> Key:
        """As in :class:`PplRow`."""
        return (*super().key, str(self.context_tokens))


KINDS: dict[str, type[Row]] = {
    "ppl": PplRow,
    "retrieval": AnswerRow,
    "tasks": AnswerRow,
    "attention": AttentionRow,
}


def key_of(origin: Origin, eval: str, digest: str, method: str, config: dict[str, Any] | None) -> Key:
    """The ``key`` of a row that need not have been measured yet."""
    return (eval, origin.model, origin.dtype, digest, method, config_key(config))


def ppl_key_of(origin: Origin, digest: str, method: str, config: dict[str, Any] | None, context_tokens: int) -> Key:
    """As :func:`key_of`, of a :class:`PplRow`."""
    return (*key_of(origin, "ppl", digest, method, config), str(context_tokens))


def text_digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a text; "" of none."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def config_key(config: dict[str, Any] | None) -> str:
    """A configuration as text, equal if its fields are."""
    return json.dumps(config, sort_keys=True)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file; see :mod:`flex_tls.jsonl`."""
    jsonl.append(path, rows)


def read(path: Path) -> list[Row]:
    """Every whole line of a file as a row, in order; none if there is no file.

    Raises:
        ValueError: a line that is no row; names it.
    """
    return jsonl.read(path, _row, "expected a row of flex-tls eval; use another --out")


def _row(found: dict[str, Any]) -> Row:
    if found["config"] is not None:
        found["config"] = {**ADDED, **found["config"]}
    return KINDS[found["eval"]](**found)
