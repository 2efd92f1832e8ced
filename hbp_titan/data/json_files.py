"""JSON files that are not lines: arrays, objects around a list of rows, one object over several lines.

Owns the question which of these a file is, by its first bytes, and the places of the rows: in an array, alone or as the
one list of rows in an object ({"data": [...]}), a row is an element; an object over several lines is the only row.
Arrays are scanned a block at a time, without parsing. Errors inside a row are left to `jsonl.read_lines`.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.jsonl import BLOCK_BYTES, Rows, index_lines, shown

# Enough for the first lines of most files.
_HEAD_BYTES = 1 << 20
# Of an object that spans lines, or of one that holds a list of rows up to its first row.
_OBJECT_BYTES = 1 << 26
# Columns of the formats: an object that has one is a row.
_ROW_COLUMNS = frozenset(
    ("messages", "conversations", "instruction", "output", "prompt", "completion", "chosen", "rejected")
)
_QUOTE, _BACKSLASH = b'"\\'
_WHITESPACE = b" \t\r\n"
# What each byte outside of strings adds to the nesting depth.
_DEPTH = np.zeros(256, np.int64)
_DEPTH[list(b"{[")], _DEPTH[list(b"}]")] = 1, -1
_IS_STRUCTURE = bytes(byte in b'"\\{}[]' for byte in range(256))


def index_json(file: Path, name: Path, lines: bool) -> Rows:
    """Return where the rows of a JSON file of any kind are.

    name: the file's name in messages. lines: whether the name promises JSON lines, as .jsonl does: then a file is
    something else only if its first line cannot be a row.
    Raises ValueError "name:number: ..." for an array or an object that is broken between its rows.
    """
    for size in (_HEAD_BYTES, _OBJECT_BYTES):
        head = _read_head(file, size)
        text = head.removeprefix(codecs.BOM_UTF8).lstrip()
        first_line, newline, rest = text.partition(b"\n")
        # A longer first line is a row, or all rows in an array or object.
        if newline or len(head) < size or lines:
            break
    is_unfinished = bool(newline) and _is_unfinished(first_line)
    is_alone = len(head) < size and not rest.strip()
    start = len(head) - len(text)
    if text.startswith(b"[") and (not lines or is_unfinished or is_alone):
        return _scan_array(file, name, start)[:3]
    # A single line of a .json file may be an object that holds all rows; of a .jsonl file, it is a row.
    if not text.startswith(b"{") or not (is_unfinished or (not lines and not rest.strip())):
        return index_lines(file)
    if is_unfinished:
        head = _read_head(file, _OBJECT_BYTES)
    if (places := _index_wrapped(file, name, head, start)) is not None:
        return places
    return _index_object(file, name, head, start) if is_unfinished else index_lines(file)


def _read_head(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


def _is_unfinished(line: bytes) -> bool:
    """Return whether a line is the beginning of JSON that goes on in the next line."""
    text = line.decode("utf-8", errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _index_object(file: Path, name: Path, head: bytes, start: int) -> Rows:
    """Return the one row of a file with one object over several lines."""
    text = head[start:].decode("utf-8", errors="replace")
    line = 1 + head[:start].count(b"\n")
    if file.stat().st_size > len(head):
        raise ValueError(f"{name}:{line}: an object of more than {len(head)} bytes; write one object per line")
    try:
        json.loads(text)
    except RecursionError:
        pass  # An error of the row.
    except ValueError as error:
        following = [part for part in text.split("\n")[1:] if part.strip()]
        if following and all(part.lstrip().startswith("{") for part in following):
            return index_lines(file)  # JSON lines, the first of which is cut.
        raise ValueError(
            f"{name}:{line + getattr(error, 'lineno', 1) - 1}: not JSON: {getattr(error, 'msg', error)}; "
            "a file has one object per line, one array or one object"
        ) from None
    return np.array([start]), np.array([len(head) - start]), np.array([line])


def _index_wrapped(file: Path, name: Path, head: bytes, start: int) -> Rows | None:
    """Return the elements of the list of rows in an object, as {"data": [...]}; None if the object is a row itself."""
    text = head[start:].decode("utf-8", errors="replace")
    found = _first_list(text)
    if found is None:
        return None
    key, position = found
    # Counted in bytes: replaced ones are as long as their replacement only by chance.
    offset = start + len(text[:position].encode("utf-8", errors="replace"))
    if not head.startswith(b"[", offset):
        return None
    *places, end = _scan_array(file, name, offset, wrapped=True)
    with file.open("rb") as stream:
        stream.seek(end)
        rest = stream.read().decode("utf-8", errors="replace")
    try:
        others = json.loads('{"":0' + rest)
    except (ValueError, RecursionError):
        raise ValueError(f"{name}:{len(places[0]) + 1}: the object breaks after its list {shown(key)}") from None
    if others.keys() & _ROW_COLUMNS:
        return None
    if second := next((other for other, value in others.items() if _is_rows(other, value)), None):
        raise ValueError(f"{name}:1: has two lists of rows, {shown(key)} and {shown(second)}; write a file of each")
    return places[0], places[1], places[2]


def _first_list(text: str) -> tuple[str, int] | None:
    """Return key and position of the first list of rows in the object that a text begins with; None if it is a row."""
    decoder, empty = json.JSONDecoder(), None
    try:
        position = _next(text, 1)
        while text[position] == '"':
            key, position = decoder.raw_decode(text, position)
            position = _next(text, position)
            if text[position] == "[":
                inner = _next(text, position + 1)
                if text[inner] == "]":
                    empty = empty or (key, position)
                # The first row alone: all of them may be more than the text has.
                elif _is_rows(key, [decoder.raw_decode(text, inner)[0]]):
                    return key, position
            if key in _ROW_COLUMNS:
                return None
            position = _next(text, decoder.raw_decode(text, position)[1])
    except (ValueError, IndexError, RecursionError):
        return None
    return empty


def _next(text: str, position: int) -> int:
    """Return the position of the next key or value."""
    while text[position] in " \t\r\n,:":
        position += 1
    return position


def _is_rows(key: str, values: Any) -> bool:
    """Return whether the value of a key is a list of rows: objects, but not the messages of one row."""
    if not isinstance(values, list) or not values or not isinstance(values[0], dict):
        return False
    keys = values[0].keys()
    if keys & {"role", "from"}:
        return False
    return key not in _ROW_COLUMNS or any(
        isinstance(values[0].get(name), list) for name in ("messages", "conversations")
    )


def _scan_array(
    file: Path, name: Path, offset: int, wrapped: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Return the rows of the array at `offset`, and the offset of its end; wrapped: whether other text may follow it.

    Raises ValueError "name:number: ..." unless it has only objects, commas between them, and an end.
    """
    with file.open("rb") as stream:
        stream.seek(offset)
        scan = _ArrayScan(offset, wrapped)
        while not (scan.error or (wrapped and scan.ended)) and (block := stream.read(BLOCK_BYTES)):
            scan.add(block)
    if scan.error or not scan.ended:
        number, error = scan.error or (scan.count + 1, "the array has no end")
        raise ValueError(f"{name}:{number}: the JSON array breaks at this element: {error}")
    starts, ends = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (scan.starts, scan.ends))
    return starts, ends - starts, np.arange(1, len(starts) + 1), scan.end


class _ArrayScan:
    """Finds the elements of an array by quotes and brackets, one vectorized block at a time.

    A parser would find them as well, but takes twice as long, in one process, and its values cannot be kept for the
    processes that tokenize the rows.

    offset: of the array. wrapped: whether other text may follow it. starts, ends: byte offsets of the elements, one
    array per block. end: byte offset of the array's end. count: elements that have ended. error: number of the element
    at which the array is broken, and why.
    """

    def __init__(self, offset: int, wrapped: bool) -> None:
        self.starts: list[NDArray[np.int64]] = []
        self.ends: list[NDArray[np.int64]] = []
        self.count = self.end = 0
        self.ended = False
        self.error: tuple[int, str] | None = None
        # Bytes between "[" and "]" but outside the elements, without whitespace; an element counts as its "{".
        self._outside = 0
        self._offset, self._depth, self._wrapped = offset, 0, wrapped
        self._in_string = self._escaping = self._opened = False

    def add(self, block: bytes) -> None:
        """Scan the next block of the file."""
        if self.ended:
            self._check_end(block)
            return
        data = np.frombuffer(block, np.uint8)
        # translate, not an index by `data`, which is five times as slow.
        places = np.flatnonzero(np.frombuffer(block.translate(_IS_STRUCTURE), np.bool_))
        places = places[~self._escaped(data, places)[places]]
        # A quote begins or ends a string, inside of which brackets do not count.
        quotes = data[places] == _QUOTE
        in_string = np.logical_xor.accumulate(quotes) ^ self._in_string
        self._in_string = bool(in_string[-1]) if len(places) else self._in_string
        places = places[~(in_string | quotes)]
        change = _DEPTH[data[places]]
        depth = np.cumsum(change) + self._depth
        last = np.flatnonzero((change < 0) & (depth == 0))[:1].tolist()
        self.ended = bool(last)
        if last:
            places, change, depth = (values[: last[0] + 1] for values in (places, change, depth))
        starts = places[(change > 0) & (depth == 2)]
        ends = places[(change < 0) & (depth == 1)] + 1
        begins = ends.tolist() if self._depth > 1 else [0, *ends.tolist()]
        stops = [*(starts + 1).tolist(), int(places[-1]) if last else len(block)]
        # Not strict: the last stop is unused if the block ends inside an element.
        outside = b"".join(block[begin:stop] for begin, stop in zip(begins, stops, strict=False))
        self._check_outside(outside.translate(None, _WHITESPACE))
        # Counting brackets of both kinds together must not make a row of half an element, or end the array early.
        mismatched = np.flatnonzero(data[ends - 1] != ord("}")).tolist()
        if mismatched or (last and block[places[-1]] != ord("]")):
            number = self.count + (mismatched[0] if mismatched else len(ends)) + 1
            self.error = self.error or (number, "its brackets do not match")
        self.starts.append(starts + self._offset)
        self.ends.append(ends + self._offset)
        self.count += len(ends)
        self.end = self._offset + int(places[-1]) + 1 if last else 0
        self._offset += len(block)
        self._depth = int(depth[-1]) if len(places) else self._depth
        if last and self._outside and self._outside % 2 == 0:
            self.error = self.error or (self.count + 1, "expected an object after the comma")
        if last and not self._wrapped:
            self._check_end(block[int(places[-1]) + 1 :])

    def _escaped(self, data: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each byte of the block whether a backslash escapes it."""
        escaped = np.zeros(len(data) + 1, np.bool_)
        escaped[0] = self._escaping
        slashes = places[data[places] == _BACKSLASH]
        if len(slashes):
            run_start = np.where(np.diff(slashes, prepend=-2) != 1, slashes, -1)
            if self._escaping and slashes[0] == 0:
                run_start[0] = 1  # this one is escaped by the block before, so the run begins with the next
            run_start = np.maximum.accumulate(run_start)
            # In a run of backslashes the first, third, ... escape what follows.
            escaped[slashes[(slashes - run_start) % 2 == 0] + 1] = True
        self._escaping = bool(escaped[-1])
        return escaped[:-1]

    def _check_outside(self, outside: bytes) -> None:
        """Compare the next bytes outside the elements with the opening bracket, then "{" and "," in turn."""
        if outside and not self._opened:
            self._opened, outside = True, outside[1:]
        expected = (b"{," * (len(outside) // 2 + 1) + b"{")[self._outside % 2 :][: len(outside)]
        if outside != expected:
            at = next(i for i, byte in enumerate(outside) if expected[i : i + 1] != bytes([byte]))
            what = ("an object", "a comma")[(self._outside + at) % 2]
            self.error = ((self._outside + at + 1) // 2 + 1, f"expected {what}, found {chr(outside[at])!a}")
        self._outside += len(outside)

    def _check_end(self, block: bytes) -> None:
        if block.strip(_WHITESPACE):
            self.error = self.error or (self.count + 1, "text follows the end of the array")
