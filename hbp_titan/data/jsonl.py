"""JSON of unknown origin: where the lines of a file lie, and the values of rows.

Owns JSON lines: a row is a line that is not blank; lines end in \\n or \\r\\n. A file is scanned once, a block at a
time, without parsing: a row is parsed only where it is used. Every error in a row is a ValueError of one short line:
bytes that are not UTF-8, a key twice in an object (which value is meant is unknown), half surrogates, values that JSON
does not have, and nesting deeper than MAX_DEPTH. Other JSON files: data/json_files.py.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 20
# Far above any tool's schema, far below Python's recursion limit, which templates share.
MAX_DEPTH = 64
_NEWLINE, _RETURN, _SPACE = b"\n\r "

Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Byte offset, bytes and number (from 1) of each row: int64 [R] each."""


def index_lines(file: Path) -> Rows:
    """Return where the rows of a JSON lines file are; the bytes include the line end."""
    with file.open("rb") as stream:
        starts, sizes, first_bytes = _scan_lines(stream)
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


def _scan_lines(stream: IO[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Return offset, bytes and first byte of every line, blank ones included."""
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
    boundaries = np.concatenate(ends)
    return boundaries[:-1], np.diff(boundaries), np.concatenate([np.zeros(0, np.uint8), *first_bytes])


def _is_blank(stream: IO[bytes], start: int, size: int) -> bool:
    stream.seek(start)
    while size and (block := stream.read(min(size, BLOCK_BYTES))):
        if not block.isspace():
            return False
        size -= len(block)
    return True


def read_lines(
    file: Path,
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    max_row_bytes: int,
    parse: Callable[[bytes], dict[str, Any] | ValueError],
) -> Iterator[dict[str, Any] | ValueError]:
    """Yield what `parse` makes of the rows at these places; a ValueError in the place of one that is malformed."""
    with file.open("rb") as stream:
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            if size > max_row_bytes:
                yield too_large(size, max_row_bytes)
                continue
            stream.seek(start)
            yield parse(stream.read(size))


def parse_row(raw: bytes) -> dict[str, Any] | ValueError:
    """Return the object of a row of JSON, or what is wrong with it."""
    try:
        value = parse_json(raw)
    except ValueError as error:
        return error
    return value if isinstance(value, dict) else ValueError(f"the row is {shown(value)}, not a JSON object")


def too_large(size: int, max_row_bytes: int) -> ValueError:
    """Return the error of a row of `size` bytes."""
    return ValueError(f"a row of {size} bytes is larger than data.max_row_bytes = {max_row_bytes}; raise it")


class _DuplicateKey(ValueError):
    pass


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; bytes must be UTF-8. NaN and Infinity are floats, as Python writes them."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{text[error.start]:02x}") from None
    try:
        return _DECODER.decode(text)
    except _DuplicateKey:
        raise
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except ValueError as error:  # an integer of too many digits
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _DuplicateKey(f"an object has the key {shown(twice)} twice")
    return values


# Made once: json.loads would make one for every row.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError "`where` ..." for a value that cannot be written as JSON in UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} contains half a surrogate pair, \\u{ord(value[error.start]):04x}") from None
    elif isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise ValueError(f"{where} is nested too deeply: more than {MAX_DEPTH} levels")
        for item in value:
            check_json(item, where, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                check_json(item, where, depth + 1)
    elif isinstance(value, ValueError):
        # The place of an Arrow cell that Python cannot hold (data/arrow.py).
        raise ValueError(f"{where}: {value}")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where} contains {shown(value)}, which is not text, a number, a list or an object")


def shown(value: Any, limit: int = 40) -> str:
    """Return a value for a message: short, on one line, ASCII."""
    if isinstance(value, ValueError):
        return str(value)
    try:
        text = json.dumps(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    except (TypeError, ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
