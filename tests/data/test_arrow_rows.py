"""Parquet and Arrow files: the rows that `datasets` reads from them, without the nulls that Arrow adds."""

from __future__ import annotations

import datetime
import decimal
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbp_titan.data.rows import index_rows, read_records

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "ä" * (number % 7), "name": "n" if number % 3 else None},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ][: number % 2 + 1],
        "n": number,
    }
    for number in range(1000)
]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def write(file: Path, table: pa.Table, batch_rows: int) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=batch_rows)
    else:
        new = pa.ipc.new_stream if file.stem == "stream" else pa.ipc.new_file
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    return file


def read(file: Path, max_row_bytes: int = 1 << 20) -> list[tuple[int, Any]]:
    records = read_records(index_rows(file, file.parent / "unpacked"), max_row_bytes)
    return [(line, str(record) if isinstance(record, ValueError) else record) for line, record in records]


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("batch_rows", [1, 7, 300, 5000])
def test_any_rows_in_any_order_are_those_that_datasets_reads(tmp_path: Path, name: str, batch_rows: int) -> None:
    file = write(tmp_path / name, pa.Table.from_pylist(ROWS), batch_rows)
    if name == "a.parquet":
        oracle = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).to_list()
    elif name == "stream.arrow":
        oracle = datasets.Dataset.from_file(str(file)).to_list()
    else:
        oracle = ROWS
    expected = without_nulls(oracle)
    index = index_rows(file, tmp_path / "unpacked")
    assert list(read_records(index, 1 << 20)) == list(enumerate(expected, start=1))
    chosen = np.random.default_rng(0).permutation(1000)[:200]
    chosen[50:60] = np.arange(500, 510)
    part = pickle.loads(pickle.dumps(index.select(chosen)))
    assert list(read_records(part, 1 << 20)) == [(int(row) + 1, expected[row]) for row in chosen]


def test_sizes_are_near_the_bytes_of_the_rows(tmp_path: Path) -> None:
    table = pa.table({"a": ["x" * 1000] * 50})
    for name in ("a.parquet", "stream.arrow"):
        sizes = index_rows(write(tmp_path / name, table, 10), tmp_path / "unpacked").sizes
        assert ((sizes >= 1000) & (sizes < 1020)).all()


def test_dates_become_text_and_values_that_json_has_not_stay(tmp_path: Path) -> None:
    row = {"day": datetime.date(2024, 2, 29), "raw": b"\x00", "price": decimal.Decimal("1.5"), "text": "x"}
    file = write(tmp_path / "a.parquet", pa.Table.from_pylist([row]), 1)
    assert read(file) == [(1, {**row, "day": "2024-02-29"})]


def test_a_cell_that_python_cannot_hold_is_an_error_in_its_place(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"\xff", b"ok"]).cast(pa.binary()).view(pa.string())
    for name in ("a.parquet", "stream.arrow"):
        file = write(tmp_path / name, pa.table({"a": text, "n": [1, 2, 3]}), 3)
        rows = read(file)
        assert [rows[0], rows[2]] == [(1, {"a": "ok", "n": 1}), (3, {"a": "ok", "n": 3})]
        assert rows[1][1]["n"] == 2
        assert "can't decode byte 0xff" in str(rows[1][1]["a"])


def test_a_large_row_is_an_error_and_its_neighbours_are_read(tmp_path: Path) -> None:
    for name in ("a.parquet", "stream.arrow"):
        file = write(tmp_path / name, pa.table({"a": ["x", "y" * 2_000_000, "z"]}), 3)
        rows = read(file)
        assert [rows[0], rows[2]] == [(1, {"a": "x"}), (3, {"a": "z"})]
        assert re.fullmatch(r"a row of 20000\d\d bytes is larger than data.max_row_bytes = 1048576: .*", rows[1][1])


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_broken_or_empty_file_is_one_named_error(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, pa.Table.from_pylist(ROWS), 100)
    content = file.read_bytes()
    for broken in (b"", b"x", b"PAR1", content[: len(content) // 2], content[:-3] if name != "stream.arrow" else b"y"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:[0-9]+: ") as error:
            index_rows(file, tmp_path / "unpacked")
        assert "\n" not in str(error.value)
    write(file, pa.Table.from_pylist(ROWS)[:0], 1)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:1: the file has no rows$"):
        index_rows(file, tmp_path / "unpacked")


def test_offsets_that_lead_out_of_an_arrow_file_are_refused_before_a_row_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "stream.arrow", pa.table({"a": ["x" * 999] * 4}), 4)
    good, bad = np.arange(5, dtype=np.int32) * 999, np.array([0, 999, 1 << 30, 2997, 3996], np.int32)
    content = file.read_bytes()
    assert content.count(good.tobytes()) == 1
    file.write_bytes(content.replace(good.tobytes(), bad.tobytes()))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:1: a damaged Arrow file: "):
        index_rows(file, tmp_path)


def test_columns_of_the_same_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ValueError, match=r"stream.arrow:1: two columns have the same name: a, a"):
        index_rows(write(tmp_path / "stream.arrow", table, 1), tmp_path)
