"""Questions in LongBench's format, from files: prompts after its structure, its metrics, its way to cut long contexts.

A line of a file has ``input`` (the question, may be empty), ``context``, ``answers`` (list), ``dataset``, and for
classification ``all_classes``. Source: LongBench, arXiv 2308.14508. Its own prompts, ``dataset2prompt.json``, can be
given; ours say the same in fewer words, a template for each kind of task.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from .retrieval import Metric, Question
from .tasks import Sample

TEMPLATES = {
    "question": "Read the text and answer the question as briefly as you can, without any explanation.\n\n{context}\n\n"
    "Question: {input}\nAnswer:",
    "summary": "Write a summary of the text.\n\n{context}\n\n{input}\n\nSummary:",
    "examples": "{context}\n{input}",
    "code": "Complete the code.\n{context}{input}Next line of code:\n",
    "count": "Some of the paragraphs may be copies of others. How many different paragraphs are there? Answer with the "
    "number alone.\n\n{context}\n\nThe answer is:",
    "paragraph": "Here are 30 numbered paragraphs and an abstract of one of them.\n\n{context}\n\nAbstract: {input}\n\n"
    "Answer with the number of the paragraph, such as Paragraph 1.\n\nThe answer is:",
}


class Dataset(NamedTuple):
    """What LongBench says of one data set. ``metric``: of :data:`METRICS`; ``chat``: in the chat template."""

    kind: str
    metric: str
    max_new_tokens: int
    chat: bool = True


DATASETS = {
    "narrativeqa": Dataset("question", "f1", 128),
    "qasper": Dataset("question", "f1", 128),
    "multifieldqa_en": Dataset("question", "f1", 64),
    "hotpotqa": Dataset("question", "f1", 32),
    "2wikimqa": Dataset("question", "f1", 32),
    "musique": Dataset("question", "f1", 32),
    "gov_report": Dataset("summary", "rouge_l", 512),
    "qmsum": Dataset("summary", "rouge_l", 512),
    "multi_news": Dataset("summary", "rouge_l", 512),
    "trec": Dataset("examples", "class", 64, chat=False),
    "triviaqa": Dataset("examples", "f1_line", 32, chat=False),
    "samsum": Dataset("examples", "rouge_l_line", 128, chat=False),
    "passage_count": Dataset("count", "number", 32),
    "passage_retrieval_en": Dataset("paragraph", "number", 32),
    "lcc": Dataset("code", "code", 64, chat=False),
    "repobench-p": Dataset("code", "code", 64, chat=False),
}


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, after SQuAD: no case, punctuation or articles."""
    said, wanted = (Counter(_words(text)) for text in (prediction, reference))
    shared = sum((said & wanted).values())
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words."""
    said, wanted = prediction.split(), reference.split()
    shared = LCSseq.similarity(said, wanted)
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity to the first line that is neither empty, comment nor markup."""
    lines = (line for line in prediction.lstrip("\n").split("\n") if not re.search(r"[`#]|//", line))
    return fuzz.ratio(next(lines, ""), reference) / 100


def number(prediction: str, reference: str) -> float:
    """Share of the numbers said that are the reference's."""
    (wanted,) = re.findall(r"\d+", reference)[:1]
    said: list[str] = re.findall(r"\d+", prediction)
    return said.count(wanted) / len(said) if said else 0.0


def first_line(metric: Callable[[str, str], float]) -> Callable[[str, str], float]:
    """The metric on the first line that has something: what follows is the model's next example."""
    return lambda prediction, reference: metric(prediction.lstrip("\n").split("\n")[0], reference)


def class_named(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / n if the reference is among the n classes that the first line names; those inside its name do not count."""
    line = prediction.lstrip("\n").split("\n")[0]
    named = [x for x in classes if x in line and not (x in reference and x != reference)]
    return 1 / len(named) if reference in named else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {
    "f1": f1,
    "f1_line": first_line(f1),
    "rouge_l": rouge_l,
    "rouge_l_line": first_line(rouge_l),
    "code": code_similarity,
    "number": number,
}


def read_questions(
    path: Path,
    tokenizer: Any,
    length_tokens: int,
    limit: int,
    templates: Mapping[str, str] | None = None,
) -> list[Question]:
    """The first ``limit`` questions of a JSONL file, their prompts cut in the middle to ``length_tokens``.

    Args:
        path: the file; its name without ending says the data set where lines do not.
        tokenizer: of the model; its chat template is put around the prompts of data sets that use one.
        length_tokens: longest prompt; what is longer keeps its first and last half, as LongBench cuts.
        limit: most questions.
        templates: LongBench's ``dataset2prompt.json`` as a mapping; ours for what it lacks.

    Raises:
        ValueError: names the line and what is wrong with it, or the data set that is not known.
    """
    found: list[Question] = []
    for place, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if len(found) == limit:
            break
        where = f"{path}:{place + 1}"
        try:
            fields = json.loads(line)
            name = fields.get("dataset") or path.stem
            values = {key: str(fields[key]) for key in ("context", "input")}
            answers, classes = [str(x) for x in fields["answers"]], fields.get("all_classes") or []
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: expected LongBench's fields input, context, answers and dataset ({error!r})"
            ) from error
        dataset = DATASETS.get(name.removesuffix("_e"))
        if dataset is None:
            raise ValueError(f"{where}: expected a data set of {', '.join(DATASETS)}, got {name!r}; rename the file")
        template = (templates or {}).get(name.removesuffix("_e")) or TEMPLATES[dataset.kind]
        prompt, token_ids = _cut(tokenizer, dataset, template.format(**values), length_tokens)
        sample = Sample(prompt, "", tuple(answers))
        metric = _metric(dataset, classes)
        found.append(Question(name, length_tokens, None, place, sample, token_ids, dataset.max_new_tokens, metric))
    return found


def _metric(dataset: Dataset, classes: Sequence[str]) -> Metric:
    """The best score over the references. No answer is settled before its end but a line that is all that counts."""

    def one(prediction: str, reference: str) -> float:
        if dataset.metric == "class":
            return class_named(prediction, reference, classes)
        return METRICS[dataset.metric](prediction, reference)

    def score(prediction: str, references: Sequence[str]) -> float:
        return max((one(prediction, reference) for reference in references), default=0.0)

    def is_settled(prediction: str, references: Sequence[str]) -> bool:
        return dataset.metric.endswith(("_line", "class")) and "\n" in prediction.lstrip("\n")

    return Metric(score, is_settled)


def _token_ids(tokenizer: Any, dataset: Dataset, prompt: str) -> tuple[int, ...]:
    if not dataset.chat or tokenizer.chat_template is None:
        return tuple(tokenizer(prompt).input_ids)
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _cut(tokenizer: Any, dataset: Dataset, prompt: str, length_tokens: int) -> tuple[str, tuple[int, ...]]:
    """The prompt, without its middle if it is too long, and its tokens, the chat template's included."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    token_ids = _token_ids(tokenizer, dataset, prompt)
    kept = len(ids)
    while len(token_ids) > length_tokens:
        # Text that is joined anew may be a token longer than its halves were
        kept -= len(token_ids) - length_tokens
        half = kept // 2
        if half < 1:
            raise ValueError(f"length: expected more than the chat template's tokens, got {length_tokens}")
        prompt = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        token_ids = _token_ids(tokenizer, dataset, prompt)
    return prompt, token_ids


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()
