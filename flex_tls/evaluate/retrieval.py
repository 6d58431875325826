"""Retrieval samples of a wanted length in tokens, and greedy answers to them under every method."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch

from ..attention import Backend
from ..integrations.huggingface import end_of_sequence_ids
from .documents import digest, expand
from .methods import Method, cost
from .prefilled import Prefilled
from .tasks import TASKS, Place, Sample, recall, split_sentences


class Metric(NamedTuple):
    """How an answer is scored.

    Attributes:
        score: from an answer and the references to a share.
        is_settled: whether more tokens cannot change the score of such a beginning.
    """

    score: Callable[[str, Sequence[str]], float]
    is_settled: Callable[[str, Sequence[str]], bool]


RECALL = Metric(recall, lambda text, references: recall(text, references) == 1)


class Question(NamedTuple):
    """A sample as the model reads it. ``token_ids``: chat template, prompt, and the answer's first words."""

    task: str
    length_tokens: int
    depth: float | None
    seed: int
    sample: Sample
    token_ids: tuple[int, ...]
    max_new_tokens: int
    metric: Metric

    @property
    def digest(self) -> str:
        return digest(self.token_ids)


class Answer(NamedTuple):
    """What a method made of a question, and its score by the question's metric."""

    prediction: str
    score: float
    backend: str
    index_share: float
    read_share: float


def haystack(paths: Sequence[Path]) -> list[str]:
    """Sentences of the given files, or of the language reference that comes with Python (``pydoc_data``)."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in expand(paths)]
    return split_sentences("\n".join(texts or topics.values()))


def make_question(
    task: str, tokenizer: Any, length_tokens: int, seed: int, sentences: Sequence[str], depth: float | None = None
) -> Question:
    """The largest sample of the task that fits ``length_tokens``, its filler grown one unit at a time.

    The same arguments give the same question. Depth is ignored by tasks that have none.

    Raises:
        ValueError: even the smallest sample is longer; says how long it is.
    """
    kind = TASKS[task]
    depth = depth if kind.has_depth else None

    def make(units: int) -> tuple[Sample, tuple[int, ...]]:
        sample = kind.build(random.Random(f"{task} {seed}"), Place(units, sentences, depth))
        return sample, _token_ids(tokenizer, sample)

    fits, found = kind.min_units, make(kind.min_units)
    if len(found[1]) > length_tokens:
        raise ValueError(
            f"length: expected at least {len(found[1])} tokens for {task!r}, got {length_tokens}; raise --length or "
            "leave the task out"
        )
    # Double until it is too long, then halve the gap
    too_long = fits + 1
    while len((tried := make(too_long))[1]) <= length_tokens:
        fits, found, too_long = too_long, tried, 2 * too_long
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        tried = make(middle)
        if len(tried[1]) <= length_tokens:
            fits, found = middle, tried
        else:
            too_long = middle
    return Question(task, length_tokens, depth, seed, *found, kind.max_new_tokens, RECALL)


def answer(
    model: Any,
    tokenizer: Any,
    question: Question,
    methods: Sequence[Method],
    *,
    backend: Backend = "auto",
    on_step: Callable[[str], None] = lambda method: None,
) -> Iterator[tuple[Method, Answer]]:
    """Answer greedily under each method, from one prefill.

    An answer ends with an end-of-sequence token, at the question's limit, or once more of it cannot change its score.
    The prompt's last token is already read by the method.

    Args:
        model: a causal model of transformers.
        tokenizer: its tokenizer.
        question: from :func:`make_question` or :func:`.longbench.read_questions`.
        methods: dense attention among them, if wanted.
        backend: of :func:`flex_tls.two_level_attention`.
        on_step: called with the method's name after every step.
    """
    ids = torch.tensor([question.token_ids], device=model.device)
    limit, metric = question.max_new_tokens, question.metric
    ends = end_of_sequence_ids(model)
    references = question.sample.references
    prompt = Prefilled(model, ids[:, :-1], limit, backend)
    for method in methods:
        token, token_ids, text = ids[:, -1:], list[int](), ""
        with prompt.decoding(method) as step:
            while len(token_ids) < limit and not metric.is_settled(text, references):
                token = step(token).argmax(-1)
                on_step(method.name)
                if int(token) in ends:
                    break
                token_ids.append(int(token))
                text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        shares = cost(method, prompt.head_dim, ids.shape[1])
        yield method, Answer(text, metric.score(text, references), prompt.backend_for(method), *shares)


def _token_ids(tokenizer: Any, sample: Sample) -> tuple[int, ...]:
    """The chat template around the prompt if the tokenizer has one, then the answer's first words."""
    if tokenizer.chat_template is None:
        return tuple(tokenizer(sample.prompt + sample.answer_start).input_ids)
    chat = [{"role": "user", "content": sample.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text + sample.answer_start, add_special_tokens=False).input_ids)
