"""The needle suite: lengths counted by the tokenizer, depths in the text, references found by reading the prompt."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.evaluation.needle_tasks import TASKS, random_sentences
from hbp_titan.evaluation.needles import (
    PromptFormatter,
    ScoredAnswer,
    as_json,
    fit_units,
    heat_maps,
    make_question,
    mean_scores,
    run_suite,
    score,
    score_table,
)
from hbp_titan.job_config import Data

DEPTHS = (0.0, 0.5, 1.0)


def bpe_folder(folder: Path) -> Path:
    """A ChatML tokenizer of 1000 entries; whole words of the sentences are single tokens."""
    train_tokenizer(random_sentences(np.random.default_rng(9), 300), folder, vocab_size=1000)
    return folder


def byte_folder(folder: Path) -> Path:
    """A ChatML tokenizer whose tokens are bytes."""
    train_tokenizer(["text"], folder, vocab_size=260)
    return folder


def plain_folder(folder: Path) -> Path:
    """A SentencePiece-like tokenizer of characters with a beginning-of-text token and without a template."""
    folder.mkdir()
    characters = [chr(code) for code in range(32, 127)] + ["\u2581", "\n"]
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{c: i for i, c in enumerate(characters, 1)}}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("", behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


MAKERS = {"bpe": bpe_folder, "byte": byte_folder, "plain": plain_folder}


@pytest.fixture(scope="module")
def formatters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptFormatter]:
    return {name: PromptFormatter(make(tmp_path_factory.mktemp("t") / name)) for name, make in MAKERS.items()}


def test_prompts_use_the_template_the_variables_and_the_day_of_training(tmp_path: Path) -> None:
    folder = byte_folder(tmp_path)
    template = "{{ strftime_now('%Y') }} {{ mode | default('none') }} {{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    data = Data(chat_template_kwargs={"mode": "x"}, template_date="2025-01-31")
    for settings, prompt in (
        (None, "2024 none Hi"),
        (data, "2025 x Hi"),
        (Data(chat_template="chatml"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ):
        formatter = PromptFormatter(folder, settings)
        assert formatter.tokenizer.decode(formatter.ids("Hi"), skip_special_tokens=False) == prompt
    with pytest.raises(ValueError, match="must not replace tools"):
        PromptFormatter(folder, Data(chat_template_kwargs={"tools": []}))


@pytest.mark.parametrize("kind", MAKERS)
def test_prompt_and_answer_space_add_up_to_the_length(formatters: dict[str, PromptFormatter], kind: str) -> None:
    formatter = formatters[kind]
    for task, length in itertools.product(TASKS, (1500, 6000)):
        question = make_question(formatter, task, length, 0.4, 0, seed=1)
        assert length - 2 <= len(question.prompt) + question.max_new_tokens <= length
        assert question.max_new_tokens >= formatter.count(", ".join(question.references))


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey"])
def test_needle_is_at_its_depth(formatters: dict[str, PromptFormatter], task: str) -> None:
    formatter = formatters["byte"]  # one token per character
    for depth in np.linspace(0, 1, 11).tolist():
        question = make_question(formatter, task, 8192, depth, 0, seed=0)
        haystack = formatter.text(question.prompt).split("\n\n")[1]
        (reference,) = question.references
        needle = re.search(rf"One of the special magic numbers for \w+ is: {reference}\. ?", haystack)
        assert needle
        around = len(haystack) - len(needle[0])
        # The nearest sentence boundary: at most half of the longest sentence (about 80 characters) away.
        assert abs(needle.start() / around - depth) < (0.035 if task == "niah_multikey" else 0.01)


def solve(prompt: str, task: str) -> list[str]:
    """Return the right answer, found in the prompt alone."""
    body, question = prompt.split("\n\n")[1:3]
    if task.startswith("niah"):
        keys = re.search(r" for ([\w, ]+) in the text above", question)
        assert keys
        asked = set(re.split(r", | and ", keys[1]))
        found = re.findall(r"for (\w+) is: (\d+)\.", body)
        return [value for key, value in found if key in asked]
    if task == "variable_tracking":
        known = set(re.findall(r"assigned the value (\d+)", question))
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body):
            known |= {name} if source in known else set()
        return sorted(name for name in known if name.isalpha())
    count = int(re.search(r"the (\d+) most", question)[1])  # type: ignore[index]
    ranking = Counter(re.findall(r"[a-z]+", body)).most_common()
    assert ranking[count - 1][1] > ranking[count][1]  # nothing else is as frequent as the last of the answer
    return [word for word, _ in ranking[:count]]


@pytest.mark.parametrize("task", TASKS)
def test_references_can_be_found_in_the_prompt(formatters: dict[str, PromptFormatter], task: str) -> None:
    for length, depth in ((1500, 0.0), (6000, 1.0)):
        question = make_question(formatters["bpe"], task, length, depth, 0, seed=3)
        text = formatters["bpe"].tokenizer.decode(question.prompt, skip_special_tokens=False)
        assert sorted(solve(text, task)) == sorted(question.references)
        assert not any(reference in text.split("\n\n")[2] for reference in question.references)


def test_prompt_follows_the_chat_template_and_begins_the_answer(formatters: dict[str, PromptFormatter]) -> None:
    question = make_question(formatters["bpe"], "niah_single", 600, 0.5, 0, seed=0)
    text = formatters["bpe"].tokenizer.decode(question.prompt, skip_special_tokens=False)
    assert re.fullmatch(
        r"<\|im_start\|>user\nSome special .*<\|im_end\|>\n<\|im_start\|>assistant\n"
        r"The special magic number for \w+ in the text above is",
        text,
        re.DOTALL,
    )
    plain = make_question(formatters["plain"], "niah_single", 1500, 0.5, 0, seed=0)
    assert plain.prompt[0] == 0
    assert plain.prompt.count(0) == 1


def test_question_depends_on_seed_and_coordinates_only(formatters: dict[str, PromptFormatter]) -> None:
    first = [make_question(formatters["bpe"], task, 2000, 0.5, 1, seed=7) for task in TASKS]
    again = [make_question(formatters["bpe"], task, 2000, 0.5, 1, seed=7) for task in reversed(TASKS)]
    assert first == again[::-1]
    for other in ({"seed": 8}, {"sample": 2}):
        changed = make_question(formatters["bpe"], "niah_single", 2000, 0.5, **{"sample": 1, "seed": 7, **other})
        assert changed.references != first[0].references


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("It is 12 and 34.", 1.0), ("only 34", 0.5), ("", 0.0), ("ABC 12", 0.5)],
)
def test_score_is_the_share_of_references_in_the_answer(answer: str, expected: float) -> None:
    assert score(answer, ["12", "34"]) == expected
    assert score(answer.replace("12", "AbC").replace("34", "dEf"), ["aBc", "DEF"]) >= expected


class Reader:
    """Answers from the prompt's text; at length 3000 it ignores the second half."""

    def __init__(self, formatter: PromptFormatter, tasks: Sequence[str]) -> None:
        self.formatter, self.tasks = formatter, iter(tasks)

    def __call__(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[str]:
        task = next(self.tasks)
        answers = []
        for prompt in prompts:
            intro, body, question = self.formatter.text(prompt).split("\n\n")[:3]
            body = body[: len(body) // 2] if len(prompt) > 2500 else body
            answers.append(", ".join(solve("\n\n".join((intro, body, question)), task)))
        return answers


def test_suite_reports_scores_by_task_length_and_depth(formatters: dict[str, PromptFormatter]) -> None:
    tasks, lengths, lines = ["niah_single", "variable_tracking"], [1500, 3000], []
    reader = Reader(formatters["bpe"], tasks * 2)
    scored = run_suite(formatters["bpe"], reader, tasks, lengths, DEPTHS, 1, 0, lines.append)
    assert mean_scores(scored, "task", "length")["niah_single", 1500] == 1.0
    by_depth = mean_scores([item for item in scored if item.length == 3000 and item.depth is not None], "depth")
    assert by_depth == {(0.0,): 1.0, (0.5,): by_depth[(0.5,)], (1.0,): 0.0}
    assert lines[0] == "niah_single at 1500: 100.0% of 3 answers"
    values = as_json(scored)
    assert {(e["length"], e["depth"]) for e in values["by_depth"]} == set(itertools.product(lengths, DEPTHS))
    assert len(values["answers"]) == len(scored) == 12
    json.dumps(values)


def test_mistakes_raise(formatters: dict[str, PromptFormatter]) -> None:
    with pytest.raises(ValueError, match="niah_single"):
        run_suite(formatters["bpe"], Reader(formatters["bpe"], []), ["niah"], [600], DEPTHS, 1, 0)
    with pytest.raises(ValueError, match="common_words of length 200"):
        make_question(formatters["bpe"], "common_words", 200, 0.5, 0, seed=0)


SCORED = [
    ScoredAnswer("niah_single", 4096, 0.0, 0, 1.0, "", ["x"]),
    ScoredAnswer("niah_single", 4096, 1.0, 0, 0.5, "", ["x"]),
    ScoredAnswer("niah_single", 8192, 0.0, 0, 0.25, "", ["x"]),
    ScoredAnswer("common_words", 4096, None, 0, 0.25, "", ["x"]),
    ScoredAnswer("common_words", 8192, None, 0, 0.15, "", ["x"]),
]


def test_table_shows_tasks_by_lengths_and_their_mean() -> None:
    assert score_table(SCORED).splitlines() == [
        "task             4096     8192",
        "niah_single      75.0     25.0",
        "common_words     25.0     15.0",
        "mean             50.0     20.0",
    ]


def test_heat_map_has_a_cell_per_score() -> None:
    root = ElementTree.fromstring(heat_maps(SCORED))
    tips = [tip.text for tip in root.iter("{http://www.w3.org/2000/svg}title")]
    # Two tasks at two lengths; then depths, of which the longer length has one.
    assert len(tips) == 4 + 3
    assert tips[0] == "niah_single, 4096 tokens: 75.0%"
    assert tips[-1] == "depth 100%, 4096 tokens: 50.0%"


@pytest.mark.parametrize("target", [100, 101, 5003, 77_777])
def test_fit_finds_the_last_unit_that_fits_in_few_calls(target: int) -> None:
    counted = []

    def tokens_of(units: int) -> int:
        counted.append(units)
        return 40 + 13 * units + units // 7 % 5 + int(units**0.5)

    units = fit_units(tokens_of, target, 1, "text")
    assert tokens_of(units) <= target < tokens_of(units + 1)
    assert len(counted) <= 14


def test_text_for_a_server_becomes_the_same_tokens(formatters: dict[str, PromptFormatter]) -> None:
    # The server's tokenizer adds <s> itself.
    plain = formatters["plain"]
    assert plain.ids("Who?")[0] == 0
    assert plain.prompt_text(plain.ids("Who?")) == "Who?"
    chat = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert formatters["bpe"].prompt_text(formatters["bpe"].ids("Who?")) == chat
    # "t" and "h", which are one token as text.
    letters = [id for letter in "th" for id in formatters["bpe"].tokenizer.encode(letter).ids]
    with pytest.raises(ValueError, match="other tokens"):
        formatters["bpe"].prompt_text(letters)
