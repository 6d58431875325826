"""Retrieval tasks of any length, generated on the spot after RULER's definitions, and exact copying of a passage.

Source: RULER, arXiv 2404.06654, its templates and constants. Differences: filler is the text that is given (RULER: Paul
Graham's essays), keys and passages are made of the words below, and words to count are made up of syllables (RULER:
English words), so that nothing has to be downloaded.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# RULER's filler where the task names none
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# Adjectives, and nouns
WORDS = """
amber ancient brave bright calm clever cold crisp curious damp dark eager early empty fair fancy fierce gentle
giant golden happy heavy hidden hollow humble icy jolly keen large lively lonely lucky mellow narrow noble odd
pale plain proud quick quiet rapid round rusty sharp silent silver simple slow smooth soft steep sturdy sweet
tall tame tidy tiny vast warm wild wise young
|
anchor apple arrow badge barrel basket beacon bell bottle branch bridge bucket button candle canyon carpet
castle cedar cherry circle cloud comet copper cottage desert dragon drum eagle ember engine falcon feather
fiddle forest garden glacier hammer harbor helmet island jacket kettle ladder lantern lemon lizard magnet
maple marble meadow mirror needle ocean orchid otter paddle pebble pepper pillow planet pocket prairie puzzle
rabbit ribbon river rocket saddle sailor shadow shovel spider spruce statue tunnel turtle valley velvet violin
wagon walnut willow
"""
ADJECTIVES, NOUNS = (words.split() for words in WORDS.split("|"))

ONE_NEEDLE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided text?",
    " The special magic number for {query} mentioned in the provided text is",
)
NEEDLES = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided "
    "text?",
    " The special magic numbers for {query} mentioned in the provided text are",
)
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
    "{query}, they are:",
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
COPY = (
    "A passage of random words is hidden within the following text. Memorize it word for word.\n{context}\nQuestion: "
    "What is the passage of random words in the text above?",
    " The passage of random words is: {query}",
)


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: the user's turn.
        answer_start: the first words of the answer, given to the model.
        references: strings that the rest of the answer should hold.
    """

    prompt: str
    answer_start: str
    references: tuple[str, ...]


class Place(NamedTuple):
    """How large the filler is, and what lies where in it.

    Attributes:
        units: sentences or words of filler, as the task has it.
        sentences: text to fill with.
        depth: where the needles that are asked for lie, 0 at the start and 1 at the end; None for random places.
    """

    units: int
    sentences: Sequence[str]
    depth: float | None


Build = Callable[[random.Random, Place], Sample]


class Task(NamedTuple):
    """A kind of question.

    Attributes:
        build: makes the sample; the same for equal dice and places.
        max_new_tokens: for the answer.
        min_units: smallest filler that makes sense.
        has_depth: whether ``Place.depth`` matters.
    """

    build: Build
    max_new_tokens: int
    min_units: int = 0
    has_depth: bool = False


def split_sentences(text: str) -> list[str]:
    """Sentences of 4 to 40 words, each on one line."""
    found = [" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+", text)]
    kept = [s for s in found if 4 <= len(s.split()) <= 40]
    if not kept:
        raise ValueError(f"haystack: expected sentences of 4 to 40 words, a text of {len(text)} characters has none")
    return kept


def recall(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, whatever their case: RULER's ``string_match_all``."""
    return sum(r.lower() in prediction.lower() for r in references) / len(references)


def _ask(template: tuple[str, str], context: str, query: str, references: Sequence[str]) -> Sample:
    prompt, answer_start = template
    return Sample(prompt.format(context=context, query=query), answer_start.format(query=query), tuple(references))


def _needles(n_keys: int, n_values: int, n_asked: int) -> Build:
    """Numbers under keys, ``n_values`` under each of ``n_keys``; ``n_asked`` of the keys are asked for."""

    def build(rng: random.Random, place: Place) -> Sample:
        keys = rng.sample([f"{a}-{b}" for a in ADJECTIVES for b in NOUNS], n_keys)
        values = {key: [str(rng.randint(10**6, 10**7 - 1)) for _ in range(n_values)] for key in keys}
        asked = keys[:n_asked]
        needles = [
            (
                f"One of the special magic numbers for {key} is: {value}.",
                _depth(rng, place.depth if key in asked else None),
            )
            for key in keys
            for value in values[key]
        ]
        query = asked[0] if n_asked == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        template = ONE_NEEDLE if n_values * n_asked == 1 else NEEDLES
        return _ask(template, _hide(needles, _text(rng, place)), query, [v for key in asked for v in values[key]])

    return build


def _copy(rng: random.Random, place: Place) -> Sample:
    """A passage of 48 words that no model can guess; the first four are given, the references are the next 11 fours."""
    words = rng.sample(ADJECTIVES + NOUNS, 48)
    parts = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    needle = (f"The passage of random words is: {' '.join(parts)}.", _depth(rng, place.depth))
    return _ask(COPY, _hide([needle], _text(rng, place)), parts[0], parts[1:])


def _track(rng: random.Random, place: Place) -> Sample:
    """One chain of four hops, in order, at random depths among RULER's noise; an example goes before it."""

    def chain(n_noise: int) -> Sample:
        names = _distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), 5)
        value = str(rng.randint(10**4, 10**5 - 1))
        sources = [value, *(f"VAR {name}" for name in names)]
        depths = sorted(rng.random() for _ in names)
        needles = [(f"VAR {name} = {source}", d) for name, source, d in zip(names, sources, depths, strict=False)]
        return _ask(TRACKING, _hide(needles, [NOISE] * n_noise, "\n"), value, names)

    return _after_example(chain(5), chain(place.units))


def _common_words(rng: random.Random, place: Place) -> Sample:
    """Ten words thirty times each among ``units`` words three times each; a small example goes before them."""

    def numbered(n_rare: int, often: int, seldom: int) -> Sample:
        words = _distinct(lambda: _made_up(rng), 10 + n_rare)
        listed = words[:10] * often + words[10:] * seldom
        rng.shuffle(listed)
        return _ask(COMMON_WORDS, " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), "", words[:10])

    return _after_example(numbered(10, 3, 1), numbered(place.units, 30, 3))


def _frequent_words(rng: random.Random, place: Place) -> Sample:
    """``units`` words, the k-th most frequent of them units / (k^2 zeta(2)) times; the most frequent is dots."""
    words = ["....", *_distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), 200)]
    listed = [word for k, word in enumerate(words, 1) for _ in range(int(place.units * 6 / (math.pi * k) ** 2))]
    rng.shuffle(listed)
    return _ask(FREQUENT_WORDS, " ".join(listed), "", words[1:4])


TASKS = {
    "single": Task(_needles(1, 1, 1), 128, has_depth=True),
    "multi_key": Task(_needles(4, 1, 1), 128, has_depth=True),
    "multi_value": Task(_needles(1, 4, 1), 128, has_depth=True),
    "multi_query": Task(_needles(4, 1, 4), 128, has_depth=True),
    "variable_tracking": Task(_track, 30),
    "common_words": Task(_common_words, 120),
    # With fewer the third and the fourth word are equally frequent
    "frequent_words": Task(_frequent_words, 50, min_units=100),
    "copy": Task(_copy, 192, has_depth=True),
}


def _after_example(example: Sample, sample: Sample) -> Sample:
    solved = f"{example.prompt}{example.answer_start} {' '.join(example.references)}"
    return replace(sample, prompt=f"{solved}\n{sample.prompt}")


def _hide(needles: Sequence[tuple[str, float]], filler: list[str], between: str = " ") -> str:
    """Put each needle (text, depth) at its depth among the filler; needles at one depth keep their order."""
    n = len(filler)
    for text, depth in sorted(needles, key=lambda needle: needle[1])[::-1]:
        filler.insert(round(depth * n), text)
    return between.join(filler)


def _text(rng: random.Random, place: Place) -> list[str]:
    """Consecutive sentences from a random start; after the last comes the first."""
    start, n = rng.randrange(len(place.sentences)), len(place.sentences)
    return [place.sentences[(start + i) % n] for i in range(place.units)]


def _depth(rng: random.Random, depth: float | None) -> float:
    """The depth asked for, or a random one. The dice are thrown in either case: all else stays as it is."""
    drawn = rng.random()
    return drawn if depth is None else depth


def _distinct(draw: Callable[[], str], n: int) -> list[str]:
    """``n`` different strings, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)


def _made_up(rng: random.Random) -> str:
    """A word of three syllables: 343,000 there are."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
