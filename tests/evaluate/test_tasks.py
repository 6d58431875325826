from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flex_tls.evaluate.documents import read_documents
from flex_tls.evaluate.retrieval import haystack, make_question
from flex_tls.evaluate.tasks import TASKS, Place, Sample, recall, split_sentences

SENTENCES = [f"This is sentence number {i} of a text." for i in range(50)]
NAMES = sorted(TASKS)


class Words:
    """A tokenizer of words: ids are their hashes."""

    chat_template: str | None = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Words:
        self.input_ids = [hash(word) for word in text.split()]
        return self

    def apply_chat_template(self, chat: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return f"<user> {chat[0]['content']} <assistant>"


def build(name: str, seed: int, units: int, depth: float | None = None) -> Sample:
    task = TASKS[name]
    return task.build(random.Random(seed), Place(max(units, task.min_units), SENTENCES, depth))


@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(0, 300))
def test_every_answer_is_in_the_prompt(name: str, seed: int, units: int) -> None:
    sample = build(name, seed, units)
    assert recall(sample.prompt, sample.references) == 1
    assert len(set(sample.references)) == len(sample.references)


@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(0, 300))
def test_no_answer_is_given_away_with_the_question(name: str, seed: int, units: int) -> None:
    sample = build(name, seed, units)
    assert recall(sample.answer_start, sample.references) == 0


@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(0, 100))
def test_a_sample_is_the_same_for_the_same_seed_and_another_for_another(name: str, seed: int, units: int) -> None:
    assert build(name, seed, units) == build(name, seed, units)
    assert build(name, seed, units).references != build(name, seed + 1, units).references


@given(st.sampled_from([n for n in NAMES if TASKS[n].has_depth]), st.integers(0, 10**6), st.floats(0, 1))
def test_needles_that_are_asked_for_lie_at_the_depth(name: str, seed: int, depth: float) -> None:
    sample = build(name, seed, 200, depth)
    context = sample.prompt.split("\n")[1]
    for reference in sample.references:
        assert context.index(reference) / len(context) == pytest.approx(depth, abs=0.12)


@given(st.integers(0, 10**6), st.integers(0, 300))
def test_common_words_are_the_most_common(seed: int, units: int) -> None:
    sample = build("common_words", seed, units)
    listed = sample.prompt.split("appear most often.")[-1].split("Question:")[0]
    counts = Counter(word for word in listed.split() if word.isalpha())
    assert {word for word, _ in counts.most_common(10)} == set(sample.references)
    assert {counts[word] for word in sample.references} == {30}


@given(st.integers(0, 10**6), st.integers(0, 2000))
def test_frequent_words_are_more_frequent_than_the_fourth(seed: int, units: int) -> None:
    sample = build("frequent_words", seed, units)
    counts = Counter(w for w in sample.prompt.split() if len(w) == 6 and w.islower() and w.isalpha())
    fourth = max((n for word, n in counts.items() if word not in sample.references), default=0)
    assert min(counts[word] for word in sample.references) > fourth


@given(st.integers(0, 10**6), st.integers(0, 300))
def test_variables_form_one_chain_in_order(seed: int, units: int) -> None:
    sample = build("variable_tracking", seed, units)
    context = sample.prompt.split("Memorize and track")[-1]
    places = [context.index(f"VAR {name} = ") for name in sample.references]
    assert places == sorted(places)
    for before, name in zip(sample.references, sample.references[1:], strict=False):
        assert f"VAR {name} = VAR {before}" in context


@given(st.sampled_from(NAMES), st.integers(0, 100), st.integers(1200, 5000), st.booleans())
def test_lengths_are_hit_from_below(name: str, seed: int, length: int, chat: bool) -> None:
    tokenizer = Words()
    tokenizer.chat_template = "some" if chat else None
    question = make_question(name, tokenizer, length, seed, SENTENCES)
    assert length - 40 <= len(question.token_ids) <= length
    assert question == make_question(name, tokenizer, length, seed, SENTENCES)


def test_too_short_a_length_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"length: expected at least \d+ tokens for 'copy', got 50"):
        make_question("copy", Words(), 50, 0, SENTENCES)


def test_the_chat_template_goes_around_the_question_and_before_the_answer() -> None:
    tokenizer = Words()
    tokenizer.chat_template = "some"
    question = make_question("single", tokenizer, 200, 0, SENTENCES)
    expected = f"<user> {question.sample.prompt} <assistant>{question.sample.answer_start}"
    assert list(question.token_ids) == [hash(word) for word in expected.split()]


@pytest.mark.parametrize(("prediction", "score"), [("42 and 17", 1), ("It is 42.", 0.5), ("", 0), ("4 2", 0)])
def test_the_score_is_the_share_of_references_found(prediction: str, score: float) -> None:
    assert recall(prediction, ["42", "17"]) == score


def test_the_score_looks_past_case() -> None:
    assert recall("abc", ["ABC"]) == 1


def test_sentences_are_whole_and_of_some_length() -> None:
    assert split_sentences("One two three four. No.\nFive six\nseven eight! x") == [
        "One two three four.", "Five six seven eight!",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="haystack: expected sentences"):
        split_sentences("short")


def test_the_default_haystack_is_long() -> None:
    assert sum(len(sentence) for sentence in haystack([])) > 100_000


def test_documents_are_the_first_tokens_of_files_that_are_long_enough(tmp_path: Path) -> None:
    for name, n in (("b.txt", 30), ("a.txt", 20), ("c.txt", 3), ("d.txt", 40)):
        (tmp_path / name).write_text(" ".join(f"{name}{i}" for i in range(n)))
    found = read_documents([tmp_path], Words(), 10, 2)
    assert [document.name for document in found] == [f"{tmp_path.name}/a.txt", f"{tmp_path.name}/b.txt"]
    assert all(len(document.token_ids) == 10 for document in found)
    assert found[0].digest != found[1].digest
    assert [Path(x.name).name for x in read_documents([tmp_path / "d.txt", tmp_path], Words(), 30, 9)] == [
        "d.txt",
        "b.txt",
    ]
    with pytest.raises(ValueError, match="documents: expected files of at least 99 tokens, none of 1 given"):
        read_documents([tmp_path], Words(), 99, 2)
