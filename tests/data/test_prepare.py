"""From a configuration to opened stores, through the package and through scripts/prepare_data.py."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan import train
from hbp_titan.config import JobConfig, load_config
from hbp_titan.data import build_set, build_source
from hbp_titan.data.prepare import prepare
from hbp_titan.data.store_summary import show_samples, summary
from hbp_titan.data.token_store import TokenStore, check_fits
from hbp_titan.distributed.world import World, control_group, set_timeout, worker_group
from hbp_titan.experiments import corpus
from hbp_titan.models.registry import get_flavor
from hbp_titan.testing.local_ranks import run_distributed
from tests.data.preparing import PROMPT_TOKENS, SCRIPT, byte_tokenizer, job, line, many, prepared, run_script, write
from tests.programs import run_python


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    byte_tokenizer(tmp_path / "tokenizer")
    rows = [line("q" * 10, "a" * (10 * index), source="wide" if index % 4 else "rare") for index in range(1, 13)]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "validation.jsonl", *rows[:5])
    return write(
        tmp_path / "job.toml",
        f'[model]\ntokenizer_path = "{tmp_path}/tokenizer"\n',
        f'[data]\ntrain_files = ["{tmp_path}/train.jsonl"]\ncache_folder = "{tmp_path}/cache"\n',
        "[[levels]]\nmax_tokens = 64\n[[levels]]\nmax_tokens = 256\ncp_degree = 2\n",
    )


def config(file: Path, *overrides: str) -> JobConfig:
    return load_config(["--job.config_file", str(file), *overrides])


def add_source(file: Path, keys: str) -> None:
    block = f'[[data.sources]]\npath = "{file.parent}/train.jsonl"\n{keys}\n'
    file.write_text(file.read_text().replace("[[levels]]", block + "[[levels]]", 1))


# Finding and opening stores.


def test_stores_of_training_and_validation(config_file: Path) -> None:
    assert prepare(config(config_file), progress=False)[1] is None
    files = f'["{config_file.parent}/validation.jsonl"]'
    overrides = ("--data.validation_files", files, "--validation.max_samples", "3", "--data.max_samples", "7")
    train, validation = prepare(config(config_file, *overrides), progress=False)
    assert validation is not None
    assert (len(TokenStore.open(train)), len(TokenStore.open(validation))) == (7, 3)


def test_an_existing_store_is_found_without_the_modules_that_build_it(config_file: Path) -> None:
    code = "import sys; from hbp_titan.config import load_config; from hbp_titan.data.prepare import open_stores; "
    code += "open_stores(load_config(sys.argv[1:]), 256); print(*(m for m in sys.modules if m.startswith('hbp_titan')))"
    arguments = [sys.executable, "-c", code, "--job.config_file", str(config_file)]
    prepare(config(config_file), progress=False)
    imported = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    names = {name.rpartition(".")[2] for name in imported}
    assert names.isdisjoint({"build_set", "build_source", "rows", "chat_template", "tokenizer", "truncate", "corpus"})


def test_unchanged_inputs_find_the_store_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(5)))])
    folder = prepare(config)
    monkeypatch.setattr("hbp_titan.data.build_set.build_set", None)
    monkeypatch.setattr("hbp_titan.data.prepare.sha256_file", None)
    config.data.num_proc = 2
    assert prepare(config) == folder


def test_each_input_that_shapes_the_samples_changes_the_fingerprint(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *many(8))
    block = f'[[data.sources]]\npath = "{file}"\n'
    template = tmp_path / "tokenizer" / "chat_template.jinja"

    def build(sources: str = "", levels: str = "4096:1", **data: Any) -> str:
        data = data if sources else {"train_files": [str(file)], **data}
        return prepared(job(tmp_path, sources, levels, **data)).fingerprint

    seen = [build(), build(max_samples=3), build(max_length_policy="skip", levels="30:1"), build(duplicates="skip")]
    seen += [build(train_on="last"), build(block + "repeat = 2\n"), build(block + "name = 'n'\n")]
    write(file, *many(8)[::-1])
    seen.append(build())
    template.write_text("{{ messages[0].content }}{% generation %}{{ messages[1].content }}{% endgeneration %}")
    seen.append(build())
    added = write(tmp_path / "tokenizer" / "added_tokens.json", '{"<t>": 260}')
    seen.append(build())
    assert len(set(seen)) == 10
    write(file, *many(8))
    template.unlink()
    added.unlink()
    assert build() == seen[0]
    # Samples of any length are kept: the levels do not matter.
    assert build(levels="2048:1") == seen[0]


def test_samples_are_read_only_views_and_pickling_copies_none(tmp_path: Path) -> None:
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(2000)))]))
    tokens, loss_mask = store.stores[0]._shard(0)
    for index in range(3):
        assert np.shares_memory(store.sample(index)[0], tokens)
        assert np.shares_memory(store.sample(index)[1], loss_mask)
        assert not any(array.flags.writeable for array in store.sample(index))
    base = tokens.base
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert again.lengths.tolist() == store.lengths.tolist()
    assert again.sample(1999)[0].tolist() == store.sample(1999)[0].tolist()


def test_a_missing_foreign_or_damaged_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: not a token store"):
        TokenStore.open(tmp_path / "nothing")
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(5)))]))
    os.truncate(store.stores[0].folder / "shard-00000" / "tokens.bin", 8)
    with pytest.raises(ValueError, match=r"tokens.bin: damaged"):
        TokenStore.open(store.folder).sample(0)
    meta = json.loads((store.folder / "meta.json").read_text())
    (store.folder / "meta.json").write_text(json.dumps({**meta, "format_version": 0}))
    with pytest.raises(ValueError, match=r"format 0"):
        TokenStore.open(store.folder)


def test_a_sample_longer_than_the_largest_level_is_an_error(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.jsonl:12: a sample of 151 tokens .* levels.max_tokens = 128"):
        prepare(config(config_file, "--levels", "64:1,128:2"))
    file = write(tmp_path / "a.jsonl", line("", "a"), line("", "a" * 50), line("", "a" * 49))
    store = prepared(job(tmp_path, train_files=[str(file)]))
    check_fits(store, PROMPT_TOKENS + 52)
    with pytest.raises(ValueError, match=r"a.jsonl:2: .*71 tokens .* = 69 \(2 of 3 samples"):
        check_fits(store, 69)


def test_samples_have_a_limit_of_their_own_before_levels_are_chosen(config_file: Path) -> None:
    config_file.write_text(config_file.read_text().split("[[levels]]")[0])
    with pytest.raises(ValueError, match="levels: none is given"):
        prepare(config(config_file))
    auto = config(config_file, "--packing.auto_levels=true")
    with pytest.raises(ValueError, match=r"151 tokens is longer than packing.max_sample_tokens .* = 128"):
        prepare(auto, max_sample_tokens=128)
    assert int(TokenStore.open(prepare(auto, max_sample_tokens=151)[0]).lengths.max()) == 151
    auto.data.max_length_policy = "skip"
    assert int(TokenStore.open(prepare(auto, max_sample_tokens=128)[0]).lengths.max()) <= 128


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("format = 'csv'", r"data.sources\[1\].format"),
        ("roles = {bot = 'robot'}", r"data.sources\[1\].roles: \"bot\""),
        ("columns = {dialog = 'd'}", r"data.sources\[1\].columns: \"dialog\""),
        ("columns = {messages = 'd'}", r"train.jsonl:1: unknown format: .*sources\[1\]"),
        ("split = 'test'", r"data.sources\[1\].split = test"),
    ],
)
def test_a_source_that_does_not_match_its_data_is_refused(config_file: Path, keys: str, message: str) -> None:
    add_source(config_file, keys)
    with pytest.raises(ValueError, match=message):
        prepare(config(config_file, "--data.train_files", "[]"), progress=False)


def test_the_embedded_corpus_is_built_once(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, folder = config_file.parent / "lib", config_file.parent / "stdlib"
    library.mkdir()
    comment = "# " + " ".join(f"w{number}" for number in range(300))  # at least one token per word
    for index in range(3):
        function = f'def f{index}(a):\n    """Do it."""\n    b = a\n    return b\n'
        (library / f"m{index}.py").write_text(function + comment)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    overrides = ["--data.embedded", "stdlib", "--data.embedded_folder", str(folder)]
    overrides += ["--data.train_files", f"{folder}/train.jsonl", "--model.tokenizer_path", f"{folder}/tokenizer"]
    overrides += ["--data.max_length_policy", "skip", "--levels", "256:1"]
    store = TokenStore.open(prepare(config(config_file, *overrides))[0])
    assert store.lengths.max() <= 256
    # Four kinds of questions about each of three modules contain its whole source.
    assert store.totals()["excluded: over max_tokens"] == 12
    monkeypatch.setattr(corpus, "build_stdlib_corpus", None)
    monkeypatch.setattr("hbp_titan.data.build_set.build_set", None)
    assert prepare(config(config_file, *overrides))[0] == store.folder


# The command and what it prints.


def test_the_summary_counts_each_source_and_the_rows(config_file: Path) -> None:
    store = TokenStore.open(prepare(config(config_file), progress=False)[0])
    lines = summary(store).splitlines()
    # Prompts of 29 tokens, answers of 10, 20, ... 120 (each fourth is rare), two more tokens, one of them trained.
    assert lines[1].split()[:8] == ["wide", "9", "819", "549", "91", "133", "140", "141"]
    assert lines[2].split()[:4] == ["rare", "3", "333", "243"]
    assert lines[3].split()[:4] == ["all", "12", "1,152", "792"]
    assert lines[4] == "trained turns by end token: <|im_end|> (3) 12"
    assert [text.partition(": ")[2] for text in lines[5:]] == [
        "12 rows = 12 whole",
        "12 samples_made = 12 trained",
        "12 samples = 12 trained",
    ]
    # As a source whose samples are all held out.
    store.source_names.append("none")
    assert summary(store).splitlines()[3].split() == ["none", "0", "0", "0"]
    text = show_samples(store, 1, config_file.parent / "tokenizer")
    prompt = "<|im_start|>user\nqqqqqqqqqq<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(f"wide, 41 tokens, 11 trained)\n{prompt}\x1b[32maaaaaaaaaa<|im_end|>\x1b[0m\n")


def test_the_summary_names_the_list_of_incomplete_rows(config_file: Path) -> None:
    add_source(config_file, "limit = 10\nrepeat = 2")
    overrides = ("--data.train_files", "[]", "--data.max_length_policy", "skip", "--levels", "128:1")
    store = TokenStore.open(prepare(config(config_file, *overrides), progress=False)[0])
    # Answers of 100 bytes and more do not fit; which two of twelve rows the limit drops is random.
    whole = len(store) // 2
    *sums, listed = summary(store).splitlines()[-4:]
    assert [text.partition(": ")[2] for text in sums] == [
        f"12 rows = {whole} whole + {10 - whole} excluded: over max_tokens + 2 not_chosen",
        f"{whole} samples_made = {whole} trained",
        f"{2 * whole} samples = {whole} trained + {whole} copies",
    ]
    assert listed.endswith(str(store.stores[0].folder / "incomplete_rows.jsonl"))


def test_the_command_prepares_and_a_second_call_finds_everything(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--job.config_file", str(config_file), "--world_size", "2")
    first, second = run_script(capsys, *arguments), run_script(capsys, *arguments, "--show", "2")
    assert (first[0], first[2], second[0], second[2]) == (0, "", 0, "")
    assert "12 rows = 12 whole" in first[1]
    assert second[1].startswith(first[1])
    assert second[1].count("--- sample") == 2
    write(config_file.parent / "train.jsonl", line("q", "a"), line("q", None))
    assert run_script(capsys, *arguments)[0] == 0
    code, _, errors = run_script(capsys, *arguments, "--strict")
    assert code == 1
    assert "train.jsonl:2: excluded: no assistant turn" in errors
    code, output, _ = run_script(capsys, "--help")
    assert code == 0
    for text in ("--show", "--data.max_samples", "[[data.sources]] blocks"):
        assert text in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.train_files", "gone.jsonl"], "error: data.train_files: no such file or folder: gone.jsonl"),
        (["--data.validation_files", "gone.jsonl"], "error: data.validation_files: no such file or folder"),
        (["--world_size=3"], "error: cp_degree=2"),
        (["--data.max_sample", "3"], "error: command line: unknown key data.max_sample"),
    ],
)
def test_a_user_error_is_one_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    code, output, errors = run_script(capsys, "--job.config_file", str(config_file), *overrides)
    assert (code, output) == (1, "")
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def _stored(cache: Path) -> dict[str, bytes]:
    files = [path for path in cache.rglob("*") if path.is_file() and path.parent.name != "digests"]
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_ranks_under_torchrun_leave_the_same_bytes_and_report_errors_once(config_file: Path) -> None:
    folder = config_file.parent
    write(folder / "train.jsonl", *(line("q" * 500, "a" * (k % 90 + 1)) for k in range(1, 3000)))
    arguments = [str(SCRIPT), "--job.config_file", str(config_file), "--levels", "1024:1", "--data.num_proc", "1"]
    printed = {}
    for ranks in (1, 2):
        result = run_python(*arguments, "--data.cache_folder", folder / f"cache{ranks}", ranks=ranks)
        assert result.returncode == 0, result.stderr
        printed[ranks] = result.stdout.replace(f"cache{ranks}", "cache")
    assert printed[1] == printed[2]
    assert printed[1].count("2,999 rows = 2,999 whole") == 1
    one, two = _stored(folder / "cache1"), _stored(folder / "cache2")
    assert one == two
    assert sum(name.endswith("tokens.bin") for name in one) > 1
    write(folder / "train.jsonl", line("q", "a"), "not json\n")
    result = run_python(SCRIPT, "--job.config_file", config_file, ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("train.jsonl:2: not JSON") == 1


def test_jobs_that_build_the_same_store_at_once_do_not_disturb_each_other(config_file: Path) -> None:
    folder = config_file.parent
    rows = "".join(line("q" * 500, "a" * (k % 89 + 1)) for k in range(1, 100))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    arguments = [str(SCRIPT), "--job.config_file", str(config_file), "--levels", "1024:1", "--data.num_proc", "1"]
    arguments += ["--data.train_files", f"{folder}/a.jsonl.gz"]
    with ThreadPoolExecutor(3) as pool:
        results = [*pool.map(lambda _: run_python(*arguments), range(3))]
    assert [result.stderr for result in results if result.returncode] == []
    assert len({result.stdout for result in results}) == 1
    assert "99 rows = 99 whole" in results[0].stdout
    left = {path.name.partition("-")[0] for path in (folder / "cache").iterdir()}
    assert left == {"digests", "set", "source"}


def test_a_job_whose_copies_another_one_has_removed_finds_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress("".join(many(20)).encode()))
    config = job(tmp_path, train_files=[str(file)])

    def index_rows(*arguments: Any) -> Any:
        monkeypatch.undo()
        index = real(*arguments)
        prepared(config)  # the other job
        return index

    real = build_set.index_rows
    monkeypatch.setattr(build_set, "index_rows", index_rows)
    assert len(prepared(config)) == 20


def _open_data_slowly(world: World, config: JobConfig, release: Path) -> str:
    """Prepare as a run does, on rank 1 only after `release` exists; return what the rank printed."""
    seconds = 3
    set_timeout(control_group(), seconds)
    printed = io.StringIO()

    def release_late() -> None:
        # After the groups' timeout, so that a wait in a collective would have failed.
        time.sleep(seconds + 1)
        while "waiting" not in printed.getvalue():
            time.sleep(0.01)
        release.touch()

    def write_late(*arguments: Any) -> Any:
        while not release.exists():
            time.sleep(0.01)
        return write_shard(*arguments)

    write_shard = build_source._write_shard
    build_source.SHARD_BYTES = 100  # each rank has some of the shards
    if world.rank == 1:
        build_source._write_shard = write_late
    else:
        threading.Thread(target=release_late, daemon=True).start()
    train.distributed.worker_group = partial(worker_group, log_seconds=0.1)
    trainer = train.Trainer.__new__(train.Trainer)
    trainer.config, trainer.world, trainer.args, trainer.notes = config, world, get_flavor("debug"), []
    with contextlib.redirect_stderr(printed):
        trainer._open_data()
    assert len(trainer.store) == 7
    return printed.getvalue()


def test_ranks_wait_longer_than_a_collective_for_one_that_tokenizes(tmp_path: Path) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(7)))])
    lines, none = run_distributed(_open_data_slowly, 2, config, tmp_path / "release")
    assert f"waiting for rank 1: tokenizing {tmp_path}/a.jsonl (" in lines
    assert "waiting for rank 1" not in none


# Broken and hostile input: one line each with file and line, never a traceback.

GOOD = line("q", "a").encode()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    byte_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "job.toml", "[model]\nflavor = 'debug'\n")
    overrides = [f"--model.tokenizer_path={tmp_path}/tokenizer", f"--data.cache_folder={tmp_path}/cache"]
    return ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "4096:1", "--data.num_proc=1", *overrides]


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line of a command that must fail."""
    code, output, text = run_script(capsys, *arguments)
    assert (code, output) == (1, "")
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def row(**fields: object) -> bytes:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]
    return json.dumps({"messages": messages}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(GOOD * 5000)[:-40], r":\d+: .*breaks off"),
        ("a.jsonl", GOOD + b'{"messages": "\xff\xfe"}\n', ":2: not UTF-8: byte 15"),
        ("a.jsonl", GOOD + b'{"x": "' + b"y" * 34_000_000 + b'"}\n', ":2: a row of 34000010 bytes"),
        ("a.jsonl", GOOD + b'{"messages": [null, [null]]}\n', ":2: message 1 is null"),
        ("a.jsonl", GOOD + row(role="wizard"), ":2: message 2 has the unknown role"),
        ("a.jsonl", GOOD + row(weight=float("nan")), ":2: message 2 .*weight is NaN"),
        ("a.jsonl", GOOD + b'{"a":' * 100_000 + b"\n", ":2: nested too deeply"),
        ("a.jsonl", b"\n \r\n", ""),
        ("a.parquet", b"PAR1 and no more", ":1: not a readable Parquet file"),
        ("a.tsv", GOOD, ": unsupported file type"),
        ("a.csv", b"a;b\n1;2\n", ":1: the header is one column"),
        ("a.csv", b"messages,x\n[],1\n[]\n", ":3: the row has 1 cells"),
        ("a.json", b'{\n "messages": [],\n "x": }\n', ":3: not JSON"),
    ],
)
def test_broken_data_is_one_line_with_file_and_row(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(name + message, error(capsys, *arguments, f"--data.train_files={tmp_path / name}"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "a.jsonl:1: .*stopped"),
        ("{% import 'os' as os %}", "chat template .* is broken"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "a.jsonl:1: the chat template rejects"),
        ("{{ raise_exception('no system turn') }}", "a.jsonl:1: .*no system turn"),
    ],
)
def test_a_hostile_template_is_one_line(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], template: str, message: str
) -> None:
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert re.search(message, error(capsys, *arguments, f"--data.train_files={tmp_path}/a.jsonl"))


def test_windows_line_ends_are_accepted(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(many(7)).encode().replace(b"\n", b"\r\n"))
    code, output, _ = run_script(capsys, *arguments, f"--data.train_files={tmp_path}/a.jsonl")
    assert code == 0
    assert "7 rows = 7 whole" in output
