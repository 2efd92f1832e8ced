"""Needle suite: prompts of exact token lengths for the tasks of `needle_tasks.py`, scores by task, length and depth.

Owns the way from a task to the token ids of a prompt, the score, and its summary as table, JSON and heat map.
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.data.chat_template import ChatTemplate
from hbp_titan.data.files import chat_template_file
from hbp_titan.data.formats import check_variables
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.errors import UserError
from hbp_titan.evaluation.needle_tasks import TASKS, TASKS_WITH_DEPTH, TaskText
from hbp_titan.job_config import Data
from hbp_titan.models.hf_config import token_ids_from_hf
from hbp_titan.utils import human_count

FILLER = " ."
FIRST_STEP = 32
"""Units by which the first guess of `fit_units` exceeds the minimum."""
# Pixels of the heat map.
CELL_WIDTH, CELL_HEIGHT, LEFT, TITLE, GAP = 58, 24, 150, 30, 34

Backend = Callable[[Sequence[Sequence[int]], Sequence[int]], list[str]]
"""(prompts, max_new_tokens of each) -> the text that follows each prompt."""


class PromptFormatter:
    """Question -> prompt token ids, and answer token ids -> text, with the tokenizer of an HF folder.

    With a chat template the prompt ends in the header of the assistant's turn; without one it is the bare text after
    the tokenizer's own prefix (such as a beginning-of-text token).
    data: the template, its variables and its day, as in training [those of the folder].
    Raises ValueError if the folder has no tokenizer or its template does not compile.
    """

    def __init__(self, folder: Path, data: Data | None = None) -> None:
        data = data or Data()
        tokenizer_folder = read_tokenizer_folder(folder, chat_template_file(data.chat_template))
        has_template = bool(tokenizer_folder.chat_template)
        self.template = ChatTemplate(tokenizer_folder, data.template_date) if has_template else None
        self._variables = check_variables(data.chat_template_kwargs, "data.chat_template_kwargs")
        self.stop_ids = stop_ids(folder)
        # With a template, the prefix that the tokenizer adds would come twice.
        self.tokenizer = tokenizer_folder.load(post_processor=self.template is None)
        self._server_tokenizer = tokenizer_folder.load(post_processor=True)

    def ids(self, question: str, answer_start: str = "") -> list[int]:
        """Return the token ids of a prompt whose answer begins with `answer_start`."""
        if self.template is None:
            return self.tokenizer.encode(f"{question}{answer_start}").ids
        messages = [{"role": "user", "content": question}]
        text = self.template.render(messages, add_generation_prompt=True, variables=self._variables)
        # After a header that ends in a line break no model writes a space first.
        start = answer_start.lstrip() if text[-1:].isspace() else answer_start
        return self.tokenizer.encode(f"{text}{start}", add_special_tokens=False).ids

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Return the text that a server's tokenizer, which adds its own prefix, encodes to `ids`.

        Raises ValueError if there is none.
        """
        for begin in (0, 1):
            text = self.tokenizer.decode(list(ids[begin:]), skip_special_tokens=False)
            if self._server_tokenizer.encode(text).ids == list(ids):
                return text
        raise ValueError(
            "the server takes no token ids, and as text the prompt becomes other tokens; use vLLM or llama.cpp's server"
        )

    def count(self, text: str) -> int:
        """Return the number of tokens of a piece of text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def stop_ids(folder: Path) -> list[int]:
    """Return the ids that end an answer: of generation_config.json, else config.json; and the tokenizer's eos_token.

    vLLM stops at the same ones, transformers only at the first.
    """
    eos = token_ids_from_hf(folder).get("eos_token_id")
    tokenizer_folder = read_tokenizer_folder(folder)
    name = tokenizer_folder.special_tokens.get("eos_token")
    own = None if name is None else tokenizer_folder.load().token_to_id(name)
    found = [*(eos if isinstance(eos, list) else [eos]), own]
    return [index for index in dict.fromkeys(found) if index is not None]


def fit_units(num_tokens: Callable[[int], int], target: int, min_units: int, name: str) -> int:
    """Return the largest number of units, at least `min_units`, whose text has at most `target` tokens.

    num_tokens: units -> tokens of their text, growing with the units. Each call tokenizes the text, tenths of a second
        at 128K tokens; because tokens grow nearly in proportion to units, interpolation needs only a few.
    Raises ValueError, naming `name`, if `min_units` units already have too many tokens.
    """
    low, tokens_low = min_units, num_tokens(min_units)
    if tokens_low > target:
        raise ValueError(f"{name} needs at least {tokens_low} tokens, but has space for {target}; use a greater length")
    high: float = math.inf
    tokens_high, units, calls = 0, min_units + FIRST_STEP, 0
    while high - low > 1:
        tokens = num_tokens(units)
        calls += 1
        fits = tokens <= target
        if high == math.inf:
            per_unit = (tokens - tokens_low) / (units - low)
        if fits:
            low, tokens_low = units, tokens
        else:
            high, tokens_high = units, tokens
        if high < math.inf:
            per_unit = (tokens_high - tokens_low) / (high - low)
        # Aim at the last unit that fits; from below it, at the one after, so that both ends close in.
        units = low + int((target - tokens_low) / max(per_unit, 0.01)) + fits
        if calls % 8 == 0 and high < math.inf:
            units = int(low + high) // 2
        units = int(min(max(units, low + 1), high - 1))
    return low


@dataclass(frozen=True)
class Question:
    """One prompt of the suite. The prompt and the space for its answer, `max_new_tokens`, add up to `length`."""

    task: str
    length: int
    depth: float | None
    sample: int
    prompt: list[int]
    max_new_tokens: int
    references: Sequence[str]


@dataclass(frozen=True)
class ScoredAnswer:
    """The answer to a question and its score, the share of the references that it contains."""

    task: str
    length: int
    depth: float | None
    sample: int
    score: float
    answer: str
    references: Sequence[str]


def make_question(formatter: PromptFormatter, task: str, length: int, depth: float, sample: int, seed: int) -> Question:
    """Return the question of these coordinates, always the same for the same tokenizer.

    length: tokens of the prompt and of the space for its answer, which is twice the references and 32 more; the prompt
        may be one or two tokens short.
    Raises ValueError if the task does not fit in `length`.
    """
    task_text, max_new_tokens = _task_text(formatter, task, length, depth, sample, seed)

    def prompt(units: int, fillers: int = 0) -> list[int]:
        return formatter.ids(task_text.text(units, FILLER * fillers), task_text.answer_start)

    target, name = length - max_new_tokens, f"{task} of length {length}"
    units = fit_units(lambda n: len(prompt(n)), target, task_text.min_units, name)
    # A unit has several tokens; fillers of one token make up the rest.
    fillers = fit_units(lambda n: len(prompt(units, n)), target, 0, name)
    shown_depth = depth if task in TASKS_WITH_DEPTH else None
    references = task_text.references
    return Question(task, length, shown_depth, sample, prompt(units, fillers), max_new_tokens, references)


def _task_text(
    formatter: PromptFormatter, task: str, length: int, depth: float, sample: int, seed: int
) -> tuple[TaskText, int]:
    """Return the text of a question and the tokens of its answer's space."""
    # crc32 instead of hash(), which differs from process to process.
    rng = np.random.default_rng([seed, zlib.crc32(task.encode()), length, round(depth * 1e6), sample])
    task_text = TASKS[task](rng, depth)
    return task_text, 2 * formatter.count(", ".join(task_text.references)) + 32


def check_lengths(
    formatter: PromptFormatter,
    tasks: Sequence[str],
    lengths: Sequence[int],
    coordinates: Sequence[tuple[float, int]],
    seed: int,
) -> None:
    """Raise UserError, with a line per length, if a question of a task does not fit in it.

    coordinates: (depth, sample) of the questions.
    """
    lines = []
    for length in lengths:
        needed = dict.fromkeys(tasks, 0)
        for task in tasks:
            for depth, sample in coordinates:
                text, space = _task_text(formatter, task, length, depth, sample, seed)
                prompt = formatter.ids(text.text(text.min_units, ""), text.answer_start)
                needed[task] = max(needed[task], len(prompt) + space)
        short = [f"{task} needs {tokens} tokens" for task, tokens in needed.items() if tokens > length]
        if short:
            lines.append(f"--lengths {length}: {', '.join(short)}; use a greater length or other --needle_tasks")
    if lines:
        raise UserError(lines)


def score(answer: str, references: Sequence[str]) -> float:
    """Return the share of the references that the answer contains, ignoring case (RULER's string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def run_suite(
    formatter: PromptFormatter,
    backend: Backend,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    report: Callable[[str], None] = lambda line: None,
) -> list[ScoredAnswer]:
    """Ask and score every question, length by length, the questions of one task together.

    Each task has `samples` questions per depth, also those that have no depth.
    Raises ValueError for an unknown task and for a length that a task does not fit in.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} must be one of {', '.join(TASKS)}")
    coordinates = [(depth, sample) for depth in depths for sample in range(samples)]
    # Before the first question, which may take minutes.
    check_lengths(formatter, tasks, lengths, coordinates, seed)
    scored: list[ScoredAnswer] = []
    for length in lengths:
        for task in tasks:
            # Prompts of one call have nearly the same length, so their batches have little padding.
            asked = [make_question(formatter, task, length, depth, sample, seed) for depth, sample in coordinates]
            answers = backend([q.prompt for q in asked], [q.max_new_tokens for q in asked])
            new = [
                ScoredAnswer(q.task, q.length, q.depth, q.sample, score(answer, q.references), answer, q.references)
                for q, answer in zip(asked, answers, strict=True)
            ]
            scored += new
            report(f"{task} at {length}: {_mean(new):.1%} of {len(new)} answers")
    return scored


def mean_scores(scored: Iterable[ScoredAnswer], *keys: str) -> dict[tuple[Any, ...], float]:
    """Return the mean score of each combination of the fields `keys`, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[ScoredAnswer]] = {}
    for item in scored:
        groups.setdefault(tuple(getattr(item, key) for key in keys), []).append(item)
    return {group: _mean(items) for group, items in groups.items()}


def score_table(scored: Sequence[ScoredAnswer]) -> str:
    """Return tasks by lengths, in percent, with the mean over the tasks below."""
    means = mean_scores(scored, "task", "length")
    tasks, lengths = (list(dict.fromkeys(key[i] for key in means)) for i in (0, 1))
    width = max(len(task) for task in [*tasks, "mean"])
    lines = [f"{'task':<{width}}" + "".join(f"{length:>9}" for length in lengths)]
    lines += [f"{task:<{width}}" + "".join(f"{100 * means[task, n]:9.1f}" for n in lengths) for task in tasks]
    over_tasks = [np.mean([means[task, n] for task in tasks]) for n in lengths]
    lines.append(f"{'mean':<{width}}" + "".join(f"{100 * mean:9.1f}" for mean in over_tasks))
    return "\n".join(lines)


def as_json(scored: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """Return the means by task and length, and by depth for tasks with one, then every answer."""
    by_depth = mean_scores([item for item in scored if item.depth is not None], "task", "length", "depth")
    return {
        "scores": [{"task": t, "length": n, "score": s} for (t, n), s in mean_scores(scored, "task", "length").items()],
        "by_depth": [{"task": t, "length": n, "depth": d, "score": s} for (t, n, d), s in by_depth.items()],
        "answers": [asdict(item) for item in scored],
    }


def _mean(scored: Sequence[ScoredAnswer]) -> float:
    return float(np.mean([item.score for item in scored]))


def heat_maps(scored: Sequence[ScoredAnswer]) -> str:
    """Return an SVG document with one panel of tasks by lengths, and one of depths by lengths per task with a depth."""
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
    """Return the panel and its height. means: by (row, length)."""
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
    # From red (0) through yellow to green (1), all light enough for black digits.
    return (
        f'<rect x="{left}" y="{top}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" '
        f'fill="hsl({120 * score:.0f} 70% 65%)"><title>{html.escape(tip)}: {score:.1%}</title></rect>'
        f'<text x="{left + CELL_WIDTH / 2 - 1}" y="{top + 15}" text-anchor="middle">{100 * score:.0f}</text>'
    )
