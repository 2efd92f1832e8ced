"""A JSON file that is one array -> the text of its elements, by streaming.

Owns the walk over an array in memory of one element and one block, whatever the file's size.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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
