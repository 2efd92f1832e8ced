"""From a configuration to token stores, through the package and through the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data import build_set as build_set_module
from hbp_titan.data.prepare import prepare
from hbp_titan.data.store_summary import show_samples, summary
from hbp_titan.data.token_store import TokenStore
from hbp_titan.data.tokenizer import train_tokenizer
from hbp_titan.experiments import corpus
from tests.data.preparing import SCRIPT, run_script
from tests.programs import run_python


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
    with pytest.raises(ValueError, match="levels: none is given"):
        prepare(config(config_file))
    auto = config(config_file, "--packing.auto_levels=true")
    with pytest.raises(ValueError, match=r"151 tokens is longer than packing.max_sample_tokens .* = 128"):
        prepare(auto, max_sample_tokens=128)
    assert int(TokenStore.open(prepare(auto, max_sample_tokens=151)[0]).lengths.max()) == 151
    auto.data.max_length_policy = "skip"
    assert int(TokenStore.open(prepare(auto, max_sample_tokens=128)[0]).lengths.max()) <= 128


def test_a_missing_validation_file_is_named_with_its_key(config_file: Path) -> None:
    with pytest.raises(ValueError, match=r"data.validation_files: no such file or folder: gone.jsonl"):
        prepare(config(config_file, "--data.validation_files", "gone.jsonl"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("format = 'csv'", r"data.sources\[1\].format = \"csv\""),
        ("roles = {bot = 'robot'}", r"data.sources\[1\].roles: \"bot\""),
        ("columns = {dialog = 'd'}", r"data.sources\[1\].columns: \"dialog\""),
        ("columns = {messages = 'd'}", r"train.jsonl:1: unknown format: .*sources\[1\]"),
        ("split = 'test'", r"data.sources\[1\].split = test"),
    ],
)
def test_a_source_that_does_not_fit_its_data_is_named(config_file: Path, key: str, message: str) -> None:
    block = f'[[data.sources]]\npath = "{config_file.parent}/train.jsonl"\n{key}\n'
    config_file.write_text(config_file.read_text().replace("[[levels]]", block + "[[levels]]", 1))
    with pytest.raises(ValueError, match=message):
        prepare(config(config_file, "--data.train_files", "[]"), progress=False)


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
    overrides += ["--data.max_length_policy", "skip", "--levels", "256:1"]
    store = TokenStore.open(prepare(config(config_file, *overrides))[0])
    assert store.lengths.max() <= 256
    # Four kinds of three modules hold the whole source.
    assert store.totals()["excluded: over max_tokens"] == 12
    monkeypatch.setattr(corpus, "build_stdlib_corpus", None)
    monkeypatch.setattr(build_set_module, "build_source_store", None)
    assert prepare(config(config_file, *overrides))[0] == store.folder


def test_the_summary_counts_each_source(config_file: Path) -> None:
    store = TokenStore.open(prepare(config(config_file), progress=False)[0])
    lines = summary(store).splitlines()
    # Prompts of 29 tokens, answers of 10, 20, ... 120 (each fourth is rare), two tokens after, one of them trained.
    assert lines[1].split()[:8] == ["wide", "9", "819", "549", "91", "133", "140", "141"]
    assert lines[2].split()[:4] == ["rare", "3", "333", "243"]
    assert lines[3].split()[:4] == ["all", "12", "1,152", "792"]
    assert lines[4:] == [
        "accounting: 12 rows = 12 whole",
        "accounting: 12 samples_made = 12 trained",
        "accounting: 12 samples = 12 trained",
    ]


def test_the_summary_adds_up_and_says_where_rows_are_listed(config_file: Path) -> None:
    source = f"""
[[data.sources]]
path = "{config_file.parent}/train.jsonl"
limit = 10
repeat = 2
"""
    config_file.write_text(config_file.read_text().replace("[[levels]]", source + "[[levels]]", 1))
    overrides = ("--data.train_files", "[]", "--data.max_length_policy", "skip", "--levels", "128:1")
    store = TokenStore.open(prepare(config(config_file, *overrides), progress=False)[0])
    # Of twelve rows, the answers of 100 bytes and more do not fit; which two the limit leaves out is random.
    whole = len(store) // 2
    left_out = 10 - whole
    assert summary(store).splitlines()[-4:] == [
        f"accounting: 12 rows = {whole} whole + {left_out} excluded: over max_tokens + 2 not_chosen",
        f"accounting: {whole} samples_made = {whole} trained",
        f"accounting: {2 * whole} samples = {whole} trained + {whole} copies",
        f"  listed in {store.stores[0].folder / 'incomplete_rows.jsonl'}",
    ]


def test_shown_samples_have_their_trained_tokens_in_green(config_file: Path) -> None:
    store = TokenStore.open(prepare(config(config_file), progress=False)[0])
    text = show_samples(store, 1, config_file.parent / "tokenizer")
    prompt = "<|im_start|>user\nqqqqqqqqqq<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(f"wide, 41 tokens, 11 trained)\n{prompt}\x1b[32maaaaaaaaaa<|im_end|>\x1b[0m\n")


def test_the_command_prepares_and_a_second_call_finds_everything(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--job.config_file", str(config_file), "--world_size", "2")
    first, second = run_script(capsys, *arguments), run_script(capsys, *arguments, "--show", "2")
    assert (first[0], first[2], second[0], second[2]) == (0, "", 0, "")
    assert "12 rows = 12 whole" in first[1]
    assert second[1].startswith(first[1])
    assert second[1].count("--- sample") == 2


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["--data.train_files", "gone.jsonl"], "error: data.train_files: no such file or folder: gone.jsonl\n"),
        (["--world_size=3"], "error: cp_degree=2 of the level with max_tokens=256 does not divide the world size 3"),
        (
            ["--data.max_sample", "3"],
            "error: command line: unknown key data.max_sample; did you mean data.max_samples?\n",
        ),
    ],
)
def test_a_mistake_is_one_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], complaint: str
) -> None:
    code, output, errors = run_script(capsys, "--job.config_file", str(config_file), *overrides)
    assert (code, output) == (1, "")
    assert errors.startswith(complaint)
    assert errors.count("\n") == 1


def stored(cache: Path) -> dict[str, bytes]:
    files = [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def test_ranks_under_torchrun_leave_the_same_bytes_and_one_summary(config_file: Path) -> None:
    folder = config_file.parent
    (folder / "train.jsonl").write_text("".join(row("q" * 500, "a" * (k % 90)) for k in range(1, 4000)))
    arguments = [str(SCRIPT), "--job.config_file", str(config_file), "--levels", "1024:1", "--data.num_proc", "1"]
    launched = {}
    for ranks in (1, 2):
        result = run_python(*arguments, "--data.cache_folder", folder / f"cache{ranks}", ranks=ranks)
        assert result.returncode == 0, result.stderr
        launched[ranks] = result.stdout.replace(f"cache{ranks}", "cache")
    assert launched[1] == launched[2]
    assert launched[1].count("3,999 rows = 3,999 whole") == 1
    one, two = stored(folder / "cache1"), stored(folder / "cache2")
    assert one == two
    assert sum(name.endswith("tokens.bin") for name in one) > 2


def test_a_mistake_that_ranks_meet_is_said_once(config_file: Path) -> None:
    (config_file.parent / "train.jsonl").write_text(row("q", "a") + "not json\n")
    result = run_python(SCRIPT, "--job.config_file", config_file, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("train.jsonl:2: not JSON") == 1


def test_strict_is_an_option_of_the_command(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file.parent / "train.jsonl"
    file.write_text(row("q", "a") + '{"messages": [{"role": "user", "content": "q"}]}\n')
    assert run_script(capsys, "--job.config_file", str(config_file))[0] == 0
    code, _, errors = run_script(capsys, "--job.config_file", str(config_file), "--strict")
    assert code == 1
    assert errors.startswith(f"error: {file}:2: excluded: no assistant turn\nerror: data.strict: 1 rows")


def test_help_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run_script(capsys, "--help")
    assert code == 0
    assert "--show" in output
    assert "--data.max_samples" in output
    assert "[[data.sources]] blocks" in output
