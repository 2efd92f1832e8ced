"""Broken and hostile input through the command: one line each, with file and line, and never a traceback."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.data.preparing import byte_tokenizer, line, many, run_script

GOOD = line("q", "a").encode()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "job.toml").write_text("[model]\nflavor = 'debug'\n")
    overrides = [f"--model.tokenizer_path={tmp_path}/tokenizer", f"--data.cache_folder={tmp_path}/cache"]
    return ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "4096:1", "--data.num_proc=1", *overrides]


def errors(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of a command that must fail."""
    code, output, text = run_script(capsys, *arguments)
    assert (code, output) == (1, "")
    lines = text.splitlines()
    assert all(text.startswith("error: ") for text in lines), text
    return [text.removeprefix("error: ") for text in lines]


def row(**fields: object) -> bytes:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]
    return json.dumps({"messages": turns}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(GOOD * 5000)[:-40], ":{any}: the compressed file breaks off in this line"),
        ("a.jsonl", GOOD + b'{"messages": "\xff\xfe"}\n', ":2: not UTF-8: byte 15 is 0xff"),
        (
            "a.jsonl",
            GOOD + b'{"x": "' + b"y" * 50_000_000 + b'"}\n',
            ":2: a row of 50000010 bytes is larger than data.max",
        ),
        ("a.jsonl", GOOD + b'{"messages": [null, [null]]}\n', ":2: message 1 is null, not an object"),
        ("a.jsonl", GOOD + row(content=None), ":2: message 2 (assistant): content is null, not a string"),
        ("a.jsonl", GOOD + row(role="wizard"), ':2: message 2 has the unknown role "wizard"'),
        ("a.jsonl", GOOD + b'{"messages": [], "messages": []}\n', ':2: an object has the key "messages" twice'),
        ("a.jsonl", GOOD + row(weight=float("nan")), ":2: message 2 (assistant): weight is NaN, not 0 or 1"),
        ("a.jsonl", GOOD + row(train="yes"), ':2: message 2 (assistant): train is "yes", not true or false'),
        ("a.jsonl", GOOD + b'{"a":' * 100_000 + b"\n", ":2: nested too deeply"),
        ("a.jsonl", b"", ":1: the file has no rows"),
        ("a.jsonl", b"\n \r\n", ":1: the file has no rows"),
        ("a.parquet", b"PAR1 and no more", ":1: not a readable Parquet file"),
        ("a.csv", GOOD, ": unsupported file type"),
    ],
)
def test_broken_data_is_one_line_that_names_the_row(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    (text,) = errors(capsys, *arguments, f"--data.train_files={tmp_path / name}")
    before, _, after = message.partition("{any}")
    assert f"{name}{before}" in text
    assert after in text


def test_windows_line_ends_are_no_fault(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(many(7)).encode().replace(b"\n", b"\r\n"))
    code, output, _ = run_script(capsys, *arguments, f"--data.train_files={tmp_path}/a.jsonl")
    assert code == 0
    assert "7 rows = 7 whole" in output


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "a.jsonl:1: .*stopped"),
        ("{% import 'os' as os %}", "chat template of .* is broken"),
        ("{% include '/etc/passwd' %}", "chat template of .* is broken"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "a.jsonl:1: the chat template rejects"),
        ("{{ 'x' * 10000000000 }}", "a.jsonl:1: .*stopped"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "a.jsonl:1: the chat template"),
    ],
)
def test_a_template_that_loops_imports_or_reaches_out_is_one_line(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    template: str,
    message: str,
) -> None:
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (text,) = errors(capsys, *arguments, f"--data.train_files={tmp_path}/a.jsonl")
    assert re.search(message, text), text


def test_of_many_broken_rows_ten_are_shown_and_the_others_counted(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{]\n" * 60)
    lines = errors(capsys, *arguments, f"--data.train_files={tmp_path}/a.jsonl")
    assert [text.partition(": ")[0] for text in lines[:10]] == [f"{tmp_path}/a.jsonl:{n}" for n in range(2, 12)]
    assert lines[10].startswith("50 more malformed rows are not shown; fix the rows, or set data.malformed")
    assert len(lines) == 11
