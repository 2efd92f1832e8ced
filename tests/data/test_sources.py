"""Rows of messages JSONL: what is read, and the one line for each defect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp_titan.data.sources import check_files, index_rows, parse_row, read_rows

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def test_rows_keep_their_order_line_numbers_and_source(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    named = json.dumps({**json.loads(GOOD), "source": "mine", "other": 1})
    file.write_bytes(f"\ufeff{GOOD}\r\n\n   \n{named}".encode())
    rows = list(read_rows(index_rows(file)))
    assert [(row.line, row.source) for row in rows] == [(1, "chats"), (4, "mine")]
    assert rows[0].messages == json.loads(GOOD)["messages"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "no `messages` list"),
        (b'{"messages": "hello"}', "no `messages` list"),
        (b'{"messages": ["hello"]}', 'message 1 is "hello", not an object'),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', 'unknown role "robot"'),
        (b'{"messages": [{"role": "user"}]}', "content is null, not a string"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "content is 5, not a string"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
        (b'{"messages": [], "source": 3}', "source is 3, not a string"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "not UTF-8"),
        (b'{"messages": ' + b"[" * 100_000, "file.jsonl:7: "),
    ],
)
def test_defect_names_file_and_line(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"^file\.jsonl:7: ") as caught:
        parse_row(line, Path("file.jsonl"), 7)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


lines = st.binary(max_size=60) | st.text(max_size=40).map(lambda text: GOOD.replace("a", text).encode(errors="replace"))


@settings(max_examples=300, deadline=None)
@given(lines)
def test_any_bytes_are_a_row_or_one_clear_error(raw: bytes) -> None:
    try:
        row = parse_row(raw, Path("f"), 1)
    except ValueError as error:
        message = str(error)
    else:
        message = "f:1: " if all(isinstance(turn["content"], str) for turn in row.messages) else "no string"
    assert message.startswith("f:1: ")


def test_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: the file has no rows"):
        index_rows(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"data\.train_files: no such file: gone\.jsonl"):
        check_files(["gone.jsonl"], "data.train_files")
    with pytest.raises(ValueError, match=r"data\.train_files is empty"):
        check_files([], "data.train_files")
