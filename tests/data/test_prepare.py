"""From a configuration to token stores, through the package and through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data import corpus
from hbp_titan.data import prepare as prepare_module
from hbp_titan.data.prepare import prepare
from hbp_titan.data.report import show, summary
from hbp_titan.data.token_store import TokenStore
from hbp_titan.data.tokenizer import train_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


def row(question: str, answer: str, **more: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, **more}) + "\n"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    train_tokenizer(["text"], tmp_path / "tokenizer", vocab_size=260)
    rows = [row("q" * 10, "a" * (10 * index), source="wide" if index % 4 else "rare") for index in range(1, 13)]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "validation.jsonl").write_text("".join(rows[:5]))
    file = tmp_path / "job.toml"
    file.write_text(f"""
[model]
tokenizer_path = "{tmp_path}/tokenizer"
[data]
train_files = ["{tmp_path}/train.jsonl"]
cache_folder = "{tmp_path}/cache"
[[levels]]
max_tokens = 64
[[levels]]
max_tokens = 256
cp_degree = 2
""")
    return file


def config(file: Path, *overrides: str) -> JobConfig:
    return load_config(["--job.config_file", str(file), *overrides])


def test_stores_of_training_and_validation(config_file: Path) -> None:
    assert prepare(config(config_file), progress=False)[1] is None
    files = f'["{config_file.parent}/validation.jsonl"]'
    overrides = ("--data.validation_files", files, "--validation.max_samples", "3", "--data.max_samples", "7")
    train, validation = prepare(config(config_file, *overrides), progress=False)
    assert validation is not None
    assert (len(TokenStore.open(train)), len(TokenStore.open(validation))) == (7, 3)


def test_a_sample_longer_than_the_largest_level_stops_before_training(config_file: Path) -> None:
    with pytest.raises(ValueError, match=r"train.jsonl:12: a sample of 151 tokens .* levels.max_tokens = 128"):
        prepare(config(config_file, "--levels", "64:1,128:2"))


def test_samples_have_a_limit_of_their_own_where_levels_are_still_to_be_chosen(config_file: Path) -> None:
    config_file.write_text(config_file.read_text().split("[[levels]]")[0])
    with pytest.raises(ValueError, match="no level is given: add at least one"):
        prepare(config(config_file))
    auto = config(config_file, "--packing.levels=auto")
    with pytest.raises(ValueError, match=r"151 tokens is longer than packing.auto_max_tokens .* = 128"):
        prepare(auto, most_tokens=128)
    assert int(TokenStore.open(prepare(auto, most_tokens=151)[0]).lengths.max()) == 151
    auto.data.overlong = "skip"
    assert int(TokenStore.open(prepare(auto, most_tokens=128)[0]).lengths.max()) <= 128


def test_a_missing_validation_file_is_named_with_its_key(config_file: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation_files: no such file: gone.jsonl"):
        prepare(config(config_file, "--data.validation_files", "gone.jsonl"))


def test_the_embedded_corpus_is_built_and_its_long_samples_are_listed(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, folder = config_file.parent / "lib", config_file.parent / "stdlib"
    library.mkdir()
    comment = "# " + " ".join(f"w{number}" for number in range(300))  # at least one token a word
    for index in range(3):
        function = f'def f{index}(a):\n    """Do it."""\n    b = a\n    return b\n'
        (library / f"m{index}.py").write_text(function + comment)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    overrides = ["--data.embedded", "stdlib", "--data.embedded_folder", str(folder)]
    overrides += ["--data.train_files", f"{folder}/train.jsonl", "--model.tokenizer_path", f"{folder}/tokenizer"]
    overrides += ["--data.overlong", "skip", "--levels", "256:1"]
    store = TokenStore.open(prepare(config(config_file, *overrides))[0])
    assert store.lengths.max() <= 256
    assert store.meta["excluded"] == {"over max_tokens": 12}  # four kinds of three modules hold the whole source
    monkeypatch.setattr(corpus, "build_stdlib_corpus", None)
    monkeypatch.setattr(prepare_module, "build_token_store", lambda *args, **kwargs: store.folder)
    assert prepare(config(config_file, *overrides))[0] == store.folder


def test_the_summary_counts_each_source(config_file: Path) -> None:
    store = TokenStore.open(prepare(config(config_file), progress=False)[0])
    lines = summary(store).splitlines()
    # Prompts of 29 tokens, answers of 10, 20, ... 120 (each fourth is rare), two tokens after, one of them trained.
    assert lines[1].split()[:8] == ["wide", "9", "819", "549", "91", "133", "140", "141"]
    assert lines[2].split()[:4] == ["rare", "3", "333", "243"]
    assert lines[3].split()[:4] == ["all", "12", "1,152", "792"]
    assert lines[4] == "rows: 12 = 12 samples + 0 excluded + 0 sampled out"


def test_shown_samples_have_their_trained_tokens_in_green(config_file: Path) -> None:
    store = TokenStore.open(prepare(config(config_file), progress=False)[0])
    text = show(store, 1, config_file.parent / "tokenizer")
    prompt = "<|im_start|>user\nqqqqqqqqqq<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(f"wide, 41 tokens, 11 trained)\n{prompt}\x1b[32maaaaaaaaaa<|im_end|>\x1b[0m\n")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prepares_and_a_second_call_finds_everything(config_file: Path) -> None:
    arguments = ("--job.config_file", str(config_file), "--world_size", "2")
    first, second = run(*arguments), run(*arguments, "--show", "2")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "rows: 12 = 12 samples" in first.stdout
    assert second.stdout.startswith(first.stdout)
    assert second.stdout.count("--- sample") == 2
    assert first.stderr == second.stderr == ""


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["--data.train_files", "gone.jsonl"], "error: data.train_files: no such file: gone.jsonl\n"),
        (["--world_size=3"], "error: cp_degree=2 of the level with max_tokens=256 does not divide the world size 3"),
        (["--world_size", "x"], "error: --world_size needs a number, not 'x'\n"),
        (
            ["--data.max_sample", "3"],
            "error: command line: unknown key data.max_sample; did you mean data.max_samples?\n",
        ),
    ],
)
def test_a_mistake_is_one_line(config_file: Path, overrides: list[str], complaint: str) -> None:
    result = run("--job.config_file", str(config_file), *overrides)
    assert result.returncode == 1
    assert result.stderr.startswith(complaint)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_help_explains_the_options() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "--show K" in result.stdout
    assert "--data.max_samples" in result.stdout
