"""Files of conversations -> rows: where each row lies in its file, and what it must look like.

Owns the `messages` JSONL format: one JSON object a line with a `messages` list of {"role", "content"}, optionally a
`source` string that names the row's origin in summaries; other keys of the row are not read, other keys of a message
go to the chat template. Blank lines are skipped. Every defect is a ValueError that begins with file:line.
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One conversation. source: its own `source`, else the name of its file without the suffix."""

    messages: list[dict[str, Any]]
    source: str
    file: Path
    line: int


@dataclass(frozen=True)
class RowIndex:
    """Where the rows of one file are: int64 [R] byte offset, byte length and line number (from 1) of each."""

    file: Path
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lines: NDArray[np.int64]

    def take(self, rows: slice | NDArray[np.int64]) -> RowIndex:
        """The index of some of the rows."""
        return RowIndex(self.file, self.starts[rows], self.sizes[rows], self.lines[rows])

    def __len__(self) -> int:
        return len(self.starts)


def check_files(files: Sequence[str | Path], key: str) -> list[Path]:
    """`files` as paths; ValueError names `key` where there are none or one does not exist."""
    if not files:
        raise ValueError(f"{key} is empty: name at least one JSONL file")
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"{key}: no such file: {file}")
    return [Path(file) for file in files]


def index_rows(file: Path) -> RowIndex:
    """Where the rows of `file` are, found in one pass and without parsing; ValueError where it has none."""
    starts, sizes, lines = array("q"), array("q"), array("q")
    position = 0
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.isspace():
                starts.append(position)
                sizes.append(len(raw))
                lines.append(number)
            position += len(raw)
    if not starts:
        raise ValueError(f"{file}:1: the file has no rows: expected one JSON object a line")
    return RowIndex(file, *(np.array(values, dtype=np.int64) for values in (starts, sizes, lines)))


def read_rows(index: RowIndex) -> Iterator[Row]:
    """The rows of `index` in its order; ValueError for the first malformed one."""
    with index.file.open("rb") as stream:
        for start, size, line in zip(index.starts, index.sizes, index.lines, strict=True):
            stream.seek(int(start))
            yield parse_row(stream.read(int(size)), index.file, int(line))


def parse_row(raw: bytes, file: Path, line: int) -> Row:
    """The row that the bytes of one line hold; ValueError "file:line: what is wrong" for anything else."""
    try:
        values = _load_json(raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw)
        if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
            raise ValueError("no `messages` list: expected an object with `messages`, a list of {role, content}")
        for number, message in enumerate(values["messages"], start=1):
            _check_message(message, number)
        source = values.get("source")
        if source is None:
            source = file.stem
        if not isinstance(source, str):
            raise ValueError(f"source is {_shown(source)}, not a string")
        _check_text(source, "source")
    except RecursionError:
        raise ValueError(f"{file}:{line}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file}:{line}: {error}") from None
    return Row(values["messages"], source, file, line)


def _load_json(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line is 0x{raw[error.start]:02x}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1} of the line") from None
    except ValueError as error:  # an integer of too many digits
        raise ValueError(f"not JSON: {error}") from None


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {_shown(message)}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise ValueError(f"message {number} has the unknown role {_shown(role)}: expected one of {known}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"message {number} ({role}): content is {_shown(message.get('content'))}, not a string")
    _check_text(message, f"message {number} ({role})")


def _check_text(value: Any, where: str) -> None:
    """Raise ValueError where a string of a JSON value is not text that can be encoded."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds half a surrogate pair, \\u{ord(value[error.start]):04x}") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, where)
            _check_text(item, where)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, where)


def _shown(value: Any, limit: int = 40) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "..."
