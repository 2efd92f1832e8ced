"""Free space is checked before rows are tokenized, and a disk that is full nevertheless is one error and no loss."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hbp_titan.data import build_set, build_source, rows
from hbp_titan.data.disk import copy_bytes, store_bytes
from hbp_titan.data.prepare import prepare
from hbp_titan.data.rows import index_rows
from tests.data.preparing import job, line, many, prepared, run_script, write

TEXT = b'{"a": "bcdefgh"}\n' * 1000  # 17,000 bytes


def _zstd(sized: bool) -> bytes:
    compressor = zstandard.ZstdCompressor().compressobj(size=len(TEXT) if sized else -1)
    return compressor.compress(TEXT) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", TEXT, 0),
        ("a.jsonl.gz", gzip.compress(TEXT), 17000),
        # Two members, the second of one byte: four times the compressed size.
        ("a.jsonl.gz", gzip.compress(TEXT) + gzip.compress(b"\n"), 4 * len(gzip.compress(TEXT) + gzip.compress(b"\n"))),
        ("a.jsonl.zst", _zstd(sized=True), 17000),
        ("a.jsonl.zst", _zstd(sized=False), 4 * len(_zstd(sized=False))),
        ("a.csv", b"a,b\n1,2\n", 8),
        ("a.csv.gz", gzip.compress(TEXT), 34000),
        ("a.jsonl.gz", b"", 0),
        ("a.parquet", b"not Parquet", 0),
    ],
)
def test_copies_are_estimated_from_what_the_file_says(tmp_path: Path, name: str, content: bytes, expected: int) -> None:
    (tmp_path / name).write_bytes(content)
    assert copy_bytes(tmp_path / name) == expected


def test_the_copy_of_a_parquet_file_is_estimated_uncompressed(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["abc" * 100 + str(number) for number in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    assert 300_000 < copy_bytes(tmp_path / "a.parquet") < 320_000


def test_five_bytes_are_stored_for_each_four_of_a_row(tmp_path: Path) -> None:
    index = index_rows(write(tmp_path / "a.jsonl", *["x" * 799 + "\n"] * 10), tmp_path)
    assert store_bytes([index]) == 10 * (1000 + 150)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free bytes of every disk, to be changed."""
    space = [1 << 40]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=space[0]))
    return space


def test_a_disk_that_is_too_small_is_an_error_before_a_row_is_tokenized(
    tmp_path: Path, free: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write(tmp_path / name, *[line("q", "a" * 9_939)] * 100)) for name in ("a.jsonl", "b.jsonl")]
    config = job(tmp_path, train_files=files, levels="16384:1", duplicates="skip")
    with monkeypatch.context() as patch:
        patch.setattr(build_source, "RowTokenizer", None)
        # 2 * 100 rows of 10,041 bytes: 2.4 MiB. One source alone would fit.
        free[0] = 1_400_000
        for words in ([], ["--world_size", "2"]):
            argv = ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "16384:1", *words]
            code, _, errors = run_script(capsys, *argv)
            (message,) = errors.splitlines()
            assert code == 1
            assert f"data.cache_folder = '{tmp_path}/cache'" in message
            assert "2 sources take about 2 MiB, but 1 MiB are free" in message
    free[0] = 3 << 20
    store = prepared(config)
    # Finished stores take no more space.
    free[0] = 0
    config.data.duplicates = "keep"
    assert (len(store), len(prepared(config))) == (1, 200)


def test_too_small_a_disk_for_copies_is_an_error_before_they_are_written(tmp_path: Path, free: list[int]) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(line("q", "a" * (1 << 20)).encode()))
    config = job(tmp_path, train_files=[str(file)])
    free[0] = 1 << 20
    with pytest.raises(ValueError, match=r"copies of compressed.* 1 MiB are free"):
        prepare(config)
    assert not list((tmp_path / "cache").glob("unpacked*"))


@pytest.fixture
def full_after_three_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of about a row; the fourth meets a full disk. The list has the number of each shard that is written."""
    written: list[int] = []
    write_shard = build_source._ShardWriter.write

    def write_until_full(writer: Any) -> Any:
        written.append(writer.shard.number)
        if len(written) == 4:
            with Path("/dev/full").open("wb") as stream:
                stream.write(b"a token")
        return write_shard(writer)

    monkeypatch.setattr(build_source, "SHARD_BYTES", 100)
    monkeypatch.setattr(build_source._ShardWriter, "write", write_until_full)
    return written


def test_a_full_disk_is_one_error_and_the_next_call_continues(
    tmp_path: Path, free: list[int], full_after_three_shards: list[int]
) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(20)))])
    with pytest.raises(ValueError, match=r"data.cache_folder = .* the disk is full"):
        prepare(config)
    # Only the missing shards count.
    shards = len(list((tmp_path / "cache").glob("source-*.partial/shard-*")))
    assert shards == 3
    free[0] = 0
    with pytest.raises(ValueError, match="1 sources take about"):
        prepare(config)
    free[0] = 1 << 40
    assert len(prepared(config)) == 20
    assert full_after_three_shards[:5] == [0, 1, 2, 3, 3]
    assert sorted(full_after_three_shards[4:]) == list(range(3, max(full_after_three_shards) + 1))


def test_a_full_disk_leaves_no_half_of_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(20)))])

    def save(*_: Any) -> None:
        raise OSError("20 requested and 7 written")  # numpy's, without a number

    with monkeypatch.context() as patch:
        patch.setattr(build_set, "np", SimpleNamespace(**{**vars(np), "save": save}))
        with pytest.raises(ValueError, match="the disk is full"):
            prepare(config)
    assert not [path.name for path in (tmp_path / "cache").iterdir() if "set-" in path.name]
    assert len(prepared(config)) == 20


def test_a_full_disk_is_not_taken_for_a_broken_parquet_file(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abc"] * 1000}), tmp_path / "a.parquet")
    with pytest.raises(OSError, match="No space") as raised:
        rows._write_arrow(tmp_path / "a.parquet", Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


def test_digests_that_cannot_be_kept_do_not_end_a_preparation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *many(20)))])

    def atomic_write(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hbp_titan.data.prepare.atomic_write", atomic_write)
    assert len(prepared(config)) == 20
