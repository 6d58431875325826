"""Ideas for the index and its budgets, measured on real weights before any of them is built.

Each is ours with one thing changed, as a patch over the package's reference backend, at equal bytes and equal budgets:
labels whose channels have several widths ("8x4+16x2": 8 channels of 4 bits, then 16 of 2), and rules that share a
budget out among the KV heads of a layer or of the model, or among queries ("blocks:share:model:query"). Several
changes at once are joined by a slash, "oracle" among them: exact keys for labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor

from flex_tls import TLSConfig, index, jsonl, selection
from flex_tls.evaluate import perplexity
from flex_tls.evaluate.bootstrap import mean_interval, ratio_interval
from flex_tls.evaluate.documents import Document
from flex_tls.evaluate.methods import Method, label_bytes
from flex_tls.evaluate.prefilled import Prefilled, Step
from flex_tls.evaluate.rows import Origin
from flex_tls.index import KVIndex
from flex_tls.labels import Keys, TokenLabels
from flex_tls.record import Recorder
from flex_tls.selection import BlockSelection, TokenSelection, reduce_group

from .corpus import HALVES

BASE = "ours"
# At D = 64 a label of 16 bytes is 6.2 % of keys and values in 16 bits, one of 8 bytes 3.1 %
BITS = (
    "32x4", "64x2", "16x8", "40x3", "4x8+24x4", "8x8+16x4", "8x8+8x4+16x2", "24x4+16x2", "16x4+32x2",
    "16x4", "32x2", "20x3", "4x8+8x4", "8x4+10x3", "12x4+8x2", "8x4+16x2",
)  # fmt: skip
BUDGETS = tuple(
    f"{level}:{by}:{within}:{when}"
    for level in ("blocks", "tokens")
    for by in ("share", "value")
    for within in ("layer", "model")
    for when in ("prompt", "query")
)
# The KV heads of a layer alike: what a budget for each layer gives
BY_LAYER = ("blocks:share:layers:prompt", "blocks:value:layers:prompt")
SETS = {"bits": BITS, "blocks": (*BUDGETS[:8], *BY_LAYER), "tokens": BUDGETS[8:]}

# The prompt's last queries, by which budgets are shared out
MEASURED_QUERIES = 64


class Width(NamedTuple):
    """Neighbouring channels of equally many bits."""

    channels: int
    bits: int


def widths(text: str) -> tuple[Width, ...]:
    """``"8x8+16x4"``: 8 channels of 8 bits, then 16 of 4."""
    return tuple(Width(*map(int, part.split("x"))) for part in text.split("+"))


def bytes_of(parts: Iterable[Width]) -> int:
    """Bytes of one token's label, in whole 32-bit words."""
    return -(-sum(part.channels * part.bits for part in parts) // 32) * 4


class MixedLabels(TokenLabels):
    """Labels in ``widths``; ``codes`` float32 [B, HKV, C, S] holds a whole number a channel, unpacked."""

    widths: ClassVar[tuple[Width, ...]]

    @classmethod
    def of(cls, parts: tuple[Width, ...]) -> type[MixedLabels]:
        """The class of labels in these widths."""
        return cast(type[MixedLabels], type("MixedLabels", (cls,), {"widths": parts}))

    @classmethod
    def empty(cls, b: int, h: int, s: int, d: int, *, dims: int, bits: int | None, device: torch.device) -> TokenLabels:
        """As in :class:`TokenLabels`, but for ``dims`` and ``bits``."""
        n = sum(part.channels for part in cls.widths)
        labels = super().empty(b, h, s, d, dims=n, bits=8, device=device)
        labels.codes = torch.zeros(b, h, n, s, device=device)
        return labels

    @property
    def levels(self) -> Tensor:
        """Float32 [C]: a channel's largest code."""
        return torch.cat([torch.full((part.channels,), 2.0**part.bits - 1) for part in self.widths])

    def quantise(self, keys: Keys, center: Tensor, to_label: Tensor) -> None:
        super().quantise(keys, center, to_label)
        # From 8 bits everywhere to each channel's own
        coarser = 255 / self.levels
        self.step *= coarser
        self.to_code /= coarser
        self.offset /= coarser

    def encode(self, k: Tensor) -> Tensor:
        codes = (k.float() @ self.to_code + self.offset[:, :, None]).round()
        return codes.clamp_min(0.0).minimum(self.levels).transpose(-1, -2)

    def scores(self, q: Tensor, dims: int | None = None) -> Tensor:
        """As in :class:`TokenLabels`; what queries ask of each width is rounded to 8 bits by itself."""
        asked = q.float() @ self.to_query
        base = asked * self.low[:, :, None]
        exact = asked * self.step[:, :, None]
        parts = torch.split(exact, [part.channels for part in self.widths], dim=-1)  # type: ignore[no-untyped-call,unused-ignore]
        unit = torch.cat([x.abs().amax(-1, keepdim=True).expand_as(x) for x in parts], -1).clamp_min(1e-30) / 127
        rounded = (exact / unit + 0.5).floor() * unit
        base = base + (exact - rounded) * self.levels / 2
        return base.sum(-1, keepdim=True) + rounded @ self.codes


@dataclass(frozen=True)
class Rule:
    """How a budget is shared out, at an equal total.

    Attributes:
        level: whose budget, level 1's in blocks or level 2's in tokens.
        by: up to where the best are kept: until they hold a "share" of the estimated attention, or down to a "value" of
            it. Tokens' shares are of what sinks and recent window leave.
        within: where totals are equal and one threshold holds, each "layer" or the whole "model"; "layers" is the model
            too, with one count for all KV heads of a layer.
        when: what the threshold decides: counts of each KV head, their means over the prompt's last queries ("prompt");
            or each "query"'s count, so that totals are equal on average, if decoding resembles these queries.
        most: times the uniform budget that a head or a query gets at most.
    """

    level: Literal["blocks", "tokens"]
    by: Literal["share", "value"]
    within: Literal["layer", "layers", "model"]
    when: Literal["prompt", "query"]
    most: int = 4

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``"blocks:share:model:query"``, and ``":x2"`` behind it for ``most``."""
        rule, _, most = text.partition(":x")
        known = (*BUDGETS, *BY_LAYER)
        if rule not in known or not (most or "4").isdigit():
            raise ValueError(f"rule: expected one of {', '.join(known)}, with :x2 if wanted, got {text!r}")
        level, by, within, when = cast(tuple[Any, Any, Any, Any], rule.split(":"))
        return cls(level, by, within, when, int(most or 4))


@dataclass(frozen=True)
class Try(Method):
    """Ours with other labels, a rule for a budget, both, or neither."""

    labels: tuple[Width, ...] | None = None
    rule: Rule | None = None


def make_tries(specs: Sequence[str], cfg: TLSConfig) -> list[Try]:
    """Names, or names of :data:`SETS`; :data:`BASE` is always the first."""
    names = dict.fromkeys([BASE, *(name for spec in specs for name in SETS.get(spec, (spec,)))])
    return [_make_try(name, cfg) for name in names]


def _make_try(name: str, cfg: TLSConfig) -> Try:
    made = Try(name, cfg)
    for change in name.split("/"):
        if change == "oracle":
            made = replace(made, cfg=replace(cfg, index="oracle"))
        elif ":" in change:
            made = replace(made, rule=Rule.parse(change))
        elif change != BASE:
            made = replace(made, labels=widths(change))
    return made


def share_out(weights: Tensor, total: int, least: int, most: int) -> Tensor:
    """Int64 of ``weights``' shape [H]: proportional to them where ``least`` and ``most`` leave it, ``total`` in sum."""
    n = weights.numel()
    if not n * least <= total <= n * most:
        raise ValueError(f"total: expected {n * least} to {n * most}, {n} times {least} to {most}, got {total}")
    weights = weights.double().clamp_min(1e-9)
    low, high = 0.0, most / float(weights.min())
    for _ in range(100):
        factor = (low + high) / 2
        low, high = (factor, high) if float((weights * factor).clamp(least, most).sum()) < total else (low, factor)
    exact = (weights * high).clamp(least, most)
    whole = exact.floor().long()
    # What rounding down took goes to the largest remainders
    order = (exact - whole).sort(descending=True, stable=True).indices
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def needs(rank: Tensor, mass: Tensor, by: str) -> tuple[Tensor, Tensor]:
    """(thresholds above which each place is kept, ascending, of ranks in order; that order): [..., N].

    rank [..., N]: +inf where something is always kept, -inf where never. mass [..., N]: its estimated attention.
    """
    best, order = rank.sort(dim=-1, descending=True, stable=True)
    mass = mass.gather(-1, order)
    if by == "value":
        need = -mass
    else:
        need = (mass.cumsum(-1) - mass) / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(best.isfinite(), need, -best), order


def kept_counts(need: Tensor, threshold: float, least: int, most: int) -> Tensor:
    """Int64 [...]: places of need [..., N] that a threshold keeps."""
    return (need < threshold).sum(-1).clamp(least, most)


def threshold_for(need: Tensor, mean: float, least: int, most: int) -> float:
    """The least threshold that keeps ``mean`` places or more on average."""
    finite = need[need.isfinite()]
    low, high = float(finite.min()), float(finite.max()) + 1e-6
    for _ in range(60):
        middle = (low + high) / 2
        enough = float(kept_counts(need, middle, least, most).double().mean()) >= mean
        low, high = (low, middle) if enough else (middle, high)
    return high


class Sharing:
    """A rule at work on the layers of one prompt, in place of ``keep_blocks`` and ``keep_best``.

    Args:
        rule: what is shared out, and how.
        cfg: the uniform budgets.
        indices: of the sparse layers.
        queries: [B, HQ, T, D] of each, the last that it has seen.
    """

    def __init__(self, rule: Rule, cfg: TLSConfig, indices: Sequence[KVIndex], queries: Sequence[Tensor]) -> None:
        self.rule = rule
        self._blocks, self._best = selection.keep_blocks, selection.keep_best
        self._layer = 0
        self._layers = {id(each): i for i, each in enumerate(indices)}
        assert cfg.token_budget is not None
        if rule.level == "blocks":
            # Level 2 finds its budget in every head, be the newest block all but empty
            self.budget = cfg.kept_blocks
            self.least = max(cfg.forced_blocks, -(-cfg.token_budget // cfg.block_size) + 1)
            self.most = min(rule.most * self.budget, indices[0].n_blocks)
        else:
            self.budget, self.least = cfg.token_budget, cfg.sink_tokens + cfg.recent_tokens
            self.most = min(rule.most * self.budget, cfg.kept_blocks * cfg.block_size)
        self._noted: list[Tensor] = []
        self._is_ready = False
        with self.patched():
            for each, q in zip(indices, queries, strict=True):
                selection.select(q, each, cfg, None, None, None)
        # Layer by layer: L, B, HKV, T, N
        need = torch.stack(self._noted)
        groups = list(need[:, None]) if rule.within == "layer" else [need]
        limits = [threshold_for(x, self.budget, self.least, self.most) for x in groups]
        self.thresholds = limits * (len(need) // len(limits))
        means = [
            kept_counts(x, limit, self.least, self.most).double().mean((1, 3))
            for x, limit in zip(groups, limits, strict=True)
        ]
        if rule.within == "layers":
            means = [x.mean(1, keepdim=True) for x in means]
        shared = [share_out(x.flatten(), x.numel() * self.budget, self.least, self.most).view_as(x) for x in means]
        # Places of every layer's KV heads, L times HKV
        self.counts = torch.cat(shared).expand(-1, need.shape[2])
        self._is_ready = True

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Selections go by the rule inside."""
        with (
            patch.object(selection, "keep_blocks", self.keep_blocks),
            patch.object(selection, "keep_best", self.keep_best),
        ):
            yield

    def keep_blocks(self, scores: Tensor, index: KVIndex, cfg: TLSConfig) -> BlockSelection:
        """As :func:`flex_tls.selection.keep_blocks`."""
        self._layer = self._layers[id(index)]
        if self.rule.level == "tokens":
            return self._blocks(scores, index, cfg)
        group, n = scores.shape[2], scores.shape[4]
        kept = self._keep(selection.block_ranks(scores, index, cfg), reduce_group(scores, cfg).clamp_min(0.0))
        counts = kept.sum(-1)
        indices = torch.where(kept, torch.arange(n, device=scores.device), n).sort(-1).values[..., : int(counts.max())]
        return BlockSelection(indices.int(), counts.int(), n, cfg.block_size, group, index.capacity_tokens)

    def keep_best(self, rank: Tensor, k: int) -> Tensor:
        """As :func:`flex_tls.selection.keep_best`."""
        if self.rule.level == "blocks":
            return self._best(rank, k)
        return self._keep(rank, torch.where(rank.isfinite(), rank, 0.0))

    def _keep(self, rank: Tensor, mass: Tensor) -> Tensor:
        """Bool [B, HKV, T, N] of rank and mass as in :func:`needs`; while it is measured, by the uniform budget."""
        need, order = needs(rank, mass, self.rule.by)
        place = torch.arange(rank.shape[-1], device=rank.device)
        if not self._is_ready:
            self._noted.append(need)
            kept = place < self.budget
        elif self.rule.when == "prompt":
            kept = place < self.counts[self._layer, :, None, None]
        else:
            kept = place < kept_counts(need, self.thresholds[self._layer], self.least, self.most)[..., None]
        return torch.zeros_like(rank, dtype=torch.bool).scatter(-1, order, kept & (need < torch.inf))


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
                "kept_blocks": blocks, "kept_tokens": tokens, "kl": score.kl, "nll": score.nll,
                "nll_dense": score.nll_dense, "agreement": score.agreement,
            }  # fmt: skip


def _label_bytes(method: Try, head_dim: int) -> int:
    """Of one token; exact keys in 16 bits."""
    assert method.cfg is not None
    if method.labels is not None:
        return bytes_of(method.labels)
    return 2 * head_dim if method.cfg.index == "oracle" else label_bytes(method.cfg, method.cfg.label_dims, head_dim)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Two rows of one key measured the same thing."""
    budgets = row["config"]["block_size"], row["config"]["block_budget"], row["config"]["token_budget"]
    return row["model"], row["context_tokens"], row["score_tokens"], *budgets, row["try"], row["digest"]


def read(path: Path) -> list[dict[str, Any]]:
    """Every row of a file."""
    return jsonl.read(path, _row, "expected a row of `python -m bench run tries`")


def _row(found: dict[str, Any]) -> dict[str, Any]:
    key_of(found)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a budget and try: KL, and its ratio to ours on the same documents, with 95 % intervals."""
    head = (
        "blocks of, blocks, tokens",
        "try",
        "label bytes",
        "kept blocks",
        "kept tokens",
        "KL",
        "/ ours",
        *HALVES,
        "documents",
    )
    lines = [head, ("---",) * len(head)]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(key_of(row)[:-1], {})[row["digest"]] = row
    for key, found in groups.items():
        base = groups.get((*key[:-1], BASE), {})
        cfg = next(iter(found.values()))["config"]
        kept = (math.fsum(row[x] for row in found.values()) / len(found) for x in ("kept_blocks", "kept_tokens"))
        kl = mean_interval([row["kl"] for row in found.values()])
        ratios = []
        for halves in (HALVES, *((half,) for half in HALVES)):
            both = [x for x, row in found.items() if x in base and (len(halves) > 1 or row["half"] in halves)]
            ratio = ratio_interval([found[x]["kl"] for x in both], [base[x]["kl"] for x in both]) if both else None
            ratios.append(f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "")
        lines.append(
            (
                f"{cfg['block_size']}, {cfg['block_budget']:,}, {cfg['token_budget']:,}",
                f"`{key[-1]}`",
                str(next(iter(found.values()))["label_bytes"]),
                *(f"{x:.1f}" for x in kept),
                f"{kl.mean:.4f} ({kl.low:.4f}-{kl.high:.4f})",
                *ratios,
                str(len(found)),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
