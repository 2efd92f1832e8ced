"""The needle suite: prompts of exact lengths, their answers, and the scores by task, length and depth.

Owns the way from a task to a prompt, the score, and the summary of a whole run. The tasks are puzzles.py's.

The questions of the needle suite: what is hidden in a text of any size, and what must come back.

Owns the seven tasks, after RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3): the same tasks with text, words and
wording of this project's own, without examples before the question. Figures are therefore not RULER's.
A puzzle's text is made of units (sentences, words of a list); fit.py finds how many.

Text without meaning or source: sentences, words, numbers and names, made from a seeded generator.

Owns the small vocabulary. Nothing is downloaded, nothing was in a training set, and no word of one kind is a part of
another of that kind, so a search for an answer cannot hit by accident.

How many units of text have just the wanted number of tokens, whatever the tokenizer.

Owns the search. Tokens are counted, never assumed, but grow nearly in proportion to the units, so a few counts suffice;
at 128K tokens each takes a few tenths of a second.

Scores as one SVG picture: tasks by length, and for each task with a depth its depths by length.

Owns the drawing. Each cell shows its figure, so the picture can be read without its colours.

A question as the tokens that a model is asked to continue, and its answer as text.

Owns the two forms: through the chat template with the header of the assistant's turn, where the folder has a template,
else the bare text behind the tokenizer's own prefix (as a beginning-of-text token). In both the answer's first words
may be given. Also which ids end an answer.
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from hbp_titan.data.chat_template import ChatTemplate
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.models.hf_config import token_ids_from_hf
from hbp_titan.utils import human_count


class Prompter:
    """The tokenizer of an HF folder, ready to ask.

    Raises ValueError where the folder lacks a tokenizer or its template does not compile.
    """

    def __init__(self, folder: Path) -> None:
        described = read_tokenizer_folder(folder)
        self.template = ChatTemplate(described) if described.chat_template else None
        self.stop_ids = stop_ids(folder)
        # With a template no prefix must be added, which `load` sees to.
        self.tokenizer = described.load() if self.template else Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, question: str, answer_start: str = "") -> list[int]:
        """The prompt's tokens; `answer_start` is what the answer is made to begin with."""
        if self.template is None:
            return self.tokenizer.encode(f"{question}{answer_start}").ids
        messages = [{"role": "user", "content": question}]
        text = self.template.render(messages, add_generation_prompt=True)
        start = answer_start.lstrip() if text[-1:].isspace() else answer_start
        return self.tokenizer.encode(f"{text}{start}", add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def stop_ids(folder: Path) -> list[int]:
    """The ids that end an answer: those of generation_config.json, else of config.json, else the tokenizer's eos."""
    eos = token_ids_from_hf(folder).get("eos_token_id")
    if eos is None:
        described = read_tokenizer_folder(folder)
        name = described.special_tokens.get("eos_token")
        eos = None if name is None else described.load().token_to_id(name)
    return [] if eos is None else list(eos) if isinstance(eos, list) else [eos]


FIRST_STEP = 32


def fit_units(tokens_of: Callable[[int], int], target: int, fewest: int, what: str) -> int:
    """The most units, at least `fewest`, whose text has at most `target` tokens.

    tokens_of: tokens of the text of n units, growing with n. Raises ValueError, naming `what`, where those of `fewest`
    units are already too many.
    """
    low, tokens_low = fewest, tokens_of(fewest)
    if tokens_low > target:
        raise ValueError(f"{what} needs {tokens_low} tokens at least, but has room for {target}: give a greater length")
    high: float = math.inf
    tokens_high, units, counted = 0, fewest + FIRST_STEP, 0
    while high - low > 1:
        tokens = tokens_of(units)
        counted += 1
        below = tokens <= target
        if high == math.inf:
            per_unit = (tokens - tokens_low) / (units - low)
        if below:
            low, tokens_low = units, tokens
        else:
            high, tokens_high = units, tokens
        if high < math.inf:
            per_unit = (tokens_high - tokens_low) / (high - low)
        # Aimed at the last unit that fits; once below it, at the one after, so that both ends close in.
        units = low + int((target - tokens_low) / max(per_unit, 0.01)) + below
        if counted % 8 == 0 and high < math.inf:
            units = int(low + high) // 2
        units = int(min(max(units, low + 1), high - 1))
    return low


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


PAD = " ."


class Answerer(Protocol):
    """A model, here or at a server."""

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        """The text that follows each prompt, of at most so many tokens as its limit."""


@dataclass(frozen=True)
class Question:
    """One prompt of the suite. limit: tokens kept free for its answer; prompt and limit make up `length`."""

    task: str
    length: int
    depth: float | None
    sample: int
    prompt: list[int]
    limit: int
    references: Sequence[str]


@dataclass(frozen=True)
class Scored:
    """A question's answer and its score, the share of the references that it contains."""

    task: str
    length: int
    depth: float | None
    sample: int
    score: float
    answer: str
    references: Sequence[str]


def make_question(prompter: Prompter, task: str, length: int, depth: float, sample: int, seed: int) -> Question:
    """The question of these coordinates, always the same for the same tokenizer folder.

    length: tokens of the prompt with the room for its answer, which is twice the references' and 32 more; a prompt may
    lack the last token or two. Raises ValueError where the task does not fit in `length`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, round(depth * 1e6), sample])
    puzzle = TASKS[task](rng, depth)
    limit = 2 * prompter.count(", ".join(puzzle.references)) + 32

    def prompt(units: int, dots: int = 0) -> list[int]:
        return prompter.ids(puzzle.text(units, PAD * dots), puzzle.answer_start)

    what = f"{task} of length {length}"
    units = fit_units(lambda n: len(prompt(n)), length - limit, puzzle.fewest, what)
    dots = fit_units(lambda n: len(prompt(units, n)), length - limit, 0, what)
    known_depth = depth if task in WITH_DEPTH else None
    return Question(task, length, known_depth, sample, prompt(units, dots), limit, puzzle.references)


def score(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, whatever their case (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def questions(
    prompter: Prompter, tasks: Iterable[str], length: int, depths: Sequence[float], samples: int, seed: int
) -> Iterator[Question]:
    """Of each task `samples` questions for each depth; a task that has no depth gets as many."""
    for task in tasks:
        for depth in depths:
            for sample in range(samples):
                yield make_question(prompter, task, length, depth, sample, seed)


def run_suite(
    prompter: Prompter,
    answerer: Answerer,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> list[Scored]:
    """Every question asked and scored, length by length, each task's questions together.

    Raises ValueError for an unknown task and for a length that a task does not fit in.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")
    scored: list[Scored] = []
    for length in lengths:
        for task in tasks:
            asked = list(questions(prompter, [task], length, depths, samples, seed))
            answers = answerer([q.prompt for q in asked], [q.limit for q in asked])
            new = [
                Scored(q.task, q.length, q.depth, q.sample, score(answer, q.references), answer, q.references)
                for q, answer in zip(asked, answers, strict=True)
            ]
            scored += new
            report(f"{task} at {length}: {_mean(new):.1%} of {len(new)} answers")
    return scored


def mean_scores(scored: Iterable[Scored], *keys: str) -> dict[tuple[Any, ...], float]:
    """Mean score of each combination of the fields `keys`, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Scored]] = {}
    for item in scored:
        groups.setdefault(tuple(getattr(item, key) for key in keys), []).append(item)
    return {group: _mean(items) for group, items in groups.items()}


def score_table(scored: Sequence[Scored]) -> str:
    """Tasks by lengths, in percent, with the mean over the tasks below."""
    means = mean_scores(scored, "task", "length")
    tasks, lengths = (list(dict.fromkeys(key[i] for key in means)) for i in (0, 1))
    width = max(len(task) for task in [*tasks, "mean"])
    lines = [f"{'task':<{width}}" + "".join(f"{length:>9}" for length in lengths)]
    lines += [f"{task:<{width}}" + "".join(f"{100 * means[task, at]:9.1f}" for at in lengths) for task in tasks]
    over_tasks = [np.mean([means[task, at] for task in tasks]) for at in lengths]
    lines.append(f"{'mean':<{width}}" + "".join(f"{100 * mean:9.1f}" for mean in over_tasks))
    return "\n".join(lines)


def as_json(scored: Sequence[Scored]) -> dict[str, Any]:
    """Means by task and length and, where there is a depth, by depth; then every answer."""
    by_depth = mean_scores([item for item in scored if item.depth is not None], "task", "length", "depth")
    return {
        "scores": [{"task": t, "length": n, "score": s} for (t, n), s in mean_scores(scored, "task", "length").items()],
        "by_depth": [{"task": t, "length": n, "depth": d, "score": s} for (t, n, d), s in by_depth.items()],
        "answers": [asdict(item) for item in scored],
    }


def _mean(scored: Sequence[Scored]) -> float:
    return float(np.mean([item.score for item in scored]))


CELL_WIDTH, CELL_HEIGHT, LEFT, TITLE, GAP = 58, 24, 150, 30, 34


def heat_maps(scored: Sequence[Scored]) -> str:
    """The SVG document. Rows are tasks, then depths from the start of the text downwards; columns are lengths."""
    lengths = sorted({item.length for item in scored})
    panels = [_panel("score by task", mean_scores(scored, "task", "length"), lengths)]
    for task in dict.fromkeys(item.task for item in scored if item.depth is not None):
        means = mean_scores([item for item in scored if item.task == task], "depth", "length")
        panels.append(_panel(f"{task}: score by depth", means, lengths))
    width, height, parts = LEFT + CELL_WIDTH * len(lengths) + 20, 10, []
    for panel, panel_height in panels:
        parts.append(f'<g transform="translate(0 {height})">{panel}</g>')
        height += panel_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, means: Mapping[tuple[Any, ...], float], lengths: Sequence[int]) -> tuple[str, int]:
    """The panel and its height. means: by (row, length)."""
    rows = list(dict.fromkeys(row for row, _ in means))
    parts = [f'<text x="10" y="14" font-weight="bold" font-size="13">{html.escape(title)}</text>']
    for y, row in enumerate(rows):
        top = TITLE + y * CELL_HEIGHT
        name = row if isinstance(row, str) else f"depth {row:.0%}"
        parts.append(f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{html.escape(name)}</text>')
        for x, length in enumerate(lengths):
            if (row, length) in means:
                parts.append(_cell(LEFT + x * CELL_WIDTH, top, means[row, length], f"{name}, {length} tokens"))
    bottom = TITLE + len(rows) * CELL_HEIGHT
    for x, length in enumerate(lengths):
        middle = LEFT + (x + 0.5) * CELL_WIDTH
        parts.append(f'<text x="{middle}" y="{bottom + 14}" text-anchor="middle">{human_count(length, 1024)}</text>')
    return "".join(parts), bottom + GAP


def _cell(left: float, top: float, score: float, tip: str) -> str:
    # From red (0) over yellow to green (1), all light enough for black figures.
    return (
        f'<rect x="{left}" y="{top}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'fill="hsl({120 * score:.0f} 70% 65%)"><title>{html.escape(tip)}: {score:.1%}</title></rect>'
        f'<text x="{left + CELL_WIDTH / 2 - 1}" y="{top + 15}" text-anchor="middle">{100 * score:.0f}</text>'
    )
