"""10,000 rows that nobody meant to be rows: a conversation of clean text, or one ValueError of one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from hbp_titan.data.formats import FORMATS, ROLES, Conversation, detect_format, parse_record
from hbp_titan.data.rows import index_rows, read_records
from tests.properties import examples

ROWS_PER_FILE = 20

GOOD = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "tools": '[{"name": "f"}]'},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "completion": "Yo", "source": "x"},
]
WORDS = [word for row in GOOD for word in json.dumps(row).split('"') if word.isidentifier()]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=4)
    | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated_rows(draw: st.DrawFn) -> bytes:
    """A good row with some of its bytes, or one of its values, replaced."""
    row = draw(st.sampled_from(GOOD))
    if draw(st.booleans()):
        holder, key = draw(st.sampled_from(list(_places(row := json.loads(json.dumps(row))))))
        holder[key] = draw(json_values)
        return json.dumps(row).encode()
    raw = json.dumps(row).encode()
    start = draw(st.integers(0, len(raw)))
    put = draw(st.binary(max_size=4) | st.text('abc\\"{}[],: 01', max_size=3).map(str.encode))
    return raw[:start] + put + raw[start + draw(st.integers(0, 2)) :]


def _places(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


rows = (
    st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()) | mutated_rows() | mutated_rows()
)


def read_and_parse(file: Path, folder: Path) -> tuple[int, int]:
    """Conversations and errors of a file."""
    index = index_rows(file, folder)
    conversations, errors = 0, 0
    for _, record in read_records(index, 1 << 20):
        for format in FORMATS if isinstance(record, dict) else ():
            try:
                check(parse_record(record, format, {}, {}))
                conversations += 1
            except ValueError as error:
                check_error(error)
        try:
            if isinstance(record, ValueError):
                raise record
            detect_format(record, {})
        except ValueError as error:
            check_error(error)
            errors += 1
    return conversations, errors


def check_error(error: ValueError) -> None:
    message = str(error)
    assert message
    assert message.isprintable()
    assert len(message) < 600


def check(conversation: Conversation) -> None:
    # Text that a tokenizer and a template can have.
    json.dumps([conversation.messages, conversation.tools, conversation.source], ensure_ascii=False).encode("utf-8")
    for message in conversation.messages:
        assert message["role"] in ROLES
        assert isinstance(message.get("content", ""), str)
        assert "content" in message or message["tool_calls"]
        assert "weight" not in message
        assert message.get("train", False) is False
        assert "train" not in message or message["role"] == "assistant"


counts = [0, 0, 0]


@given(st.lists(rows, min_size=ROWS_PER_FILE, max_size=ROWS_PER_FILE))
@examples(500, *HealthCheck)
def run_500_files(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "a.jsonl"
        # The last row, so that the file has one.
        file.write_bytes(b"\n".join([*lines, b"x"]))
        conversations, errors = read_and_parse(file, Path(name))
    counts[0] += len(lines)
    counts[1] += conversations
    counts[2] += errors


@pytest.mark.hypothesis  # which it cannot be seen to be: it looks at the sums of all examples
def test_10000_rows_give_conversations_or_errors_of_one_line() -> None:
    counts[:] = 0, 0, 0
    run_500_files()
    assert counts[0] >= 10_000
    # Both happen often: the fuzz reaches behind the JSON parser.
    assert counts[1] > 200
    assert counts[2] > 200
