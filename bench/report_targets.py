"""The report's table of targets: what was asked for beforehand, what was measured, and what bounds it; from rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flex_tls.evaluate.bootstrap import Interval
from flex_tls.evaluate.rows import Row
from flex_tls.evaluate.sets import BASE
from flex_tls.evaluate.summary import (
    AttentionSummary,
    LossSummary,
    PplSummary,
    kl_ratio,
    summarise_attention,
    summarise_losses,
    summarise_ppl,
)
from flex_tls.evaluate.tasks import TASKS

from . import markdown

# Targets are at 8k: prompt and scored tokens together; shorter contexts are shown, and decide nothing
LEAST_TOKENS = 7_000
# Two documents would do for an ablation, not for this
LEAST_DOCUMENTS = 8
# One over the shares of the context that blocks and tokens are
WIDE, NARROW = (4, 8), (8, 16)
# Changes that cost no bytes: shown where they hold what the defaults miss, or hold it too
VARIANTS = (
    f"{BASE}:label_bits=4+4+2+2",
    f"{BASE}:label_bits=4+4+2+2:block_reduce=logsumexp",
    f"{BASE}:group_reduce=softmax_max",
    f"{BASE}:block_size=32",
)
ORACLES = ("oracle", "oracle:block_size=32")
# Of as many bytes as ours: boxes of blocks of 16 alone would take all of them, with heads of 64
RIVAL = "quest_double_sparsity:block_size=32"

Pair = tuple[int, int]


class Target(NamedTuple):
    """One line. ``measured``: of a method, None without rows; ``bounds``: methods that show what is in the way."""

    what: str
    limit: float
    show: Callable[[float], str]
    measured: Callable[[str], Interval | None]
    bounds: tuple[str, ...] = ()
    at_least: bool = False

    def verdict(self, x: Interval) -> str:
        """By the mean; "open" where the limit lies inside the interval."""
        verdict = "holds" if (x.mean >= self.limit if self.at_least else x.mean <= self.limit) else "missed"
        return f"{verdict}, open" if x.low <= self.limit <= x.high else verdict

    def cell(self, x: Interval) -> str:
        """A mean with its interval in this target's units."""
        return self.show(x.mean) + ("" if math.isnan(x.low) else f" ({self.show(x.low)} to {self.show(x.high)})")


def target_section(found: Sequence[Row], spans: set[tuple[int, int]]) -> Iterator[str]:
    """The table of targets. ``spans``: of the rows of a comparison of methods; nothing without such."""
    lines = [x for x in summarise_ppl(found) if x.config is not None and x.n_documents >= LEAST_DOCUMENTS]
    ours = [x for x in lines if x.method == BASE and x.span in spans]
    if not ours:
        return
    base = max(ours, key=lambda x: (x.context_tokens >= LEAST_TOKENS, x.score_tokens))
    yield "## Against the targets\n"
    yield (
        f"With the defaults, at the budgets named, as shares of the context. KL and perplexity: {base.n_documents} "
        f"documents, {base.context_tokens:,} tokens of context, {base.score_tokens:,} scored in all. A verdict is the "
        "mean's; it is open where the limit lies inside the interval. Variants take no more bytes of index.\n"
    )
    table = [("target", "limit", "measured", "verdict", "variants that hold", "what bounds it")]
    targets = [*_text_targets(found, lines, base), *_selection_targets(found), *_retrieval_targets(found)]
    yield markdown.table([*table, *map(_line, targets), *_small_index(found, lines)])
    yield from _all_pairs(found, [x for x in lines if x.span in spans])


def _line(target: Target) -> tuple[str, ...]:
    x = target.measured(BASE)
    beside = {name: y for name in target.bounds if (y := target.measured(name)) is not None}
    held = {
        name: y for name in VARIANTS
        if (y := target.measured(name)) is not None and target.verdict(y).startswith("holds")
    }  # fmt: skip
    limit = f"{'at least' if target.at_least else 'at most'} {target.show(target.limit)}"
    return (
        target.what, limit, "" if x is None else target.cell(x), "not measured" if x is None else target.verdict(x),
        *("; ".join(f"`{name}` {target.cell(y)}" for name, y in some.items()) for some in (held, beside)),
    )  # fmt: skip


def _text_targets(found: Sequence[Row], lines: Sequence[PplSummary], base: PplSummary) -> Iterator[Target]:
    for pair, kl, loss in ((WIDE, 0.008, 0.005), (NARROW, 0.025, 0.015)):
        at = {x.method: x for x in lines if (x.model, x.span) == (base.model, base.span) and pair_of(x) == pair}

        def of(method: str, at: dict[str, PplSummary] = at) -> PplSummary | None:
            return at.get(method)

        def ratio(over: str, under: str, of: Any = of) -> Interval | None:
            a, b = of(over), of(under)
            return None if a is None or b is None else kl_ratio(found, a, b)

        name = f"1/{pair[0]}, 1/{pair[1]}: "
        yield Target(name + "KL", kl, "{:.4f}".format, lambda m, of=of: x.kl if (x := of(m)) else None, ORACLES)
        yield Target(
            name + "perplexity above dense", loss, "{:+.2%}".format,
            lambda m, of=of: _above(x.perplexity_ratio) if (x := of(m)) else None, ORACLES,
        )  # fmt: skip
        yield Target(
            name + "KL over the oracle's", 1.5, "{:.3f}".format,
            lambda m, ratio=ratio: ratio(m, oracle_of(m)),
        )  # fmt: skip
        yield Target(
            name + "Quest with Double Sparsity's labels, KL over this", 8, "{:.1f}".format,
            lambda m, ratio=ratio: ratio(RIVAL, m), ORACLES, at_least=True,
        )  # fmt: skip
        if pair == WIDE:
            yield Target(
                "index, share of the KV bytes", 0.065, "{:.2%}".format,
                lambda m, of=of: Interval(x.index_share, math.nan, math.nan) if (x := of(m)) else None,
            )  # fmt: skip


def _selection_targets(found: Sequence[Row]) -> Iterator[Target]:
    lines: dict[str, AttentionSummary] = {
        x.method: x
        for x in summarise_attention(found)
        if x.config is not None and x.context_tokens >= LEAST_TOKENS and budgets(x.config, x.context_tokens) == WIDE
    }
    documents = "/".join(str(n) for n in sorted({x.n_documents for x in lines.values()}))
    yield Target(
        f"1/4: heavy tokens in the kept blocks ({documents} documents)", 0.97, "{:.1%}".format,
        lambda m: lines[m].heavy_blocks if m in lines else None, ORACLES, at_least=True,
    )  # fmt: skip


def _retrieval_targets(found: Sequence[Row]) -> Iterator[Target]:
    for what, tasks in ((f"all {len(TASKS)} tasks", None), ("copying", ("copy",))):
        lines = [x for x in summarise_losses(found, tasks) if _keeps_an_eighth(x)]
        ours = [x for x in lines if x.method == BASE and (tasks or set(x.tasks) == set(TASKS))]
        if not ours:
            yield Target(f"1/4, 1/8: score lost in retrieval, {what}", 0.01, "{:.1%}".format, lambda m: None)
            continue
        best = max(ours, key=lambda x: (x.length_tokens >= LEAST_TOKENS, x.n_samples))
        # Others on as many samples alone: a mean over other questions is no comparison
        same = {
            x.method: x
            for x in lines
            if (x.length_tokens, x.tasks, x.n_samples) == (best.length_tokens, best.tasks, best.n_samples)
        }
        name = f"1/4, 1/8: score lost in retrieval, {what}, {best.n_samples} samples of {best.length_tokens:,} tokens"
        name += ", which is not 8k" * (best.length_tokens < LEAST_TOKENS)
        yield Target(name, 0.01, "{:.1%}".format, lambda m, same=same: _loss(same, m), ("oracle",))
        yield from _where_the_oracle_was(found, best) if tasks is None and "oracle" not in same else ()


def _where_the_oracle_was(found: Sequence[Row], ours: LossSummary) -> Iterator[Target]:
    """The same on the tasks that the oracle answered too."""
    asked = [x.tasks for x in summarise_losses(found) if x.method == "oracle" and x.length_tokens == ours.length_tokens]
    if asked:
        same = {
            x.method: x
            for x in summarise_losses(found, asked[0])
            if x.length_tokens == ours.length_tokens and set(x.tasks) == set(asked[0]) and _keeps_an_eighth(x)
        }
        yield Target(
            f"of them {' and '.join(asked[0])}", 0.01, "{:.1%}".format, lambda m: _loss(same, m),
            ("oracle", "tokens", f"{BASE}:block_budget=x2"),
        )  # fmt: skip


def _small_index(found: Sequence[Row], lines: Sequence[PplSummary]) -> Iterator[tuple[str, ...]]:
    """What comes nearest to the oracle in half the bytes, at each span that has both."""
    for span in dict.fromkeys(x.span for x in lines if x.context_tokens >= LEAST_TOKENS):
        for pair in (WIDE, NARROW):
            at = {x.method: x for x in lines if x.span == span and pair_of(x) == pair}
            small = [x for x in at.values() if 0 < x.index_share <= 0.032 and x.method.startswith(BASE)]
            small = [x for x in small if oracle_of(x.method) in at]
            if not small:
                continue
            best = min(small, key=lambda x: x.kl.mean)
            oracle = oracle_of(best.method)
            target = Target("", 2, "{:.2f}".format, lambda _: None)
            x = kl_ratio(found, best, at[oracle])
            yield (
                f"1/{pair[0]}, 1/{pair[1]}: KL over the oracle's in at most 3.2 % of the KV bytes, {span[1]:,} tokens "
                "scored a document", "at most 2.00", target.cell(x), target.verdict(x), "",
                f"the best of {len(small)}: `{best.method}`, over `{oracle}`",
            )  # fmt: skip


def _all_pairs(found: Sequence[Row], lines: Sequence[PplSummary]) -> Iterator[str]:
    yield "Every configuration of ours that was compared:\n"
    table = [
        ("configuration", "blocks, tokens", "KL", "perplexity / dense", "KL / oracle's", "Quest + DS / KL", "index")
    ]
    for line in lines:
        if not line.method.startswith(BASE):
            continue
        assert line.config is not None
        pair = (line.config["block_budget"], line.config["token_budget"])
        others = {
            x.method: x for x in lines
            if x.config is not None and (x.config["block_budget"], x.config["token_budget"]) == pair
            and x.span == line.span
        }  # fmt: skip
        oracle, rival = others.get(oracle_of(line.method)), others.get(RIVAL)
        shares = f"{pair[0] / line.context_tokens:.3f}, {(pair[1] or pair[0]) / line.context_tokens:.4f}"
        table.append((
            f"`{line.method}`, {line.context_tokens:,} tokens", shares, markdown.interval(line.kl, 4),
            markdown.interval(line.perplexity_ratio, 4),
            "" if oracle is None else markdown.interval(kl_ratio(found, line, oracle), 3),
            "" if rival is None else markdown.interval(kl_ratio(found, rival, line), 1),
            f"{100 * line.index_share:.1f} %",
        ))  # fmt: skip
    yield markdown.table(table)


def pair_of(line: PplSummary) -> Pair:
    """A line's budgets as one over their shares of its context."""
    assert line.config is not None
    return budgets(line.config, line.context_tokens)


def budgets(config: dict[str, Any], context_tokens: int) -> Pair:
    """The same of a configuration; they are whole blocks, near to the share."""
    blocks = config["block_budget"]
    return round(context_tokens / blocks), round(context_tokens / (config["token_budget"] or blocks))


def oracle_of(method: str) -> str:
    """The oracle with the same blocks, and the same way to score one."""
    return re.sub(":(label_dims|label_bits|group_reduce)=[0-9a-z_+]+", "", "oracle" + method.removeprefix(BASE))


def _keeps_an_eighth(line: LossSummary) -> bool:
    """Blocks may be other: what ranks all tokens, or keeps twice the blocks, shows which level loses."""
    return budgets(line.config, line.length_tokens)[1] == WIDE[1]


def _loss(lines: dict[str, LossSummary], method: str) -> Interval | None:
    return lines[method].loss if method in lines else None


def _above(ratio: Interval) -> Interval:
    return Interval(ratio.mean - 1, ratio.low - 1, ratio.high - 1)
