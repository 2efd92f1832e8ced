"""The texts of the needle suite: seven long-context tasks, each a question about a context of any size.

Owns the words and sentences, which are generated from a seed, and where the needles lie between them. The tasks are
those of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3) with this project's own text and wording and without
few-shot examples, so scores are not comparable with published RULER figures. Nothing is downloaded, and nothing can
have been in a training set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# No word of one list is part of another word of that list, so a search for an answer cannot match by accident.
# fmt: off
ADJECTIVES = [
    "old", "new", "small", "large", "quiet", "busy", "dark", "bright", "narrow", "wide",
    "gentle", "rough", "early", "late", "plain", "green", "grey", "warm", "cold", "dry",
]
NOUNS = [
    "farmer", "teacher", "baker", "sailor", "doctor", "painter", "driver", "writer", "garden", "bridge",
    "window", "river", "market", "letter", "village", "harbour", "mountain", "kitchen", "library", "station",
    "forest", "street", "island", "tower", "meadow", "journey", "basket", "lantern", "blanket", "engine",
]
VERBS = [
    "finds", "sees", "leaves", "keeps", "needs", "passes",
    "follows", "reaches", "repairs", "remembers", "describes", "watches",
]
ADVERBIALS = [
    "in the morning", "after a while", "without a word", "near the old road", "before the rain", "as in every year",
    "for a long time", "at the end of the day", "on the way home", "behind the house", "once again", "with great care",
]
# fmt: on
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]

NUM_NEEDLES = 4
"""Keys or values of the tasks with several, as in RULER's multikey_1, multivalue and multiquery."""
NUM_HOPS = 4
NUM_COMMON, COMMON_COUNT, OTHER_COUNT = 10, 30, 3
"""common_words: how many words are common, how often each occurs, and how often each of the others."""
NUM_FREQUENT, ZETA_EXPONENT = 3, 2.0


def random_sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Return `count` sentences of 8 to 14 words, with neither digits nor capitals inside."""
    parts = (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS, ADVERBIALS)
    picks = [rng.integers(len(part), size=count).tolist() for part in parts]
    return [
        f"The {ADJECTIVES[a]} {NOUNS[b]} {VERBS[c]} the {ADJECTIVES[d]} {NOUNS[e]} {ADVERBIALS[f]}."
        for a, b, c, d, e, f in zip(*picks, strict=True)
    ]


class NonsenseWords:
    """343,000 different lower-case words of six letters, such as "bakiro", in random order."""

    def __init__(self, rng: np.random.Generator) -> None:
        # A permutation, because draws could repeat a word.
        self._order = rng.permutation(len(SYLLABLES) ** 3)

    def first(self, count: int) -> list[str]:
        """Return the first `count` words."""
        size = len(SYLLABLES)
        return [
            SYLLABLES[n // size**2] + SYLLABLES[n // size % size] + SYLLABLES[n % size]
            for n in self._order[:count].tolist()
        ]


def random_numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Return `count` different numbers of `digits` digits, without a leading zero."""
    low = 10 ** (digits - 1)
    return [str(low + n) for n in rng.choice(9 * low, size=count, replace=False).tolist()]


def random_variables(rng: np.random.Generator, count: int) -> list[str]:
    """Return `count` different names of five capitals."""
    numbers = rng.choice(26**5, size=count, replace=False).tolist()
    return ["".join(chr(65 + n // 26**place % 26) for place in range(5)) for n in numbers]


@dataclass(frozen=True)
class TaskText:
    """The text of one question, for a context of any size.

    Args:
        context: units (sentences, words of a list) -> the context with that many, at least `min_units`.
        answer_start: the words that the answer is made to begin with.
        references: what the answer must contain.
    """

    intro: str
    context: Callable[[int], str]
    question: str
    answer_start: str
    references: Sequence[str]
    min_units: int = 1

    def text(self, units: int, filler: str = "") -> str:
        """Return the whole question; `filler` follows the context."""
        return f"{self.intro}\n\n{self.context(units)}{filler}\n\n{self.question}"


class Haystack:
    """Sentences with needles between them.

    Args:
        needles: (depth, sentence) pairs. A needle goes to the sentence boundary nearest to its depth, which is the
            share of the haystack's characters before it.
    """

    def __init__(self, rng: np.random.Generator, needles: Sequence[tuple[float, str]]) -> None:
        self.rng = rng
        # A stable sort: needles of equal depth keep their order.
        self.needles = sorted(needles, key=lambda needle: needle[0])
        self.sentences: list[str] = []

    def __call__(self, units: int) -> str:
        while len(self.sentences) < units:
            self.sentences += random_sentences(self.rng, 1024)
        used = self.sentences[:units]
        boundaries = np.concatenate([[0], np.cumsum([len(sentence) + 1 for sentence in used])])
        parts, start = [], 0
        for depth, needle in self.needles:
            end = int(np.abs(boundaries - depth * boundaries[-1]).argmin())
            parts += [*used[start:end], needle]
            start = end
        return " ".join([*parts, *used[start:]])


def _needle_task(
    rng: np.random.Generator, needles: Sequence[tuple[float, str, str]], asked: Sequence[str], values: Sequence[str]
) -> TaskText:
    """Return a needle task. needles: (depth, key, value); asked: the keys in question; values: their values."""
    keys = ", ".join(asked[:-1]) + " and " + asked[-1] if len(asked) > 1 else asked[0]
    noun = "number" if len(values) == 1 else "numbers"
    return TaskText(
        "Some special magic numbers are hidden in the following text. Memorize them; you will be asked for them.",
        Haystack(rng, [(d, f"One of the special magic numbers for {key} is: {value}.") for d, key, value in needles]),
        f"What {'is' if len(values) == 1 else 'are all'} the special magic {noun} for {keys} in the text above?",
        f" The special magic {noun} for {keys} in the text above {'is' if len(values) == 1 else 'are'}",
        values,
    )


def niah_single(rng: np.random.Generator, depth: float) -> TaskText:
    """One key with one value, at `depth`."""
    key, value = NonsenseWords(rng).first(1), random_numbers(rng, 1, digits=7)
    return _needle_task(rng, [(depth, key[0], value[0])], key, value)


def niah_multikey(rng: np.random.Generator, depth: float) -> TaskText:
    """Several keys, of which the one at `depth` is asked for; the others are anywhere."""
    keys, values = NonsenseWords(rng).first(NUM_NEEDLES), random_numbers(rng, NUM_NEEDLES, digits=7)
    depths = [depth, *rng.random(NUM_NEEDLES - 1).tolist()]
    return _needle_task(rng, list(zip(depths, keys, values, strict=True)), keys[:1], values[:1])


def niah_multivalue(rng: np.random.Generator, depth: float) -> TaskText:
    """One key with several values, all asked for."""
    (key,), values = NonsenseWords(rng).first(1), random_numbers(rng, NUM_NEEDLES, digits=7)
    needles = [(d, key, value) for d, value in zip(rng.random(NUM_NEEDLES), values, strict=True)]
    return _needle_task(rng, needles, [key], values)


def niah_multiquery(rng: np.random.Generator, depth: float) -> TaskText:
    """Several keys, all asked for."""
    keys, values = NonsenseWords(rng).first(NUM_NEEDLES), random_numbers(rng, NUM_NEEDLES, digits=7)
    return _needle_task(rng, list(zip(rng.random(NUM_NEEDLES).tolist(), keys, values, strict=True)), keys, values)


def variable_tracking(rng: np.random.Generator, depth: float) -> TaskText:
    """A chain of assignments in the order of the text; all its variables are asked for."""
    chain, (value,) = random_variables(rng, NUM_HOPS + 1), random_numbers(rng, 1, digits=5)
    assignments = [f"VAR {chain[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
    return TaskText(
        "Memorize and track the chain of variable assignments that is hidden in the following text.",
        Haystack(rng, list(zip(np.sort(rng.random(NUM_HOPS + 1)).tolist(), assignments, strict=True))),
        f"Find all variables that are assigned the value {value} in the text above.",
        f" According to the assignments in the text above, {NUM_HOPS + 1} variables have the value {value}. They are:",
        chain,
    )


def common_words(rng: np.random.Generator, depth: float) -> TaskText:
    """A numbered list in which some words occur ten times as often as the others, or four times if it is short."""
    words, order_seed = NonsenseWords(rng), int(rng.integers(2**32))

    def context(units: int) -> str:
        # The common words take half of a short list.
        common_count = min(COMMON_COUNT, units // (2 * NUM_COMMON))
        other_count = max(1, common_count * OTHER_COUNT // COMMON_COUNT)
        num_others = -(-(units - NUM_COMMON * common_count) // other_count)
        chosen = words.first(NUM_COMMON + num_others)
        entries = (chosen[:NUM_COMMON] * common_count + chosen[NUM_COMMON:] * other_count)[:units]
        shuffled = np.random.default_rng([order_seed, units]).permutation(units).tolist()
        return " ".join(f"{number}. {entries[entry]}" for number, entry in enumerate(shuffled, 1))

    return TaskText(
        "Below is a numbered list of words. Some of them appear more often than others. Memorize those that appear "
        "most often.",
        context,
        f"What are the {NUM_COMMON} most common words in the list above?",
        f" The {NUM_COMMON} words that appear most often in the list above are:",
        words.first(NUM_COMMON),
        # A shorter list would have each common word fewer than four times.
        min_units=2 * NUM_COMMON * 4,
    )


def frequent_words(rng: np.random.Generator, depth: float) -> TaskText:
    """Words whose counts fall with the square of their rank (a zeta distribution); the first three are asked for."""
    words, order_seed = NonsenseWords(rng), int(rng.integers(2**32))

    def context(units: int) -> str:
        ranks = np.arange(1, units + 1)
        counts = np.maximum(1, units * ranks**-ZETA_EXPONENT / (np.pi**2 / 6)).astype(np.int64)
        # Each of the rare words once, until the text is full.
        used = int(np.searchsorted(np.cumsum(counts), units)) + 1
        entries = np.repeat(np.array(words.first(used)), counts[:used])[:units]
        return " ".join(np.random.default_rng([order_seed, units]).permutation(entries).tolist())

    return TaskText(
        "Read the following text of coded words and keep track of how often each appears.",
        context,
        f"What are the {NUM_FREQUENT} most frequent words in the coded text above? Ignore the dots.",
        f" The {NUM_FREQUENT} most frequent words in the coded text above are:",
        words.first(NUM_FREQUENT),
        min_units=60,
    )


TASKS: dict[str, Callable[[np.random.Generator, float], TaskText]] = {
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
TASKS_WITH_DEPTH = ("niah_single", "niah_multikey")
"""Tasks whose answer is at the depth; the others ask for what is spread over the text."""
