"""Rows of data files: JSON lines and arrays, compressed files, Parquet and Arrow; and the error of each broken one."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import pickle
import random
import re
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.formats import FORMATS, Conversation, detect_format, parse_record
from hbp_titan.data.messages import ROLES
from hbp_titan.data.rows import RowIndex, index_rows, read_records
from tests.properties import examples

MAX_ROW_BYTES = 1 << 20


def read(index: RowIndex, max_row_bytes: int = MAX_ROW_BYTES) -> list[tuple[int, Any]]:
    """The rows of an index, errors as their text."""
    records = read_records(index, max_row_bytes)
    return [(line, str(record) if isinstance(record, ValueError) else record) for line, record in records]


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


# JSON lines.


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \t\n \r\n{"a": 2}\n\n  {"a": 3}')
    index = index_rows(file, tmp_path)
    assert read(index) == [(1, {"a": 1}), (5, {"a": 2}), (7, {"a": 3})]
    assert index.sizes.tolist() == [10, 9, 10]
    assert read(index.select(np.array([2, 0]))) == [(7, {"a": 3}), (1, {"a": 1})]


def test_line_separators_of_unicode_end_no_row_and_a_cut_last_line_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": "b\u2028c\u0085d"}\n{"a": "e'.encode())
    (first, row), (last, error) = read(index_rows(file, tmp_path))
    assert (first, row, last) == (1, {"a": "b\u2028c\u0085d"}, 2)
    assert "not JSON" in str(error)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 1000])
def test_rows_do_not_depend_on_the_blocks_of_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    content = b'\n{"a": 1}\n \n\r\n{"b": "' + "äé".encode() + b'"}\r\n \x0b\n{}\n'
    lines = enumerate(content.split(b"\n"), start=1)
    expected = [(number, json.loads(line)) for number, line in lines if line and not line.isspace()]
    monkeypatch.setattr("hbp_titan.data.jsonl.BLOCK_BYTES", block_bytes)
    assert read(index_rows(write(tmp_path / "a.jsonl", content), tmp_path)) == expected


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n  "])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.csv.gz", "a.jsonl.zst"])
def test_a_file_without_rows_has_none(tmp_path: Path, name: str, content: bytes) -> None:
    file = write(tmp_path / name, PACKERS[f".{name.split('.')[-1]}"](content) if name.count(".") > 1 else content)
    assert read(index_rows(file, tmp_path / "unpacked")) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"messages": [}', "not JSON: Expecting value at character 15"),
        (b"[1, 2]", "[1, 2], not a JSON object"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 1 is 0xff"),
        (b'{"a": "\xc3("}', "not UTF-8: byte 8 is 0xc3"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', 'the key "c" twice'),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "x\ty"}', "not JSON: Invalid control character at character 9"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": ' + b" " * 200_000 + b"}", "a row of 200008 bytes"),
    ],
)
def test_a_malformed_row_is_an_error_in_its_place(tmp_path: Path, row: bytes, message: str) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + row + b'\n{"a": 3}')
    first, (line, error), last = read(index_rows(file, tmp_path), 150_000)
    assert (first, line, last) == ((1, {"a": 1}), 2, (3, {"a": 3}))
    assert message in error


@pytest.mark.parametrize("end", [b'"}\n', b"", b'"}\n{"a": 2}\n'])
def test_a_long_line_is_neither_read_nor_kept_in_memory(tmp_path: Path, end: bytes) -> None:
    file = write(tmp_path / "long.jsonl", b'{"a": "' + b"x" * 20_000_000 + end)
    tracemalloc.start()
    rows = read(index_rows(file, tmp_path), 10_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"a row of {20_000_007 + len(end[:3])} bytes" in rows[0][1]
    assert rows[1:] == ([(2, {"a": 2})] if b"2" in end else [])
    assert peak < 6_000_000


def test_a_part_of_an_index_pickles_to_the_size_of_the_part(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 100_000)
    pickled = pickle.dumps(index_rows(file, tmp_path).select(slice(50_000, 50_010)))
    assert len(pickled) < 2000
    assert read(pickle.loads(pickled)) == [(line, {"a": 1}) for line in range(50_001, 50_011)]


def test_an_unknown_file_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.tsv: unsupported"):
        index_rows(write(tmp_path / "a.tsv", b"a,b"), tmp_path)


# JSON arrays.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[], \né', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\{[,', max_size=3), inner, max_size=3),
    max_leaves=6,
)


@examples(150)
@given(
    st.lists(st.dictionaries(st.sampled_from("ab"), json_values), min_size=1, max_size=6),
    st.sampled_from([1, 2, 5, 40, 1 << 20]),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
)
def test_elements_of_an_array_are_those_that_json_finds(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    block: int,
    indent: int | None,
    ascii_only: bool,
    wrapped: bool,
) -> None:
    value = {"version": "[{", "none": [], "rows": rows, "size": {"k": [1]}} if wrapped else rows
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).replace("\n", "\r\n")
    file = write(tmp_path_factory.mktemp("array") / "a.json", ("\ufeff \n" + text + "\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbp_titan.data.json_files.BLOCK_BYTES", block)
        assert read(index_rows(file, file.parent)) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}', "2: .*no end"),
        (b'[{"a": 1},', "2: .*no end"),
        (b'[{"a": 1}, {"a": "]}', "2: .*no end"),
        (b'[{"a": 1},]', "2: .*expected an object"),
        (b'[{"a": 1} {"a": 2}]', "2: .*expected a comma"),
        (b'[{"a": 1}, 7, {"a": 2}]', "2: .*expected an object"),
        (b'[{"a": [}, {"b": 2}]', "1: .*brackets"),
        (b'[{"a": 1}, {"b": ]}, {"c": 3}]', "2: .*brackets"),
        (b'[{"a": 1}}, {"b": 2}]', "2: .*brackets"),
        (b'[{"a": 1}], {"b": 2}]', "2: .*follows"),
        (b"[1, 2]", "1: .*expected an object"),
        (b'[["a"]]', "1: .*expected an object"),
        (b'["a"]', "1: .*expected an object"),
    ],
)
def test_a_broken_array_is_reported_with_the_number_of_the_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    file = write(tmp_path / "a.json", content)
    for block in (3, 1 << 20):
        monkeypatch.setattr("hbp_titan.data.json_files.BLOCK_BYTES", block)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:{message}"):
            index_rows(file, tmp_path)


def test_a_malformed_element_is_an_error_in_its_place(tmp_path: Path) -> None:
    elements = [b'{"a": 1, "a": 2}', b'{"a": }', b'{"a": "\xff"}', b'{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}"]
    file = write(tmp_path / "a.json", b"[" + b",".join([*elements, b'{"a": 3}']) + b"]")
    *errors, last = read(index_rows(file, tmp_path))
    assert last == (5, {"a": 3})
    for (_, error), word in zip(errors, ("twice", "not JSON", "not UTF-8", "nested"), strict=True):
        assert word in error


# Other JSON files: one object over several lines, a list of rows in an object.

ROW = {"messages": [{"role": "user", "content": "a\u00e4]}"}], "x": [{"k": 1}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "b"}]}
SPLIT = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("head_bytes", [1 << 20, 40])
@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (ROW, [ROW]),
        (SHAREGPT, [SHAREGPT]),
        (SPLIT, [SPLIT]),
        ({"dialog": [{"role": "user", "content": "a"}]}, [{"dialog": [{"role": "user", "content": "a"}]}]),
        ({"meta": [{"k": 1}], "messages": ROW["messages"]}, [{"meta": [{"k": 1}], "messages": ROW["messages"]}]),
        ({"data": [ROW, SPLIT, ROW]}, [ROW, SPLIT, ROW]),
        ({"version": "1.1", "tags": ["a", "{"], "data": [ROW, SPLIT], "n": {"y": []}}, [ROW, SPLIT]),
        ({"messages": [SHAREGPT, SHAREGPT]}, [SHAREGPT, SHAREGPT]),
        ({"train": [{"question": "q", "answer": "a"}]}, [{"question": "q", "answer": "a"}]),
        ({"data": []}, []),
        ([ROW, SPLIT], [ROW, SPLIT]),
    ],
)
def test_an_object_is_a_row_or_holds_the_list_of_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    indent: int | None,
    head_bytes: int,
    value: Any,
    rows: Any,
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    content = f"\ufeff\n{text}\n".encode()
    file = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    # Of JSON lines, a first row longer than the head is a row.
    monkeypatch.setattr("hbp_titan.data.json_files._HEAD_BYTES", 1 << 20 if name == "a.jsonl" else head_bytes)
    records = [record for _, record in read(index_rows(file, tmp_path / "unpacked"))]
    # A line of a .jsonl file is a row, whatever it holds.
    assert records == ([value] if name == "a.jsonl" and indent is None and isinstance(value, dict) else rows)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("head_bytes", [1 << 20, 10])
@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'{"data": [{"k": 1}]}\n{"data": []}\n', [(1, {"data": [{"k": 1}]}), (2, {"data": []})]),
        (b'\n{"messages": []}\n\n{"messages": []}', [(2, {"messages": []}), (4, {"messages": []})]),
        (b'{"messages": [\n{"a": 1}\n', [(1, "not JSON: Expecting value at character 16"), (2, {"a": 1})]),
        (b'{"a": }\n{"a": 1}\n', [(1, "not JSON: Expecting value at character 7"), (2, {"a": 1})]),
    ],
)
def test_json_lines_are_known_by_their_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head_bytes: int, content: bytes, rows: Any
) -> None:
    monkeypatch.setattr("hbp_titan.data.json_files._HEAD_BYTES", head_bytes)
    assert read(index_rows(write(tmp_path / name, content), tmp_path)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "messages": [],\n "x": }\n', "3: not JSON: .*one object per line"),
        (b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "4: not JSON: Extra data"),
        (b'{"train": [{"k": 1}], "test": [{"k": 2}]}', '1: has two lists of rows, "train" and "test"'),
        (b'{"data": [{"k": 1}], "n": }', '2: the object breaks after its list "data"'),
        (b'{"data": [{"k": 1}, 7]}', "2: the JSON array breaks"),
    ],
)
def test_a_broken_object_is_reported_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:{message}"):
        index_rows(file, tmp_path)


def test_an_object_of_several_lines_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbp_titan.data.json_files._OBJECT_BYTES", 50)
    content = json.dumps(ROW, indent=1).encode()
    with pytest.raises(ValueError, match="1: an object of more than 50 bytes"):
        index_rows(write(tmp_path / "a.json", content), tmp_path)
    # Only the first row of a list must fit.
    wrapped = json.dumps({"data": [SPLIT] * 9}, indent=1).encode()
    monkeypatch.setattr("hbp_titan.data.json_files._OBJECT_BYTES", 70)
    assert len(index_rows(write(tmp_path / "b.json", wrapped), tmp_path)) == 9


# CSV.


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.CSV"])
def test_rows_of_csv_are_named_by_the_line_where_they_begin(tmp_path: Path, name: str) -> None:
    text = '\ufeffinstruction,output,history\r\n"Add\n2, 2",4,"[[""a"", ""b""]]"\r\n\r\n\u00e4,"5"" disk",\r\n'
    file = write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    index = index_rows(file, tmp_path / "unpacked")
    assert index.file == file
    assert read(index) == [
        (2, {"instruction": "Add\n2, 2", "output": "4", "history": '[["a", "b"]]'}),
        (5, {"instruction": "\u00e4", "output": '5" disk', "history": ""}),
    ]


def test_malformed_rows_of_csv_are_errors_in_their_place(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b',a\n0,x\n1\n2,"\n\xff"\n3,y,z\n4,w')
    assert read(index_rows(file, tmp_path / "unpacked")) == [
        (2, {"column 1": "0", "a": "x"}),
        (3, "the row has 1 cells, but the header has 2"),
        (4, '"a" is not UTF-8'),
        (6, "the row has 3 cells, but the header has 2"),
        (7, {"column 1": "4", "a": "w"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\na,b,a\n1,2,3", "2: two columns .*a"),
        (b"a\tb\n1\t2", "1: the header"),
        (b"a,b\n1,2\n1,xxxxxxxxx", "3: not CSV"),
    ],
)
def test_a_broken_csv_file_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr("hbp_titan.data.rows._CSV_CELL_CHARACTERS", 8)
    file = write(tmp_path / "a.csv", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:{message}"):
        index_rows(file, tmp_path / "unpacked")


# Compressed files.

ROWS = [{"n": number, "text": random.Random(number).randbytes(500).hex()} for number in range(2000)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_has_the_rows_of_the_plain_one(tmp_path: Path, suffix: str) -> None:
    # Two members or frames, as `cat a.gz b.gz` writes them.
    lines = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](CONTENT[:5000]) + PACKERS[suffix](CONTENT[5000:]))
    array = write(tmp_path / f"a.json{suffix}", PACKERS[suffix](json.dumps(ROWS, indent=1).encode()))
    for file in (lines, array):
        index = index_rows(file, tmp_path / "unpacked")
        assert index.file == file
        assert read(index) == list(enumerate(ROWS, start=1))


def test_a_copy_is_reused_unless_the_file_changed_or_is_another(tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl.gz", gzip.compress(b'{"n": %d}' % number))
    file = tmp_path / "one" / "a.jsonl.gz"
    assert read(index_rows(file, unpacked)) == [(1, {"n": 1})]
    assert read(index_rows(tmp_path / "two" / "a.jsonl.gz", unpacked)) == [(1, {"n": 2})]
    assert len(list(unpacked.iterdir())) == 2
    stored = index_rows(file, unpacked).stored
    before = stored.stat().st_mtime_ns
    assert index_rows(file, unpacked).stored.stat().st_mtime_ns == before
    stat = file.stat()
    file.write_bytes(gzip.compress(b'{"n": 3}'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file.stat().st_size == stat.st_size
    assert read(index_rows(file, unpacked)) == [(1, {"n": 3})]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed"])
def test_a_broken_compressed_file_is_reported_and_leaves_no_copy(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](CONTENT)
    half = len(packed) // 2
    content = {
        "cut": packed[:half],
        "flipped": packed[:half] + bytes([packed[half] ^ 0xFF]) * 50 + packed[half + 50 :],
        "not packed": CONTENT,
    }[damage]
    file = write(tmp_path / f"a.jsonl{suffix}", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:[0-9]+: .*breaks off") as error:
        index_rows(file, tmp_path / "unpacked")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "unpacked").iterdir()) == []
    line = int(str(error.value)[len(str(file)) + 1 :].split(":")[0])
    if damage == "not packed":
        assert line == 1
    elif (suffix, damage) == (".gz", "cut"):
        # Everything that gunzip can rescue.
        assert line == zlib.decompressobj(31).decompress(content).count(b"\n") + 1 > 500


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_long_compressed_line_is_not_kept_in_memory(tmp_path: Path, suffix: str) -> None:
    long = b'{"a": "' + os.urandom(1 << 20).hex().encode() * 12 + b'"}\n{"a": 2}'
    file = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](long))
    tracemalloc.start()
    rows = read(index_rows(file, tmp_path / "unpacked"), 1 << 24)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "a row of 25165834 bytes" in rows[0][1]
    assert rows[1:] == [(2, {"a": 2})]
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("name", "module"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")]
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"^\S*{name}: .*{module}; pip install 'hbp-titan\[data\]'"):
        index_rows(write(tmp_path / name, b"x"), tmp_path / "unpacked")


# Parquet and Arrow.

TABLE_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "ä" * (number % 7), "name": "n" if number % 3 else None},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ][: number % 2 + 1],
        "n": number,
    }
    for number in range(500)
]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def write_table(file: Path, table: pa.Table, batch_rows: int) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=batch_rows)
    else:
        new = pa.ipc.new_stream if file.stem == "stream" else pa.ipc.new_file
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    return file


def read_table(file: Path) -> list[tuple[int, Any]]:
    return read(index_rows(file, file.parent / "unpacked"))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("batch_rows", [1, 7, 5000])
def test_any_rows_in_any_order_are_those_that_datasets_reads(tmp_path: Path, name: str, batch_rows: int) -> None:
    import datasets

    file = write_table(tmp_path / name, pa.Table.from_pylist(TABLE_ROWS), batch_rows)
    oracle = TABLE_ROWS
    if name == "a.parquet":
        oracle = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).to_list()
    elif name == "stream.arrow":
        oracle = datasets.Dataset.from_file(str(file)).to_list()
    expected = without_nulls(oracle)
    index = index_rows(file, tmp_path / "unpacked")
    assert read(index) == list(enumerate(expected, start=1))
    chosen = np.random.default_rng(0).permutation(500)[:200]
    chosen[50:60] = np.arange(300, 310)
    part = pickle.loads(pickle.dumps(index.select(chosen)))
    assert read(part) == [(int(row) + 1, expected[row]) for row in chosen]


def test_sizes_are_close_to_the_bytes_of_the_rows(tmp_path: Path) -> None:
    for name in ("a.parquet", "stream.arrow"):
        file = write_table(tmp_path / name, pa.table({"a": ["x" * 1000] * 50}), 10)
        sizes = index_rows(file, tmp_path / "unpacked").sizes
        assert ((sizes >= 1000) & (sizes < 1020)).all()


def test_dates_become_text_and_values_unknown_to_json_stay(tmp_path: Path) -> None:
    row = {"day": datetime.date(2024, 2, 29), "raw": b"\x00", "price": decimal.Decimal("1.5"), "text": "x"}
    file = write_table(tmp_path / "a.parquet", pa.Table.from_pylist([row]), 1)
    assert read_table(file) == [(1, {**row, "day": "2024-02-29"})]


CALL = {"name": "f", "arguments": {"city": "Oslo", "unit": None}}
JSON_ROW = {
    "messages": [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": [1, {}]}}}],
}


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl"])
@pytest.mark.parametrize("known", [True, False])
def test_json_columns_are_the_objects_that_they_spell_with_their_nulls(tmp_path: Path, name: str, known: bool) -> None:
    columns = {key: [list(map(json.dumps, values))] for key, values in JSON_ROW.items()}
    expected = parse_record(JSON_ROW, "messages", {}, {})
    assert expected.messages[1]["tool_calls"][0]["function"] == CALL
    if name == "a.jsonl":
        file = write(tmp_path / name, json.dumps({key: column[0] for key, column in columns.items()}).encode())
    else:
        texts = pa.table({key: pa.array(column, pa.list_(pa.string())) for key, column in columns.items()})
        types = [pa.list_(pa.json_() if known else pa.string())] * 2
        file = write_table(tmp_path / name, texts.cast(pa.schema(list(zip(columns, types, strict=True)))), 1)
    ((line, record),) = read_table(file)
    if known and name != "a.jsonl":
        assert record == JSON_ROW
    assert (line, parse_record(record, "messages", {}, {})) == (1, expected)


def test_json_columns_that_datasets_writes_are_read(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"messages": datasets.List(datasets.Json()), "meta": datasets.Json()})
    rows = [{"messages": JSON_ROW["messages"], "meta": {"a": [None, 1]}}, {"messages": [], "meta": None}]
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for file in (tmp_path / "a.parquet", tmp_path / "saved" / "data-00000-of-00001.arrow"):
        assert read_table(file) == [(1, rows[0]), (2, {"messages": []})]


def test_broken_json_text_is_an_error_in_its_cell_and_maps_are_objects(tmp_path: Path) -> None:
    broken = pa.array(["{", '{"a": null}']).cast(pa.json_())
    inner = pa.map_(pa.string(), pa.struct([("day", pa.date32()), ("x", pa.int64())]))
    pairs = pa.array([[("k", {"day": datetime.date(2024, 2, 29)})], []], inner)
    rows = read_table(write_table(tmp_path / "a.parquet", pa.table({"j": broken, "m": pairs}), 2))
    assert rows[0][1]["m"] == {"k": {"day": "2024-02-29"}}
    assert "not JSON" in str(rows[0][1]["j"])
    assert rows[1] == (2, {"j": {"a": None}, "m": {}})


def test_nulls_that_a_struct_fills_in_are_dropped(tmp_path: Path) -> None:
    rows = [{"arguments": {"a": None, "b": 2}}, {"arguments": {"c": "x"}}]
    file = write_table(tmp_path / "a.parquet", pa.Table.from_pylist(rows), 2)
    assert read_table(file) == [(1, {"arguments": {"b": 2}}), (2, {"arguments": {"c": "x"}})]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_a_bad_cell_or_large_row_is_an_error_in_its_place(tmp_path: Path, name: str) -> None:
    text = pa.array([b"ok", b"\xff", b"ok"]).cast(pa.binary()).view(pa.string())
    rows = read_table(write_table(tmp_path / name, pa.table({"a": text, "n": [1, 2, 3]}), 3))
    assert [rows[0], rows[2]] == [(1, {"a": "ok", "n": 1}), (3, {"a": "ok", "n": 3})]
    assert rows[1][1]["n"] == 2
    assert "can't decode byte 0xff" in str(rows[1][1]["a"])
    rows = read_table(write_table(tmp_path / name, pa.table({"a": ["x", "y" * 2_000_000, "z"]}), 3))
    assert [rows[0], rows[2]] == [(1, {"a": "x"}), (3, {"a": "z"})]
    assert re.match(r"a row of 20000\d\d bytes", rows[1][1])


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_broken_table_is_one_error_and_an_empty_one_has_no_rows(tmp_path: Path, name: str) -> None:
    file = write_table(tmp_path / name, pa.Table.from_pylist(TABLE_ROWS), 100)
    content = file.read_bytes()
    for broken in (b"x", b"PAR1", content[: len(content) // 2], content[:-3] if name != "stream.arrow" else b"y"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:[0-9]+: ") as error:
            index_rows(file, tmp_path / "unpacked")
        assert "\n" not in str(error.value)
    write_table(file, pa.Table.from_pylist(TABLE_ROWS)[:0], 1)
    assert len(index_rows(file, tmp_path / "unpacked")) == 0
    assert len(index_rows(write(file, b""), tmp_path / "unpacked")) == 0


def test_offsets_outside_of_an_arrow_file_and_equal_columns_are_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path / "stream.arrow", pa.table({"a": ["x" * 999] * 4}), 4)
    good, bad = np.arange(5, dtype=np.int32) * 999, np.array([0, 999, 1 << 30, 2997, 3996], np.int32)
    content = file.read_bytes()
    assert content.count(good.tobytes()) == 1
    file.write_bytes(content.replace(good.tobytes(), bad.tobytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:1: .*damaged"):
        index_rows(file, tmp_path)
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ValueError, match=r"stream.arrow:1: .*same name: a, a"):
        index_rows(write_table(tmp_path / "stream.arrow", table, 1), tmp_path)


# Random rows: a conversation of clean text, or one ValueError of one line.

GOOD = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 1}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "tools": '[{"name": "f"}]'},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "completion": "Yo", "source": "x"},
]
WORDS = [word for row in GOOD for word in json.dumps(row).split('"') if word.isidentifier()]
SCALARS = [None, True, False, 0, -1, 2**70, 0.5, float("nan"), "", "\ud800", "ä\n", [], {}, [[]], {"name": "f"}, *WORDS]


def random_row(rng: random.Random) -> bytes:
    """Random bytes, or a good row with a value or some bytes replaced."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(40)).replace(b"\n", b"")
    row = json.loads(json.dumps(rng.choice(GOOD)))
    if rng.random() < 0.5:
        holder, key = rng.choice(list(_places(row)))
        holder[key] = rng.choice([*SCALARS, [rng.choice(SCALARS)], {rng.choice(WORDS): rng.choice(SCALARS)}])
        return json.dumps(row).encode()
    raw, put = json.dumps(row).encode(), bytes(rng.choices(b'abc\\"{}[],: 01\xff\x00', k=rng.randrange(4)))
    start = rng.randrange(len(raw) + 1)
    return raw[:start] + put + raw[start + rng.randrange(3) :]


def _places(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _check_conversation(conversation: Conversation) -> None:
    # Text that a tokenizer and a template can handle.
    json.dumps([conversation.messages, conversation.tools, conversation.source], ensure_ascii=False).encode("utf-8")
    for message in conversation.messages:
        assert message["role"] in ROLES
        assert isinstance(message.get("content", ""), str)
        assert "content" in message or message["tool_calls"]
        assert "weight" not in message
        assert message.get("train", False) is False
        assert "train" not in message or message["role"] == "assistant"


def _check_error(error: ValueError) -> None:
    message = str(error)
    assert message
    assert message.isprintable()
    assert len(message) < 600


def test_10000_random_rows_give_conversations_or_errors_of_one_line(tmp_path: Path) -> None:
    rng = random.Random(7)
    file = write(tmp_path / "a.jsonl", b"\n".join(random_row(rng) for _ in range(10_000)))
    conversations = errors = 0
    for _, record in read_records(index_rows(file, tmp_path), 1 << 20):
        if isinstance(record, ValueError):
            _check_error(record)
            errors += 1
            continue
        for format in FORMATS:
            try:
                _check_conversation(parse_record(record, format, {}, {}))
                conversations += 1
            except ValueError as error:
                _check_error(error)
        try:
            detect_format(record, {})
        except ValueError as error:
            _check_error(error)
    # Both are frequent: the random rows get past the JSON parser.
    assert conversations > 2000
    assert errors > 1000
