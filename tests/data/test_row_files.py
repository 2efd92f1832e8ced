"""Data files: which rows one has, any of them at any time, and one clear error for each fault."""

from __future__ import annotations

import json
import pickle
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data.rows import RowIndex, index_rows, read_records

MAX_ROW_BYTES = 1 << 20


def read(index: RowIndex, max_row_bytes: int = MAX_ROW_BYTES) -> list[tuple[int, Any]]:
    """The rows of an index, errors as their text."""
    records = read_records(index, max_row_bytes)
    return [(line, str(record) if isinstance(record, ValueError) else record) for line, record in records]


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \t\n \r\n{"a": 2}\n\n  {"a": 3}')
    index = index_rows(file, tmp_path)
    assert read(index) == [(1, {"a": 1}), (5, {"a": 2}), (7, {"a": 3})]
    assert index.sizes.tolist() == [10, 9, 10]
    assert read(index.select(slice(1, 2))) == [(5, {"a": 2})]
    assert read(index.select(np.array([2, 0]))) == [(7, {"a": 3}), (1, {"a": 1})]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 1000])
def test_rows_do_not_depend_on_the_blocks_of_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    content = b'\n{"a": 1}\n \n\r\n{"b": "' + "äé".encode() + b'"}\r\n \x0b\n{}\n'
    # What Python's own reader of lines finds.
    expected = [
        (number, json.loads(line))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line and not line.isspace()
    ]
    monkeypatch.setattr("hbp_titan.data.jsonl.BLOCK_BYTES", block_bytes)
    assert read(index_rows(write(tmp_path / "a.jsonl", content), tmp_path)) == expected


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n  "])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "empty.jsonl", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:1: the file has no rows$"):
        index_rows(file, tmp_path)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b'{"messages": [}', "not JSON: Expecting value at character 15"),
        (b"[1, 2]", "the row is [1, 2], not a JSON object"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 1 is 0xff"),
        (b'{"a": "\xc3("}', "not UTF-8: byte 8 is 0xc3"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', 'an object has the key "c" twice'),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "x\ty"}', "not JSON: Invalid control character at character 9"),
        (b'{"a": ' + b" " * 2000 + b"}", "a row of 2008 bytes is larger than data.max_row_bytes = 1000: raise it"),
    ],
)
def test_a_malformed_row_is_an_error_in_its_place_and_the_others_are_read(
    tmp_path: Path, row: bytes, complaint: str
) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + row + b'\n{"a": 3}')
    limit = 1000 if b"  " in row else MAX_ROW_BYTES
    assert read(index_rows(file, tmp_path), limit) == [(1, {"a": 1}), (2, complaint), (3, {"a": 3})]


def test_a_huge_number_is_no_traceback(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": ' + b"1" * 5000 + b"}")
    [(line, complaint)] = read(index_rows(file, tmp_path))
    assert line == 1
    assert complaint.startswith("not JSON: Exceeds the limit")


@pytest.mark.parametrize("end", [b'"}\n', b"", b'"}\n{"a": 2}\n'])
def test_a_line_of_50_mb_is_neither_read_nor_held_in_memory(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "long.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"a": "')
        for _ in range(50):
            stream.write(b"x" * 1_000_000)
        stream.write(end)
    tracemalloc.start()
    rows = read(index_rows(file, tmp_path), 33554432)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = 50_000_007 + len(end[:3])
    assert rows[0] == (1, f"a row of {size} bytes is larger than data.max_row_bytes = 33554432: raise it")
    assert rows[1:] == ([(2, {"a": 2})] if b"2" in end else [])
    assert peak < 10_000_000


def test_a_slice_of_an_index_pickles_to_the_size_of_the_slice(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 100_000)
    part = index_rows(file, tmp_path).select(slice(50_000, 50_010))
    pickled = pickle.dumps(part)
    assert len(pickled) < 2000
    assert read(pickle.loads(pickled)) == [(line, {"a": 1}) for line in range(50_001, 50_011)]


def test_an_unknown_kind_of_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.csv: no known kind of data file: expected one of .jsonl, .jsonl.gz"):
        index_rows(write(tmp_path / "a.csv", b"a,b"), tmp_path)


def test_a_json_array_is_read_by_its_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": "x\n]" * 40, "b": [{"c": "}{\\"}]}, {}, {"a": "ä" * 30}]
    for block in (1, 5, 1 << 20):
        monkeypatch.setattr("hbp_titan.data.jsonl._BLOCK_CHARACTERS", block)
        for indent in (None, 2):
            text = "\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=False).replace("\n", "\r\n") + "\n"
            file = write(tmp_path / f"{block}-{indent}.json", text.encode())
            assert read(index_rows(file, tmp_path / "unpacked")) == list(enumerate(values, start=1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[{"a": 1}, {"a": ]', "2: the JSON array breaks at this element: Expecting value"),
        (b'[{"a": 1}', "2: the JSON array breaks at this element: a comma or the end of the array is missing"),
        (b'[{"a": 1},', "2: the JSON array breaks at this element: the array has no end"),
        (b"[1, 2]", "1: the JSON array breaks at this element: it begins with '1': expected an object"),
        (b'[{"a": "\xff"}]', "1: the JSON array breaks at this element or soon after: byte 0xff is not UTF-8"),
        (b'[{"a": ' + b"[" * 100_000, "1: the JSON array breaks at this element: nested too deeply"),
        (b"[]", "1: the file has no rows"),
    ],
)
def test_a_broken_json_array_is_named_with_the_element(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{file}:{complaint}")):
        index_rows(file, tmp_path / "unpacked")


def test_faults_of_one_element_of_an_array_are_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", b'[{"a": 1, "a": 2}, {"a": 3}]')
    assert read(index_rows(file, tmp_path / "u")) == [(1, 'an object has the key "a" twice'), (2, {"a": 3})]
