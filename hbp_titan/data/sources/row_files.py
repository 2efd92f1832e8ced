"""Data files -> raw records, by index: which rows a file has, and any of them at any time.

Owns the kinds of files (JSON lines, plain or compressed; JSON arrays; Parquet; Arrow) behind one index. A row is named
by its line, or by its number in files that have no lines (Parquet, Arrow, a JSON array). A malformed row is a
ValueError in its place, without the file and the line, which the caller knows; a broken file is one that is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.sources.arrow_rows import index_arrow, read_arrow
from hbp_titan.data.sources.json_lines import index_lines, read_lines
from hbp_titan.data.sources.unpack import unpack

JSON_SUFFIXES = tuple(f".{name}{packed}" for name in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".zst"))
ARROW_SUFFIXES = (".arrow", ".parquet")
SUFFIXES = JSON_SUFFIXES + ARROW_SUFFIXES


@dataclass(frozen=True)
class RowIndex:
    """Where the rows of one file are.

    file: as the user named it; stored: the file that is read, a copy where `file` is compressed or Parquet.
    starts: byte offsets in `stored`, or positions in an Arrow file; sizes: bytes, estimated for Arrow;
    lines: line numbers, or row numbers, from 1. int64 [R] each.
    """

    file: Path
    stored: Path
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lines: NDArray[np.int64]

    def take(self, rows: slice | NDArray[np.int64]) -> RowIndex:
        """The index of some of the rows."""
        return RowIndex(self.file, self.stored, self.starts[rows], self.sizes[rows], self.lines[rows])

    def __len__(self) -> int:
        return len(self.lines)


def index_rows(file: Path, unpacked: Path) -> RowIndex:
    """Where the rows of `file` are, found in one pass without parsing them.

    unpacked: the folder for copies of compressed and Parquet files; a copy made earlier is used again.
    Raises ValueError "file:line: ..." where the file has no rows or is broken.
    """
    if not file.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{file}: no known kind of data file: expected one of {', '.join(SUFFIXES)}")
    stored = unpack(file, unpacked)
    index = RowIndex(file, stored, *(index_arrow(stored, file) if _is_arrow(file) else index_lines(stored)))
    if not len(index):
        raise ValueError(f"{file}:1: the file has no rows")
    return index


def read_records(index: RowIndex, max_row_bytes: int) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The line and the record of each row of `index` in its order; a ValueError in the place of a malformed record."""
    if _is_arrow(index.file):
        records = read_arrow(index.stored, index.starts, max_row_bytes)
    else:
        records = read_lines(index.stored, index.starts, index.sizes, max_row_bytes)
    return zip(index.lines.tolist(), records, strict=True)


def _is_arrow(file: Path) -> bool:
    return file.name.lower().endswith(ARROW_SUFFIXES)
