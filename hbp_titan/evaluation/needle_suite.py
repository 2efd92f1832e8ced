"""The needle suite: prompts of exact lengths, their answers, and the scores by task, length and depth.

Owns the way from a task to a prompt, the score, and the summary of a whole run. The tasks are puzzles.py's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from hbp_titan.evaluation.fit import fit_units
from hbp_titan.evaluation.prompt import Prompter
from hbp_titan.evaluation.puzzles import TASKS, WITH_DEPTH

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
