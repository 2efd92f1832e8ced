"""The rows of a data file, by index: how many a file has, and any of them at any time.

Owns the file types behind one index: JSON and CSV, plain or compressed, Parquet, Arrow. A row is named by its line, or
by its number in files without lines (arrays, Parquet, Arrow). Files that cannot be read in place get a copy: .gz and
.zst are decompressed, CSV becomes JSON lines and Parquet an Arrow file, all by streaming. A malformed row is a
ValueError in its place, without file and line, which the caller knows; a broken file raises.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.arrow import first_line, index_arrow, read_arrow
from hbp_titan.data.disk import is_full
from hbp_titan.data.files import ARROW_SUFFIXES, CSV_SUFFIXES, SUFFIXES, require
from hbp_titan.data.json_files import index_json
from hbp_titan.data.jsonl import index_lines, parse_row, read_lines, shown
from hbp_titan.models.hf_files import check_not_pointer

_BLOCK_BYTES = 1 << 20
# A block of zstd can decompress to 30,000 times its size.
_ZSTD_BLOCK_BYTES = 1 << 13
_ROWS_PER_BATCH = 256
# A quote that is never closed must not take the rest of a large file into memory.
_CSV_CELL_CHARACTERS = 1 << 28


@dataclass(frozen=True)
class RowIndex:
    """Where the rows of one file are.

    file: as the user named it; stored: the file that is read, a copy if `file` is compressed or Parquet.
    starts: byte offsets in `stored`, or positions in an Arrow file; sizes: bytes, estimated for Arrow;
    lines: line or row numbers, from 1. int64 [R] each.
    """

    file: Path
    stored: Path
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lines: NDArray[np.int64]

    def select(self, rows: slice | NDArray[np.int64]) -> RowIndex:
        """Return the index of some of the rows."""
        return RowIndex(self.file, self.stored, self.starts[rows], self.sizes[rows], self.lines[rows])

    def __len__(self) -> int:
        return len(self.lines)


def index_rows(file: Path, unpacked: Path) -> RowIndex:
    """Find the rows of `file` in one pass, without parsing them; there may be none.

    unpacked: folder for the copies of compressed, CSV and Parquet files; existing copies are used again.
    Raises ValueError "file:line: ..." if the file is broken.
    """
    name = file.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{file}: unsupported file type; must be one of {', '.join(SUFFIXES)}")
    if not file.stat().st_size:
        # Of any type: not even a Parquet file's footer was written.
        return RowIndex(file, file, *(np.zeros(0, np.int64) for _ in range(3)))
    # Compressed files have no offsets to read rows from, and several processes read each file.
    stored = file
    if name.endswith(".parquet"):
        stored = _copy(file, unpacked, ".arrow", _write_arrow)
    elif name.endswith((".gz", ".zst")):
        stored = _copy(file, unpacked, "", _write_decompressed)
    if name.endswith(CSV_SUFFIXES):
        stored = _copy(stored, unpacked, ".jsonl", lambda plain, target: _write_csv_rows(plain, target, file))
    if _is_arrow(file):
        places = index_arrow(stored, file)
    elif name.endswith(CSV_SUFFIXES):
        places = index_lines(stored)
    else:
        places = index_json(stored, file, lines=not name.endswith((".json", ".json.gz", ".json.zst")))
    return RowIndex(file, stored, *places)


def count_rows(file: Path, unpacked: Path) -> int | None:
    """Return the number of rows of a file, None if it cannot be read; `unpacked` as for `index_rows`."""
    try:
        check_not_pointer(file)
        if file.name.lower().endswith(".parquet"):
            # The footer has it: no copy is needed.
            require("pyarrow.parquet", file)
            return int(require("pyarrow", file).parquet.read_metadata(file).num_rows)
        if file.name.lower().endswith((".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")):
            # Without a copy, which could fill the disk for a file that is not even used.
            return _count_lines(_decompressed(file))
        return len(index_rows(file, unpacked))
    except (ValueError, OSError, _BrokenStream):
        return None


def _count_lines(blocks: Iterator[bytes]) -> int:
    rows, begun = 0, False
    for block in blocks:
        first, *others = block.split(b"\n")
        begun = begun or bool(first.strip())
        for line in others:
            rows += begun
            begun = bool(line.strip())
    return rows + begun


def read_records(index: RowIndex, max_row_bytes: int) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the line and the record of each row of `index`, in order; a ValueError in place of a malformed record."""
    if _is_arrow(index.file):
        records = read_arrow(index.stored, index.starts, max_row_bytes)
    else:
        parse = _parse_csv_row if index.file.name.lower().endswith(CSV_SUFFIXES) else parse_row
        records = read_lines(index.stored, index.starts, index.sizes, max_row_bytes, parse)
    return zip(index.lines.tolist(), records, strict=True)


def _is_arrow(file: Path) -> bool:
    return file.name.lower().endswith(ARROW_SUFFIXES)


def _copy(file: Path, folder: Path, suffix: str, write: Callable[[Path, Path], None]) -> Path:
    """Return the copy of `file` in `folder`, written atomically (several processes may do it) if it does not exist."""
    copy = folder / f"{_copy_key(file)}-{file.name[:150]}{suffix}"
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{copy.name[:200]}-{secrets.token_hex(4)}"
        try:
            write(file, temporary)
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)
    return copy


def has_copy(file: Path, folder: Path) -> bool:
    """Return whether `folder` has a copy of `file` as it is now."""
    return any(folder.glob(f"{_copy_key(file)}-*"))


def _copy_key(file: Path) -> str:
    # Of path, size and time: a changed file gets another copy.
    stat = file.stat()
    key = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:16]


class _BrokenStream(Exception):
    """Compressed bytes that end early or are corrupt."""


def _write_decompressed(file: Path, target: Path) -> None:
    line = 1
    with target.open("wb") as stream:
        try:
            for block in _decompressed(file):
                stream.write(block)
                line += block.count(b"\n")
        except _BrokenStream as error:
            raise ValueError(
                f"{file}:{line}: the compressed file breaks off in this line ({error}); copy it again"
            ) from None


def _decompressed(file: Path) -> Iterator[bytes]:
    return _gzip_blocks(file) if file.name.lower().endswith(".gz") else _zstd_blocks(file)


def _gzip_blocks(file: Path) -> Iterator[bytes]:
    with gzip.open(file, "rb") as stream:
        while True:
            try:
                # read1, not read, which would lose the data before the damage.
                block = stream.read1(_BLOCK_BYTES)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise _BrokenStream(error) from None
            if not block:
                return
            yield block


def _zstd_blocks(file: Path) -> Iterator[bytes]:
    zstandard = require("zstandard", file)
    # Not stream_reader: it takes a truncated stream for a complete one.
    frame = None
    with file.open("rb") as stream:
        while block := stream.read(_ZSTD_BLOCK_BYTES):
            while block:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise _BrokenStream(error) from None
                block = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise _BrokenStream("the last zstd frame has no end")


def _write_csv_rows(file: Path, target: Path, name: Path) -> None:
    """Write the rows of a CSV file as JSON lines, each on the line where it begins; `name` is the file, in messages.

    The first row has the names of the columns. A malformed row becomes a string, which is its error.
    """
    csv.field_size_limit(_CSV_CELL_CHARACTERS)
    columns: list[str] = []
    written = 1
    # Bytes that are not UTF-8 become half surrogates, so that only their row is malformed.
    with (
        file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as source,
        target.open("w", encoding="utf-8", newline="\n") as stream,
    ):
        rows = csv.reader(source)
        line = 1
        try:
            for cells in rows:
                begin, line = line, rows.line_num + 1
                if not cells:
                    continue
                if not columns:
                    columns = _csv_columns(cells, f"{name}:{begin}")
                    continue
                stream.write("\n" * (begin - written) + json.dumps(_csv_row(columns, cells)) + "\n")
                written = begin + 1
        except csv.Error as error:
            raise ValueError(f"{name}:{line}: not CSV: {error}") from None


def _csv_columns(cells: list[str], where: str) -> list[str]:
    # Tables of pandas have an index without a name.
    columns = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: two columns have the name {shown(twice)}")
    if len(columns) == 1 and (";" in columns[0] or "\t" in columns[0]):
        raise ValueError(f"{where}: the header is one column, {shown(columns[0])}; separate columns by commas")
    return columns


def _csv_row(columns: list[str], cells: list[str]) -> dict[str, str] | str:
    if len(cells) != len(columns):
        return f"the row has {len(cells)} cells, but the header has {len(columns)}"
    for column, cell in zip(columns, cells, strict=True):
        if not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell):
            return f"{shown(column)} is not UTF-8"
    return dict(zip(columns, cells, strict=True))


def _parse_csv_row(raw: bytes) -> dict[str, Any] | ValueError:
    value = json.loads(raw)
    return ValueError(value) if isinstance(value, str) else value


def _write_arrow(file: Path, target: Path) -> None:
    # Not read in place: every process would decode whole row groups, of 100 MB and more if Spark wrote them.
    arrow = require("pyarrow", file)
    require("pyarrow.parquet", file)
    try:
        with (
            arrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK_BYTES) as table,
            arrow.ipc.new_stream(str(target), table.schema_arrow) as writer,
        ):
            for batch in table.iter_batches(_ROWS_PER_BATCH, use_threads=False):
                writer.write_batch(batch)
    except (arrow.ArrowException, OSError) as error:
        if is_full(error):
            raise
        raise ValueError(f"{file}:1: not a readable Parquet file: {first_line(error)}") from None
