"""What is tried, and its measuring: a prompt that decodes each try by patches over the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flex_tls import TLSConfig, index
from flex_tls.evaluate import perplexity
from flex_tls.evaluate.documents import Document
from flex_tls.evaluate.methods import Method, label_bytes
from flex_tls.evaluate.prefilled import Prefilled, Step
from flex_tls.evaluate.rows import Origin
from flex_tls.index import KVIndex
from flex_tls.labels import TokenLabels
from flex_tls.record import Recorder
from flex_tls.selection import BlockSelection, TokenSelection

from ..corpus import HALVES
from .boxes import NAMES, Boxes
from .labels import MixedLabels, Width, bytes_of, widths
from .rows import BASE
from .rules import BUDGETS, BY_LAYER, Rule, Sharing

# At D = 64 a label of 16 bytes is 6.2 % of keys and values in 16 bits, one of 8 bytes 3.1 %
BITS = (
    "32x4", "64x2", "16x8", "40x3", "4x8+24x4", "8x8+16x4", "8x8+8x4+16x2", "24x4+16x2", "16x4+32x2",
    "16x4", "32x2", "20x3", "4x8+8x4", "8x4+10x3", "12x4+8x2", "8x4+16x2",
)  # fmt: skip
SETS = {"bits": BITS, "blocks": (*BUDGETS[:8], *BY_LAYER), "tokens": BUDGETS[8:], "prefilter": NAMES}

# The prompt's last queries, by which budgets are shared out
MEASURED_QUERIES = 64


@dataclass(frozen=True)
class Try(Method):
    """Ours with other labels, a rule for a budget, both, or neither; or with a filter before level 1."""

    labels: tuple[Width, ...] | None = None
    rule: Rule | None = None
    boxes: Boxes | None = None


def make_tries(specs: Sequence[str], cfg: TLSConfig) -> list[Try]:
    """Names, or names of :data:`SETS`; :data:`BASE` is always the first."""
    names = dict.fromkeys([BASE, *(name for spec in specs for name in SETS.get(spec, (spec,)))])
    return [_make_try(name, cfg) for name in names]


def _make_try(name: str, cfg: TLSConfig) -> Try:
    made = Try(name, cfg)
    if name.startswith("boxes"):
        return replace(made, boxes=Boxes.parse(name))
    for change in name.split("/"):
        if change == "oracle":
            made = replace(made, cfg=replace(cfg, index="oracle"))
        elif ":" in change:
            made = replace(made, rule=Rule.parse(change))
        elif change != BASE:
            made = replace(made, labels=widths(change))
    return made


class Kept(Recorder):
    """Means of what was kept, over sparse layers, KV heads and query tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._sums, self._n = torch.zeros(2, dtype=torch.float64), 0

    def add_sparse(
        self, layer: int, q: Tensor, k: Tensor, index: KVIndex, blocks: BlockSelection, tokens: TokenSelection,
        **others: Any,
    ) -> None:  # fmt: skip
        self._sums += torch.stack([blocks.counts.double().sum(), tokens.counts.double().sum()])
        self._n += blocks.counts.numel()

    @property
    def means(self) -> tuple[float, float]:
        """(blocks, tokens)."""
        blocks, tokens = (self._sums / self._n).tolist()
        return blocks, tokens


class Prompt(Prefilled):
    """A prompt that also remembers each layer's last queries, and decodes tries."""

    def __init__(self, *args: Any) -> None:
        self.queries: list[Tensor] = []
        self.kept = Kept()
        observe = TokenLabels.observe

        def noting(labels: TokenLabels, q: Tensor, weight: Tensor) -> None:
            self.queries.append(q[:, :, -MEASURED_QUERIES:].clone())
            observe(labels, q, weight)

        with patch.object(TokenLabels, "observe", noting):
            super().__init__(*args)

    @contextmanager
    def decoding(self, method: Method, recorder: Recorder | None = None) -> Iterator[Step]:
        """As in :class:`Prefilled`; of a try, ``kept`` says what it kept."""
        with ExitStack() as stack:
            if isinstance(method, Try):
                recorder = self.kept = Kept()
                if method.labels is not None:
                    stack.enter_context(patch.object(index, "TokenLabels", MixedLabels.of(method.labels)))
                if method.boxes is not None:
                    stack.enter_context(method.boxes.patched())
            step = stack.enter_context(super().decoding(method, recorder))
            if isinstance(method, Try) and method.rule is not None:
                assert method.cfg is not None
                sparse = [(x.index, q) for x, q in zip(self._cache.tls_layers, self.queries, strict=True) if x.index]
                sharing = Sharing(method.rule, method.cfg, *zip(*sparse, strict=True))
                stack.enter_context(sharing.patched())
            yield step


def measure(
    model: Any, origin: Origin, document: Document, context_tokens: int, tries: Sequence[Try]
) -> Iterator[dict[str, Any]]:
    """A row for every try on one document, whose tokens from ``context_tokens`` on are scored."""
    made: list[Prompt] = []

    def prompt(*args: Any) -> Prompt:
        made.append(Prompt(*args))
        return made[-1]

    ids = torch.tensor([document.token_ids], device=model.device)
    half = next((half for half in HALVES if document.name.startswith(f"{half}/")), "")
    with patch.object(perplexity, "Prefilled", prompt), torch.no_grad():
        for method, (score,) in perplexity.score_documents(
            model, ids, context_tokens, tries, backend="reference", step_tokens=16
        ):
            assert isinstance(method, Try)
            blocks, tokens = made[0].kept.means
            yield {
                "bench": "tries", **asdict(origin), "try": method.name, "config": method.config,
                "document": document.name, "digest": document.digest, "half": half, "context_tokens": context_tokens,
                "score_tokens": ids.shape[1] - context_tokens,
                "label_bytes": _label_bytes(method, made[0].head_dim),
                "level1_bytes": _level1_bytes(method, made[0].head_dim, context_tokens),
                "kept_blocks": blocks, "kept_tokens": tokens, "kl": score.kl, "nll": score.nll,
                "nll_dense": score.nll_dense, "agreement": score.agreement,
            }  # fmt: skip


def _label_bytes(method: Try, head_dim: int) -> int:
    """Of one token; exact keys in 16 bits."""
    assert method.cfg is not None
    if method.labels is not None:
        return bytes_of(method.labels)
    return (
        2 * head_dim if method.cfg.index == "oracle" else label_bytes(method.cfg, method.cfg.label_channels, head_dim)
    )


def _level1_bytes(method: Try, head_dim: int, context_tokens: int) -> float:
    """What level 1 reads for a token of the context."""
    label_bytes = _label_bytes(method, head_dim)
    if method.boxes is None:
        return float(label_bytes)
    assert method.cfg is not None
    return method.boxes.level1_bytes(method.cfg, head_dim, context_tokens // method.cfg.block_size, label_bytes)
