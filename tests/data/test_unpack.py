"""Compressed files: unpacked once, found again, made anew after a change; a broken one is named with its line."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from hbp_titan.data.rows import index_rows, read_records

ROWS = [{"n": number, "text": random.Random(number).randbytes(500).hex()} for number in range(2000)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(file: Path, unpacked: Path) -> list[Any]:
    return [record for _, record in read_records(index_rows(file, unpacked), 1 << 20)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_has_the_rows_and_lines_of_the_plain_one(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    # Two members or frames, as `cat a.gz b.gz` writes them.
    file.write_bytes(PACKERS[suffix](CONTENT[:5000]) + PACKERS[suffix](CONTENT[5000:]))
    index = index_rows(file, tmp_path / "unpacked")
    assert index.file == file
    assert list(read_records(index, 1 << 20)) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_json_array_may_be_packed(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.json{suffix}"
    file.write_bytes(PACKERS[suffix](json.dumps(ROWS, indent=1).encode()))
    assert read(file, tmp_path / "unpacked") == ROWS


def test_a_copy_is_found_again_made_anew_after_a_change_and_not_shared_by_namesakes(tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n": %d}' % number))
    file = tmp_path / "one" / "a.jsonl.gz"
    assert read(file, unpacked) == [{"n": 1}]
    assert read(tmp_path / "two" / "a.jsonl.gz", unpacked) == [{"n": 2}]
    assert len(list(unpacked.iterdir())) == 2
    stored = index_rows(file, unpacked).stored
    before = stored.stat().st_mtime_ns
    assert index_rows(file, unpacked).stored.stat().st_mtime_ns == before
    stat = file.stat()
    file.write_bytes(gzip.compress(b'{"n": 3}'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file.stat().st_size == stat.st_size
    assert read(file, unpacked) == [{"n": 3}]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed"])
def test_a_broken_file_is_named_with_its_line_and_leaves_nothing(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](CONTENT)
    half = len(packed) // 2
    content = {
        "cut": packed[:half],
        "flipped": packed[:half] + bytes([packed[half] ^ 0xFF]) * 50 + packed[half + 50 :],
        "not packed": CONTENT,
    }[damage]
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(file))}:[0-9]+: the compressed file breaks off in this line"
    ) as error:
        index_rows(file, tmp_path / "unpacked")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "unpacked").iterdir()) == []
    line = int(str(error.value)[len(str(file)) + 1 :].split(":")[0])
    if damage == "not packed":
        assert line == 1
    elif (suffix, damage) == (".gz", "cut"):
        # All that a command line's gunzip gets out of the file.
        import zlib

        rescued = zlib.decompressobj(31).decompress(content)
        assert line == rescued.count(b"\n") + 1 > 500


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_line_of_50_mb_is_not_held_in_memory(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](b'{"a": "' + os.urandom(1 << 20).hex().encode() * 24 + b'"}\n{"a": 2}'))
    tracemalloc.start()
    rows = list(read_records(index_rows(file, tmp_path / "unpacked"), 33554432))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "a row of 50331658 bytes is larger" in str(rows[0][1])
    assert rows[1:] == [(2, {"a": 2})]
    assert peak < 16_000_000


@pytest.mark.parametrize(
    ("name", "module"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")]
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name}: reading it needs {module}: pip install 'hbp-titan\[data\]'"):
        index_rows(tmp_path / name, tmp_path / "unpacked")
