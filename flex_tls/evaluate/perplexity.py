"""Teacher-forced decoding of documents, one token a step: how far each method's predictions are from dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention import Backend
from .methods import DENSE, Method, cost
from .prefilled import Prefilled, Step


@dataclass(frozen=True)
class Score:
    """One document under one method: means over the scored tokens; fields as in :class:`.rows.PplRow`."""

    kl: float
    nll: float
    nll_dense: float
    agreement: float
    backend: str
    index_share: float
    read_share: float
    top1: list[int] | None = None
    log_p: list[float] | None = None


def score_documents(
    model: Any,
    ids: Tensor,
    context_tokens: int,
    methods: Sequence[Method],
    *,
    backend: Backend = "auto",
    step_tokens: int = 1,
    on_step: Callable[[str], None] = lambda method: None,
) -> Iterator[tuple[Method, list[Score]]]:
    """Score B documents side by side under every method; dense attention runs first, whether asked for or not.

    Token ``context_tokens`` and all later ones are scored. The step that scores a token reads the one before it, so
    that every scored token went through the method's decode path; what came earlier is read as a prompt, once.
    Steps of several tokens give the same, faster: every query token selects for itself, and sees what came before it.

    Args:
        model: a causal model of transformers.
        ids: int64 [B, S], documents of equal length.
        context_tokens: tokens before the first scored one, at least 2.
        methods: what to compare with dense attention.
        backend: of every method, see :meth:`.prefilled.Prefilled.backend_for`.
        step_tokens: tokens that a decode step is fed, at most a method's ``sparse_query_tokens`` (longer steps would be
            dense).
        on_step: called with the method's name after every step.

    Yields:
        Each method with a score a document, as soon as it is known.
    """
    b, s = ids.shape
    n_scored = s - context_tokens
    if context_tokens < 2 or n_scored < 1:
        raise ValueError(f"context_tokens: expected 2 to {s - 1}, with {s} tokens a document, got {context_tokens}")
    most = min([m.cfg.sparse_query_tokens for m in methods if m.cfg is not None], default=step_tokens)
    if not 1 <= step_tokens <= most:
        raise ValueError(f"step_tokens: expected 1 to {most}, longer steps would be dense, got {step_tokens}")
    prompt = Prefilled(model, ids[:, : context_tokens - 1], n_scored, backend)

    def origin(method: Method) -> tuple[str, float, float]:
        return prompt.backend_for(method), *cost(method, prompt.head_dim, context_tokens)

    # Kept in the model's own dtype: 49,152 logits of 1,024 tokens are 100 MB a document in bfloat16
    dense: list[Tensor] = []
    with prompt.decoding(Method(DENSE, None)) as step:
        for logits in _forced(step, ids, context_tokens, step_tokens):
            dense.append(logits)
            on_step(DENSE)
    targets = ids[:, context_tokens:].split(step_tokens, dim=1)  # type: ignore[no-untyped-call,unused-ignore]
    log_p_dense = torch.cat([_picked(_log_p(x), t) for x, t in zip(dense, targets, strict=True)], dim=1)
    nll_dense = -log_p_dense.mean(1)
    for method in methods:
        if method.cfg is None:
            top1 = torch.cat([x.argmax(-1) for x in dense], dim=1).tolist()
            # Six digits: these are to look things up in, and make most of a row
            said = [[float(f"{x:.6g}") for x in row] for row in log_p_dense.tolist()]
            outputs = zip(nll_dense.tolist(), top1, said, strict=True)
            yield method, [Score(0.0, x, x, 1.0, *origin(method), *more) for x, *more in outputs]
            continue
        kl, nll, agreement = torch.zeros(3, b, dtype=torch.float64, device=ids.device)
        with prompt.decoding(method) as step:
            steps = _forced(step, ids, context_tokens, step_tokens)
            for logits, full, target in zip(steps, dense, targets, strict=True):
                log_p, log_q = _log_p(full), _log_p(logits)
                kl += (log_p.exp() * (log_p - log_q)).sum((1, 2))
                nll -= _picked(log_q, target).sum(1)
                agreement += (full.argmax(-1) == logits.argmax(-1)).sum(1)
                on_step(method.name)
        rows = zip(*((x / n_scored).tolist() for x in (kl, nll, agreement)), nll_dense.tolist(), strict=True)
        yield method, [Score(k, n, d, a, *origin(method)) for k, n, a, d in rows]


def _forced(step: Step, ids: Tensor, context_tokens: int, step_tokens: int) -> Iterator[Tensor]:
    """Logits [B, T, V] for the tokens from ``context_tokens`` on, ``step_tokens`` at a time, fed those before them."""
    for tokens in ids[:, context_tokens - 1 : -1].split(step_tokens, dim=1):  # type: ignore[no-untyped-call,unused-ignore]
        yield step(tokens)


def _log_p(logits: Tensor) -> Tensor:
    """Float64: differences of nearly equal distributions are what is measured."""
    return logits.double().log_softmax(-1)


def _picked(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under log_p [B, T, V]."""
    return log_p.gather(2, tokens[..., None])[..., 0]
