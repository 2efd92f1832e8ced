"""Text without meaning or source: sentences, words, numbers and names, made from a seeded generator.

Owns the small vocabulary. Nothing is downloaded, nothing was in a training set, and no word of one kind is a part of
another of that kind, so a search for an answer cannot hit by accident.
"""

from __future__ import annotations

import numpy as np

# fmt: off
_ADJECTIVES = [
    "old", "new", "small", "large", "quiet", "busy", "dark", "bright", "narrow", "wide",
    "gentle", "rough", "early", "late", "plain", "green", "grey", "warm", "cold", "dry",
]
_NOUNS = [
    "farmer", "teacher", "baker", "sailor", "doctor", "painter", "driver", "writer", "garden", "bridge",
    "window", "river", "market", "letter", "village", "harbour", "mountain", "kitchen", "library", "station",
    "forest", "street", "island", "tower", "meadow", "journey", "basket", "lantern", "blanket", "engine",
]
_VERBS = [
    "finds", "sees", "leaves", "keeps", "needs", "passes",
    "follows", "reaches", "repairs", "remembers", "describes", "watches",
]
_ENDINGS = [
    "in the morning", "after a while", "without a word", "near the old road", "before the rain", "as in every year",
    "for a long time", "at the end of the day", "on the way home", "behind the house", "once again", "with great care",
]
# fmt: on
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """`count` sentences of 8 to 14 words, with neither digits nor capitals inside."""
    parts = (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS, _ENDINGS)
    picks = [rng.integers(len(part), size=count).tolist() for part in parts]
    made = []
    for a, b, c, d, e, f in zip(*picks, strict=True):
        made.append(f"The {_ADJECTIVES[a]} {_NOUNS[b]} {_VERBS[c]} the {_ADJECTIVES[d]} {_NOUNS[e]} {_ENDINGS[f]}.")
    return made


class NonsenseWords:
    """343,000 different lower-case words of six letters, as "bakiro", in an order of the generator's."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._order = rng.permutation((len(_CONSONANTS) * len(_VOWELS)) ** 3)

    def first(self, count: int) -> list[str]:
        """The first `count` of them."""
        size = len(_CONSONANTS) * len(_VOWELS)
        syllables = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]
        chosen = self._order[:count].tolist()
        return [syllables[n // size**2] + syllables[n // size % size] + syllables[n % size] for n in chosen]


def numbers(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """`count` different numbers of so many digits, without a leading zero."""
    low = 10 ** (digits - 1)
    return [str(low + n) for n in rng.choice(9 * low, size=count, replace=False).tolist()]


def names(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different names of five capitals, as variables have."""
    taken = rng.choice(26**5, size=count, replace=False).tolist()
    return ["".join(chr(65 + n // 26**place % 26) for place in range(5)) for n in taken]
