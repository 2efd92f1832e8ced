"""The questions of the needle suite: what is hidden in a text of any size, and what must come back.

Owns the seven tasks, after RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3): the same tasks with text, words and
wording of this project's own, without examples before the question. Figures are therefore not RULER's.
A puzzle's text is made of units (sentences, words of a list); fit.py finds how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hbp_titan.evaluation.words import NonsenseWords, names, numbers, sentences

HIDDEN = 4
"""Keys or values of the tasks with several (RULER's multikey_1, multivalue and multiquery)."""
HOPS = 4
COMMON, COMMON_OFTEN, OTHERS_OFTEN = 10, 30, 3
FREQUENT, ZETA = 3, 2.0


@dataclass(frozen=True)
class Puzzle:
    """One question. body(n): its text with n units, n >= fewest; references: what the answer must contain."""

    intro: str
    body: Callable[[int], str]
    question: str
    answer_start: str
    references: Sequence[str]
    fewest: int = 1

    def text(self, units: int, padding: str = "") -> str:
        """The whole question; `padding` stands at the end of the body."""
        return f"{self.intro}\n\n{self.body(units)}{padding}\n\n{self.question}"


class Haystack:
    """Sentences with needles between them; more sentences go on where fewer end.

    needles: (depth, sentence) pairs; a needle stands at the sentence border that is nearest to its depth, the share of
    the haystack's characters before it.
    """

    def __init__(self, rng: np.random.Generator, needles: Sequence[tuple[float, str]]) -> None:
        self.rng = rng
        # Stable: of equal depths the first stays first.
        self.needles = sorted(needles, key=lambda needle: needle[0])
        self.sentences: list[str] = []

    def __call__(self, units: int) -> str:
        while len(self.sentences) < units:
            self.sentences += sentences(self.rng, 1024)
        used = self.sentences[:units]
        borders = np.concatenate([[0], np.cumsum([len(sentence) + 1 for sentence in used])])
        parts, start = [], 0
        for depth, needle in self.needles:
            at = int(np.abs(borders - depth * borders[-1]).argmin())
            parts += [*used[start:at], needle]
            start = at
        return " ".join([*parts, *used[start:]])


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _niah(
    rng: np.random.Generator, needles: Sequence[tuple[float, str, str]], asked: Sequence[str], values: Sequence[str]
) -> Puzzle:
    """needles: (depth, key, value). asked: the keys in question; values: theirs."""
    which = ", ".join(asked[:-1]) + " and " + asked[-1] if len(asked) > 1 else asked[0]
    some = "number" if len(values) == 1 else "numbers"
    return Puzzle(
        "Some special magic numbers are hidden in the following text. Memorize them; you will be asked for them.",
        Haystack(rng, [(depth, _needle(key, value)) for depth, key, value in needles]),
        f"What {'is' if len(values) == 1 else 'are all'} the special magic {some} for {which} in the text above?",
        f" The special magic {some} for {which} in the text above {'is' if len(values) == 1 else 'are'}",
        values,
    )


def niah_single(rng: np.random.Generator, depth: float) -> Puzzle:
    """One key with one value, at `depth`."""
    key, value = NonsenseWords(rng).first(1), numbers(rng, 1, digits=7)
    return _niah(rng, [(depth, key[0], value[0])], key, value)


def niah_multikey(rng: np.random.Generator, depth: float) -> Puzzle:
    """Several keys, of which the one at `depth` is asked for; the others lie anywhere."""
    keys, values = NonsenseWords(rng).first(HIDDEN), numbers(rng, HIDDEN, digits=7)
    depths = [depth, *rng.random(HIDDEN - 1).tolist()]
    return _niah(rng, list(zip(depths, keys, values, strict=True)), keys[:1], values[:1])


def niah_multivalue(rng: np.random.Generator, depth: float) -> Puzzle:
    """One key with several values, all asked for."""
    (key,), values = NonsenseWords(rng).first(1), numbers(rng, HIDDEN, digits=7)
    return _niah(rng, [(at, key, value) for at, value in zip(rng.random(HIDDEN), values, strict=True)], [key], values)


def niah_multiquery(rng: np.random.Generator, depth: float) -> Puzzle:
    """Several keys, all asked for."""
    keys, values = NonsenseWords(rng).first(HIDDEN), numbers(rng, HIDDEN, digits=7)
    return _niah(rng, list(zip(rng.random(HIDDEN).tolist(), keys, values, strict=True)), keys, values)


def variable_tracking(rng: np.random.Generator, depth: float) -> Puzzle:
    """A chain of assignments in order of the text; all its variables are asked for."""
    chain, (value,) = names(rng, HOPS + 1), numbers(rng, 1, digits=5)
    steps = [f"VAR {chain[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
    return Puzzle(
        "Memorize and track the chain of variable assignments that is hidden in the following text.",
        Haystack(rng, list(zip(np.sort(rng.random(HOPS + 1)).tolist(), steps, strict=True))),
        f"Find all variables that are assigned the value {value} in the text above.",
        f" According to the assignments in the text above, {HOPS + 1} variables have the value {value}. They are:",
        chain,
    )


def common_words(rng: np.random.Generator, depth: float) -> Puzzle:
    """A numbered list in which some words stand ten times as often as the others, or four times where it is short."""
    words, order = NonsenseWords(rng), int(rng.integers(2**32))

    def body(units: int) -> str:
        # The common words take half of a short list.
        often = min(COMMON_OFTEN, units // (2 * COMMON))
        others_often = max(1, often * OTHERS_OFTEN // COMMON_OFTEN)
        others = -(-(units - COMMON * often) // others_often)
        found = words.first(COMMON + others)
        entries = (found[:COMMON] * often + found[COMMON:] * others_often)[:units]
        shuffled = np.random.default_rng([order, units]).permutation(units).tolist()
        return " ".join(f"{place}. {entries[entry]}" for place, entry in enumerate(shuffled, 1))

    return Puzzle(
        "Below is a numbered list of words. Some of them appear more often than others. Memorize those that appear "
        "most often.",
        body,
        f"What are the {COMMON} most common words in the list above?",
        f" The {COMMON} words that appear most often in the list above are:",
        words.first(COMMON),
        fewest=2 * COMMON * 4,
    )


def frequent_words(rng: np.random.Generator, depth: float) -> Puzzle:
    """Words whose counts fall with the square of their rank (a zeta distribution); the first three are asked for."""
    words, order = NonsenseWords(rng), int(rng.integers(2**32))

    def body(units: int) -> str:
        ranks = np.arange(1, units + 1)
        counts = np.maximum(1, units * ranks**-ZETA / (np.pi**2 / 6)).astype(np.int64)
        # Each of the rare words once, until the text is full.
        used = int(np.searchsorted(np.cumsum(counts), units)) + 1
        entries = np.repeat(np.array(words.first(used)), counts[:used])[:units]
        return " ".join(np.random.default_rng([order, units]).permutation(entries).tolist())

    return Puzzle(
        "Read the following text of coded words and keep track of how often each appears.",
        body,
        f"What are the {FREQUENT} most frequent words in the coded text above? Ignore the dots.",
        f" The {FREQUENT} most frequent words in the coded text above are:",
        words.first(FREQUENT),
        fewest=60,
    )


TASKS: dict[str, Callable[[np.random.Generator, float], Puzzle]] = {
    task.__name__: task
    for task in (
        niah_single,
        niah_multikey,
        niah_multivalue,
        niah_multiquery,
        variable_tracking,
        common_words,
        frequent_words,
    )
}
"""By name; each makes a puzzle from a generator and a depth."""
WITH_DEPTH = ("niah_single", "niah_multikey")
"""Tasks whose answer lies at the depth; the others ask for what is spread over the text."""
