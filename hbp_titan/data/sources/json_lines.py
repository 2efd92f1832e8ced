"""JSON lines files: where each row lies, and its value.

Owns the line rules: a row is a line that is not blank; lines end in \\n or \\r\\n; a byte order mark before the first
is no part of it. The scan holds one block in memory, however long a line is, and parses nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.sources.json_text import parse_json, shown

BLOCK_BYTES = 1 << 20
_NEWLINE, _RETURN, _SPACE = b"\n\r "


def index_lines(file: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Byte offset, byte length (line end included) and number (from 1) of each row: int64 [R] each."""
    with file.open("rb") as stream:
        starts, sizes, first_bytes = _scan(stream)
        if not len(starts):
            return starts, sizes, starts
        stream.seek(0)
        if stream.read(3) == codecs.BOM_UTF8:
            starts[0], sizes[0], first_bytes[0] = 3, sizes[0] - 3, _SPACE
        blank = (first_bytes == _NEWLINE) | ((first_bytes == _RETURN) & (sizes == 2))
        for row in np.flatnonzero((first_bytes <= _SPACE) & ~blank).tolist():
            blank[row] = _is_blank(stream, int(starts[row]), int(sizes[row]))
    rows = np.flatnonzero(~blank)
    return starts[rows], sizes[rows], rows + 1


def _scan(stream: IO[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Offset, length and first byte of every line, blank ones included."""
    ends, first_bytes = [np.zeros(1, np.int64)], []
    position, after_newline = 0, True
    while block := stream.read(BLOCK_BYTES):
        data = np.frombuffer(block, np.uint8)
        newlines = np.flatnonzero(data == _NEWLINE)
        begins = newlines[newlines < len(data) - 1] + 1
        first_bytes.append(data[np.concatenate([[0], begins]) if after_newline else begins])
        ends.append(newlines + (position + 1))
        position += len(block)
        after_newline = block.endswith(b"\n")
    if not after_newline:
        ends.append(np.array([position]))
    borders = np.concatenate(ends)
    return borders[:-1], np.diff(borders), np.concatenate([np.zeros(0, np.uint8), *first_bytes])


def _is_blank(stream: IO[bytes], start: int, size: int) -> bool:
    stream.seek(start)
    while size and (block := stream.read(min(size, BLOCK_BYTES))):
        if not block.isspace():
            return False
        size -= len(block)
    return True


def read_lines(
    file: Path, starts: NDArray[np.int64], sizes: NDArray[np.int64], max_row_bytes: int
) -> Iterator[dict[str, Any] | ValueError]:
    """The objects of the rows at these places; a ValueError in the place of one that is malformed."""
    with file.open("rb") as stream:
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            if size > max_row_bytes:
                yield too_large(size, max_row_bytes)
                continue
            stream.seek(start)
            yield _parse_row(stream.read(size))


def _parse_row(raw: bytes) -> dict[str, Any] | ValueError:
    try:
        value = parse_json(raw)
    except ValueError as error:
        return error
    return value if isinstance(value, dict) else ValueError(f"the row is {shown(value)}, not a JSON object")


def too_large(size: int, max_row_bytes: int) -> ValueError:
    """What is wrong with a row of `size` bytes."""
    return ValueError(f"a row of {size} bytes is larger than data.max_row_bytes = {max_row_bytes}: raise it")
