"""The `messages` JSONL reader: which lines are rows, and one clear error for everything else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp_titan.data.sources import Row, check_files, index_rows, parse_row, read_rows

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}'
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    named = GOOD.replace("{", '{"source": "mine", ', 1)
    file.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n  \t\n{named}\n\n{GOOD}".encode())
    index = index_rows(file)
    assert index.lines.tolist() == [1, 4, 6]
    assert list(read_rows(index)) == [
        Row(MESSAGES, "chat", file, 1),
        Row(MESSAGES, "mine", file, 4),
        Row(MESSAGES, "chat", file, 6),
    ]
    assert [row.line for row in read_rows(index.take(slice(1, 2)))] == [4]


def test_other_keys_of_a_message_reach_the_template() -> None:
    row = parse_row(b'{"messages": [{"role": "tool", "content": "5", "name": "add"}], "id": 7}', Path("f.jsonl"), 1)
    assert row.messages == [{"role": "tool", "content": "5", "name": "add"}]


NO_LIST = "no `messages` list: expected an object with `messages`, a list of {role, content}"
KNOWN = "expected one of system, user, assistant, tool"
SURROGATE = '{"messages": [{"role": "user", "content": "\\ud800"}]}'


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": [}', "not JSON: Expecting value at character 15 of the line"),
        ("[1, 2]", NO_LIST),
        ('{"text": "x"}', NO_LIST),
        ('{"messages": {"role": "user"}}', NO_LIST),
        ('{"messages": ["Hi"]}', 'message 1 is "Hi", not an object with role and content'),
        (GOOD.replace("assistant", "bot"), f'message 2 has the unknown role "bot": {KNOWN}'),
        ('{"messages": [{"content": "x"}]}', f"message 1 has the unknown role null: {KNOWN}"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 (user): content is null, not a string"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', 'message 1 (user): content is ["a"], not a string'),
        (SURROGATE, "message 1 (user) holds half a surrogate pair, \\ud800"),
        ('{"source": 3, "messages": []}', "source is 3, not a string"),
        ('{"messages": [{"role": "user", "content": "x", "y": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_wrong(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'data/chat.jsonl:7: {complaint}')}$"):
        parse_row(line.encode(), Path("data/chat.jsonl"), 7)


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(ValueError, match=r"^f:2: not UTF-8: byte 3 of the line is 0xff$"):
        parse_row(b'{"\xff', Path("f"), 2)


def test_a_huge_number_is_no_traceback() -> None:
    with pytest.raises(ValueError, match=r"^f:2: not JSON: Exceeds the limit"):
        parse_row(b'{"messages": ' + b"1" * 5000 + b"}", Path("f"), 2)


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"empty.jsonl:1: the file has no rows"):
        index_rows(file)


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.train_files: no such file: nothing/here.jsonl$"):
        check_files(["nothing/here.jsonl"], "data.train_files")
    with pytest.raises(ValueError, match=r"^data.validation_files is empty"):
        check_files([], "data.validation_files")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "x"]) | json_values,
        "content": st.text(max_size=5) | json_values,
    }
)
rows = st.fixed_dictionaries(
    {"messages": st.lists(messages | json_values, max_size=3) | json_values}, optional={"source": json_values}
)


@given(st.binary(max_size=40) | (rows | json_values).map(lambda value: json.dumps(value).encode()))
@settings(max_examples=1000, deadline=None)
def test_any_line_is_a_row_of_text_or_one_named_error(line: bytes) -> None:
    complaint = ""
    try:
        row = parse_row(line, Path("f"), 3)
    except ValueError as error:
        complaint = f"{type(error).__name__} {error}"
    if complaint:
        assert complaint.startswith("ValueError f:3: ")
        assert "\n" not in complaint
        return
    assert all(message["role"] in ("system", "user", "assistant", "tool") for message in row.messages)
    assert all(isinstance(message["content"], str) for message in row.messages)
    json.dumps([row.messages, row.source], ensure_ascii=False).encode("utf-8")
