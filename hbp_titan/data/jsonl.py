"""JSON lines files: where each row lies, and its value.

Owns the line rules: a row is a line that is not blank; lines end in \\n or \\r\\n; a byte order mark before the first
is no part of it. The scan holds one block in memory, however long a line is, and parses nothing.

A JSON file that is one array -> the text of its elements, by streaming.

Owns the walk over an array in memory of one element and one block, whatever the file's size.

JSON of unknown origin -> values, with every fault a ValueError of one short line.

Owns what is refused: bytes that are not UTF-8, the same key twice in an object (which value was meant is unknown), and,
where text is used, half surrogates, values that JSON has not, and nesting of more than MAX_DEPTH levels.
"""

from __future__ import annotations

import codecs
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

# Far above any tool's schema, far below Python's recursion limit, which templates share.
MAX_DEPTH = 64


class _DuplicateKey(ValueError):
    pass


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; bytes must be UTF-8. NaN and Infinity are floats, as Python writes them."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start + 1} is 0x{text[error.start]:02x}") from None
    try:
        return json.loads(text, object_pairs_hook=_object)
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


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError, which begins with `where`, for what cannot be written as JSON in UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds half a surrogate pair, \\u{ord(value[error.start]):04x}") from None
    elif isinstance(value, (dict, list)):
        if depth == MAX_DEPTH:
            raise ValueError(f"{where} is nested too deeply: more than {MAX_DEPTH} levels")
        for item in value:
            check_json(item, where, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                check_json(item, where, depth + 1)
    elif isinstance(value, ValueError):
        raise ValueError(f"{where}: {value}")
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where} holds {shown(value)}, which is not text, a number, a list or an object")


def shown(value: Any, limit: int = 40) -> str:
    """A value as a message shows it: short, on one line, ASCII."""
    if isinstance(value, ValueError):
        return str(value)
    try:
        text = json.dumps(value[: 2 * limit] if isinstance(value, (str, list)) else value)
    except (TypeError, ValueError, RecursionError):
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."


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


_BLOCK_CHARACTERS = 1 << 20
# More text than this without an end is no row.
_MAX_ELEMENT_CHARACTERS = 1 << 27
_WHITESPACE = " \t\r\n"


def is_array(file: Path) -> bool:
    """Whether the first character of the text is an opening bracket."""
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def write_elements(file: Path, target: Path, name: Path) -> None:
    """Each element of the array on a line of its own: JSON lines.

    name: the file's name in messages. Raises ValueError "name:number: ..." for the element at which the array breaks.
    """
    number = 1
    with file.open("rb") as stream, target.open("w", encoding="utf-8", newline="\n") as out:
        try:
            for element in _Array(stream).elements():
                # A line end of JSON stands between its tokens only: in text it is written \n.
                out.write(element.replace("\n", " ").replace("\r", " ") + "\n")
                number += 1
        except UnicodeDecodeError as error:
            fault = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
            raise ValueError(f"{name}:{number}: the JSON array breaks at this element or soon after: {fault}") from None
        except ValueError as error:
            raise ValueError(f"{name}:{number}: the JSON array breaks at this element: {error}") from None


class _Array:
    """The text of a file from the element that is read on: `buffer` from `position`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self.decoder = json.JSONDecoder()
        self.buffer, self.position = "", 0

    def elements(self) -> Iterator[str]:
        """The text of each element as the file writes it."""
        self._next()
        self.position += 1
        if self._next() == "]":
            return
        while True:
            yield self._element()
            separator = self._next()
            if separator not in (",", "]"):
                raise ValueError("a comma or the end of the array is missing after the one before")
            if separator == "]":
                return
            self.position += 1

    def _next(self) -> str:
        """The next character that is no whitespace; "" at the end of the file."""
        while True:
            rest = self.buffer[self.position : self.position + 256]
            if stripped := rest.lstrip(_WHITESPACE):
                self.position += len(rest) - len(stripped)
                return stripped[0]
            self.position += len(rest)
            if self.position == len(self.buffer) and not self._read_more():
                return ""

    def _element(self) -> str:
        """The text of the element that comes next; its bounds are those that the JSON parser finds."""
        start = self._next()
        if start != "{":
            raise ValueError(f"it begins with {start!a}: expected an object" if start else "the array has no end")
        while True:
            try:
                _, end = self.decoder.raw_decode(self.buffer, self.position)
                break
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except ValueError as error:
                # Perhaps the block ends in the middle of the element.
                if len(self.buffer) - self.position > _MAX_ELEMENT_CHARACTERS or not self._read_more():
                    raise ValueError(getattr(error, "msg", str(error))) from None
        element, self.position = self.buffer[self.position : end], end
        return element

    def _read_more(self) -> bool:
        """Whether there was more text; as much again, so that a long element is not parsed again for each block."""
        rest = self.buffer[self.position :]
        more = self.text.read(max(_BLOCK_CHARACTERS, len(rest)))
        self.buffer, self.position = rest + more, 0
        return bool(more)
