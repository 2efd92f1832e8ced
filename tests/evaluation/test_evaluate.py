"""scripts/evaluate.py and scripts/generate.py on an exported folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hbp_titan.errors import exit_on_user_error
from scripts import evaluate as evaluate_script
from scripts import generate
from tests.data.preparing import line, write
from tests.evaluation.test_generate import exported


def evaluate(*arguments: str | Path) -> None:
    exit_on_user_error(lambda: evaluate_script.main([str(argument) for argument in arguments]))


def test_perplexity_and_needles_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path)
    data = write(tmp_path / "d.jsonl", *(line("q" * 20, "a" * size) for size in (5, 300)))
    evaluate(
        *(folder, "--out", tmp_path / "out", "--perplexity", data, "--cache_folder", tmp_path / "cache"),
        *("--needles", "--lengths", "600,900", "--needle_tasks", "niah_single,niah_multikey", "--depths", "2"),
    )
    printed = capsys.readouterr().out
    assert "document of 1 to 256" in printed
    assert "niah_single" in printed
    trained = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert trained["all"][0]["trained_tokens"] == 5 + 300 + 2  # the answers and the end of each turn
    assert trained["all"][0]["perplexity"] == pytest.approx(math.exp(trained["all"][0]["loss"]))
    assert [entry["group"] for entry in trained["length"]] == [256, 512]
    needles = json.loads((tmp_path / "out" / "needles.json").read_text())
    assert len(needles["answers"]) == 2 * 2 * 2
    assert [entry["score"] for entry in needles["scores"]] == [0.0] * 4
    assert (tmp_path / "out" / "needles.svg").read_text().startswith("<svg")


def test_perplexity_takes_the_template_of_training(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}{{ 'asks' if add_generation_prompt }}")
    data = write(tmp_path / "d.jsonl", line("q", "answer"))
    options = (folder, "--out", tmp_path / "out", "--perplexity", data, "--cache_folder", tmp_path / "cache")
    with pytest.raises(SystemExit):
        evaluate(*options)
    evaluate(*options, "--chat_template", "chatml", "--chat_template_kwargs", '{"unused": 1}')
    trained = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert trained["all"][0]["trained_tokens"] == len("answer") + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--needles", "--lengths", "4k"], "--lengths 4k"),
        (["--needles", "--needle_tasks", "cwe"], "niah_single"),
        (["--needles", "--depths", "0"], "--depths 0"),
        (["--needles", "--lengths", "100", "--needle_tasks", "common_words"], "common_words needs"),
        (["--tasks", "paper_tasks", "--runs", "humaneval,mmlu"], "humaneval runs code"),
        (["--perplexity", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--tasks", "nowhere.toml"], "nowhere.toml"),
        (["--needles", "--template_date", "today"], "data.template_date"),
        (["--needles", "--chat_template", "qwen"], "did you mean qwen3"),
    ],
)
def test_mistakes_print_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate(exported(tmp_path), "--out", tmp_path / "out", *arguments)
    assert ended.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_generate_answers_each_prompt(tmp_path: Path) -> None:
    assert len(generate.answer(exported(tmp_path), ["Hello", "And a longer one"], 5)) == 2
