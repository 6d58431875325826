from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flex_tls.evaluate.longbench import (
    DATASETS,
    METRICS,
    TEMPLATES,
    class_named,
    code_similarity,
    f1,
    number,
    read_questions,
    rouge_l,
)

words = st.lists(st.sampled_from(["red", "green", "blue", "cat", "dog", "sees", "the"]), min_size=1, max_size=8).map(
    " ".join
)


class Letters:
    """A tokenizer of characters; ``chat_template`` adds the same few to every prompt."""

    chat_template = "set"

    def __call__(self, text: str, add_special_tokens: bool = True) -> Letters:
        self.input_ids = [ord(letter) for letter in text]
        return self

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, ids))

    def apply_chat_template(self, chat: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return f"<{chat[0]['content']}>"


def written(folder: Path, name: str, **fields: Any) -> Path:
    path = folder / f"{name}.jsonl"
    line = {"input": "Who?", "context": "A long story.", "answers": ["Ann", "Ann Lee"], "dataset": name, **fields}
    path.write_text(json.dumps(line) + "\n")
    return path


@given(words, words)
def test_metrics_are_shares_and_the_reference_itself_scores_one(prediction: str, reference: str) -> None:
    for metric in (f1, rouge_l, code_similarity):
        assert 0 <= metric(prediction, reference) <= 1
    assert rouge_l(reference, reference) == code_similarity(reference, reference) == 1
    assert rouge_l(prediction, reference) == pytest.approx(rouge_l(reference, prediction))
    assert (f1(prediction, reference) > 0) == bool((set(prediction.split()) & set(reference.split())) - {"the"})


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(prediction: str, reference: str) -> None:
    a, b = prediction.split(), reference.split()
    common = longest_common(a, b)
    precision, recall = common / len(a), common / len(b)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_metrics_by_hand() -> None:
    assert f1("The cat, a dog!", "cat dog bird") == pytest.approx(2 * 2 / 5)
    assert code_similarity("\n# a comment\nx = 1\ny = 2", "x = 1") == 1
    assert code_similarity("", "x = 1") == 0
    assert number("There are 3, or 4.", "3") == 0.5
    assert number("Paragraph 12", "Paragraph 12") == 1
    assert number("none", "3") == 0
    classes = ["Food", "Food product", "City"]
    assert class_named("\nFood product\nCity", "Food product", classes) == 1
    assert class_named("Food or City", "City", classes) == 0.5
    assert class_named("River", "City", classes) == 0
    assert METRICS["f1_line"]("\ncat\ndog dog", "cat") == 1


def test_a_question_is_the_template_in_the_chat_template(tmp_path: Path) -> None:
    (question,) = read_questions(written(tmp_path, "hotpotqa"), Letters(), 1000, 5)
    assert "".join(map(chr, question.token_ids)) == f"<{question.sample.prompt}>"
    assert question.sample.prompt == TEMPLATES["question"].format(context="A long story.", input="Who?")
    assert question.max_new_tokens == 32
    assert question.metric.score("Lee Ann", question.sample.references) == 1
    assert not question.metric.is_settled("Ann\n", question.sample.references)
    official = {"hotpotqa": "{context}|{input}"}
    (other,) = read_questions(written(tmp_path, "hotpotqa"), Letters(), 1000, 5, official)
    assert other.sample.prompt == "A long story.|Who?"
    (code,) = read_questions(written(tmp_path, "lcc", input=""), Letters(), 1000, 5)
    assert "".join(map(chr, code.token_ids)) == "Complete the code.\nA long story.Next line of code:\n"


@given(st.integers(90, 400), st.integers(0, 600))
def test_long_prompts_lose_their_middle_alone(length: int, n_context: int) -> None:
    context = "".join(chr(1000 + i) for i in range(n_context))
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), "lcc", context=context, input="")
        (question,) = read_questions(path, Letters(), length, 1, {"lcc": "{context}{input}"})
    kept = "".join(map(chr, question.token_ids))
    assert len(kept) <= length
    assert context.startswith(kept[: len(kept) // 2])
    assert context.endswith(kept[len(kept) // 2 :])
    assert len(kept) >= min(n_context, length) - 1


def test_what_is_no_question_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"odd.jsonl:1: expected a data set of narrativeqa, .*got 'odd'"):
        read_questions(written(tmp_path, "odd"), Letters(), 100, 1)
    with pytest.raises(ValueError, match=r"lcc.jsonl:1: expected LongBench's fields .*answers"):
        read_questions(written(tmp_path, "lcc", answers=None), Letters(), 100, 1)
    with pytest.raises(ValueError, match="length: expected more than the chat template's tokens, got 2"):
        read_questions(written(tmp_path, "hotpotqa"), Letters(), 2, 1)


def test_every_data_set_has_a_template_and_a_metric() -> None:
    for dataset in DATASETS.values():
        assert dataset.kind in TEMPLATES
        assert dataset.metric in METRICS or dataset.metric == "class"
