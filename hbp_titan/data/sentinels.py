"""Sentinels around the parts of a conversation: where its template writes each part, and which parts it leaves out.

    {"role": "user", "content": " Hi"}  ->  " [0Hi0]"       [0 and 0] stand for characters of the private use plane

Owns what the parts of a conversation are (content, reasoning, function names, arguments, tools), how they are marked so
that a template treats the marked text like the plain one, and how the rendered text is read. Marks lie inside the
blanks at the ends of a text, because templates trim, and never touch what the template itself compares texts with, such
as "</think>". The caller renders the plain conversation too: only if the texts are equal do the marks prove anything.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from hbp_titan.data.chat_template import REASONING_FIELDS, Message

Tools = Sequence[dict[str, Any]] | None
Span = tuple[int, int]

CONTENT, REASONING, CALL, TOOLS = "content", "reasoning", "call", "tools"
# Tags that end a reasoning inside of a content.
REASONING_END = re.compile(r"</think>|</thinking>|</reasoning>|\[/THINK\]", re.IGNORECASE)

_PLANE, _PLANE_END = 0x100000, 0x10FFFE
_BASE, _WIDTH = 64, 4


class Part(NamedTuple):
    """A part of a conversation. message: its index, None for the tools. field: CONTENT, REASONING, CALL or TOOLS."""

    message: int | None
    field: str
    name: str = ""

    def __str__(self) -> str:
        where = "" if self.message is None else f" of message {self.message + 1}"
        return {
            CONTENT: f"the content{where}",
            REASONING: f"the reasoning{where}",
            CALL: f"the call of {self.name}{where}",
            TOOLS: f"the tools ({self.name})",
        }[self.field]


class Alphabet:
    """Characters that no text of a conversation contains.

    escape: makes a control token in a message plain text. block: opens and closes a generation block.
    """

    def __init__(self, start: int) -> None:
        self.escape, *block, self._open, self._close = map(chr, range(start, start + 5))
        self.block = (block[0], block[1])
        self._digits = [chr(start + 5 + digit) for digit in range(_BASE)]
        self._value = {character: digit for digit, character in enumerate(self._digits)}
        kinds = f"[{self._open}{self._close}][{self._digits[0]}-{self._digits[-1]}]{{{_WIDTH}}}"
        self.pattern = re.compile(f"{kinds}|[{self.escape}{block[0]}{block[1]}]")

    def mark(self, number: int) -> tuple[str, str]:
        """Return the opening and the closing mark of a number below 16 million."""
        digits = "".join(self._digits[number >> shift & 63] for shift in (18, 12, 6, 0))
        return self._open + digits, self._close + digits

    def read(self, mark: str) -> tuple[bool, int]:
        """Return whether `mark` is an opening one, and its number."""
        number = 0
        for digit in mark[1:]:
            number = number << 6 | self._value[digit]
        return mark[0] == self._open, number


_SIZE = 5 + _BASE
_alphabet = functools.lru_cache(maxsize=8)(Alphabet)
_PRIVATE = re.compile(f"[{chr(_PLANE)}-{chr(0x10FFFF)}]")


def unused_alphabet(text: str) -> Alphabet:
    """Return an alphabet that the text does not use; raises ValueError if it uses the whole private use plane."""
    used = set() if text.isascii() else {ord(character) for character in _PRIVATE.findall(text)}
    for start in range(_PLANE, _PLANE_END - _SIZE, _SIZE):
        if not used.intersection(range(start, start + _SIZE)):
            return _alphabet(start)
    raise ValueError("the conversation uses every character of the private use plane U+100000, which marks need")


class Rendering(NamedTuple):
    """A rendered text, read.

    text: without marks; escaped: with escape characters only. opened, closed: places in `text` of each mark.
    blocks: the non-empty generation blocks. unbalanced: whether the template cuts blocks apart.
    """

    text: str
    escaped: str
    opened: dict[int, list[int]]
    closed: dict[int, list[int]]
    blocks: list[Span]
    unbalanced: bool


def read_rendering(rendered: str, alphabet: Alphabet) -> Rendering:
    """Remove the marks from a rendered text and return where they were."""
    pieces: list[str] = []
    escapes: list[int] = []
    opened: dict[int, list[int]] = defaultdict(list)
    closed: dict[int, list[int]] = defaultdict(list)
    blocks, starts, unbalanced = [], [], False
    position = length = 0
    for match in alphabet.pattern.finditer(rendered):
        pieces.append(rendered[position : match.start()])
        length += match.start() - position
        position = match.end()
        mark = match[0]
        if mark == alphabet.escape:
            escapes.append(len(pieces))
        elif mark == alphabet.block[0]:
            starts.append(length)
        elif mark == alphabet.block[1]:
            # Blocks may be nested: each end belongs to the block that was opened last.
            unbalanced = unbalanced or not starts
            if starts:
                blocks.append((starts.pop(), length))
        else:
            is_open, number = alphabet.read(mark)
            (opened if is_open else closed)[number].append(length)
    pieces.append(rendered[position:])
    text = "".join(pieces)
    # Few messages spell a control token.
    for place in escapes:
        pieces[place] = alphabet.escape + pieces[place]
    escaped = "".join(pieces) if escapes else text
    blocks = [(start, end) for start, end in blocks if start < end]
    return Rendering(text, escaped, opened, closed, blocks, unbalanced or bool(starts))


class Marker:
    """Copies a conversation with a mark on each part.

    protected: matches texts inside of which, and at the ends of which, a mark could change what the template does.
    control: matches the control tokens, which get the escape character.
    parts: the part of each mark's number.
    """

    def __init__(self, alphabet: Alphabet, protected: re.Pattern[str], control: re.Pattern[str]) -> None:
        self.alphabet = alphabet
        self._protected, self._control = protected, control
        self.parts: list[Part] = []
        self._atoms: set[int] = set()

    def conversation(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Message], list[Any] | None]:
        """Return marked copies."""
        return [self._message(message, index) for index, message in enumerate(messages)], self._tools(tools)

    def escape(self, value: Any) -> Any:
        """Return the JSON value with control tokens escaped, without marks."""
        return map_strings(value, self._protect)

    def lost(self, rendering: Rendering) -> list[Part]:
        """Return the parts that are missing from a rendered text."""
        count = len(self.parts)
        if len(rendering.closed) == count == len(rendering.opened) + len(self._atoms):
            return []
        missing = set(range(len(self.parts))) - rendering.closed.keys()
        missing |= set(range(len(self.parts))) - rendering.opened.keys() - self._atoms
        return [self.parts[number] for number in sorted(missing)]

    def _message(self, message: Message, index: int) -> Message:
        marked: Message = {}
        reasoning: str | None = None
        for key, value in message.items():
            if key == "content" and isinstance(value, str):
                marked[key] = self._content(value, index, message["role"])
            elif key in REASONING_FIELDS and isinstance(value, str):
                # Several names of one text: any of them may be rendered.
                reasoning = reasoning or self._text(value, lambda _: Part(index, REASONING))
                marked[key] = reasoning
            elif key == "tool_calls" and isinstance(value, list):
                marked[key] = [self._call(call, index) for call in value]
            else:
                marked[key] = value if key == "role" else self.escape(value)
        return marked

    def _content(self, text: str, index: int, role: str) -> str:
        ends = [match.end() for match in REASONING_END.finditer(text)] if role == "assistant" else []
        reasoned = ends[-1] if ends else 0
        return self._text(text, lambda end: Part(index, REASONING if end <= reasoned else CONTENT))

    def _call(self, call: Any, index: int) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return self.escape(call)
        name = function["name"]
        marked = {}
        for key, value in function.items():
            if key == "name":
                marked[key] = self._atom(value, Part(index, CALL, repr(name)))
            elif key == "arguments":
                marked[key] = self._argument(value, Part(index, CALL, repr(name)))
            else:
                marked[key] = self.escape(value)
        return marked if function is call else {**self.escape({**call, "function": None}), "function": marked}

    def _argument(self, value: Any, part: Part) -> Any:
        if isinstance(value, str):
            return self._text(value, lambda _: part)
        if isinstance(value, dict):
            # Keys have no opening mark, so that they sort as before.
            named = {key: part._replace(name=f"{part.name} with {key!r}") if " " not in part.name else part
                     for key in value}  # fmt: skip
            return {self._atom(key, named[key]): self._argument(item, named[key]) for key, item in value.items()}
        if isinstance(value, list):
            return [self._argument(item, part) for item in value]
        return self._leaf(value, part)

    def _tools(self, tools: Tools) -> list[Any] | None:
        return None if tools is None else [self._tool(tool) for tool in tools]

    def _tool(self, tool: Any) -> Any:
        """Mark a function's name, description and the names of its parameters, wherever the schema spells them."""
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return self.escape(tool)
        part = Part(None, TOOLS, repr(function["name"]))
        marked = self.escape(function)
        marked["name"] = self._atom(function["name"], part)
        if isinstance(function.get("description"), str):
            marked["description"] = self._text(function["description"], lambda _: part)
        parameters = marked.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            names = {name: self._atom(name, part) for name in parameters["properties"]}
            marked["parameters"] = {
                **parameters,
                "properties": {names[name]: value for name, value in parameters["properties"].items()},
            }
            if isinstance(parameters.get("required"), list):
                # A template may ask whether a name is required: it must find the marked one.
                required = [names.get(name, name) if isinstance(name, str) else name for name in parameters["required"]]
                marked["parameters"]["required"] = required
        return marked if function is tool else {**self.escape({**tool, "function": None}), "function": marked}

    def _text(self, text: str, part_at: Callable[[int], Part]) -> str:
        """Mark each stretch of text between two protected ones; part_at(end): the part of the stretch up to `end`."""
        pieces, position, count = [], 0, len(self.parts)
        for match in self._protected.finditer(text):
            pieces += [self._stretch(text[position : match.start()], part_at(match.start())), self._protect(match[0])]
            position = match.end()
        pieces.append(self._stretch(text[position:], part_at(len(text))))
        if count == len(self.parts) and text.strip():
            # Protected texts alone: better a mark that changes what the template does than no mark.
            return self._enclose(text, part_at(len(text)))
        return "".join(pieces)

    def _stretch(self, text: str, part: Part) -> str:
        return self._enclose(text, part) if text and not text.isspace() else text

    def _enclose(self, text: str, part: Part) -> str:
        core = text.strip()
        start = text.index(core)
        opening, closing = self.alphabet.mark(self._add(part))
        return f"{text[:start]}{opening}{self._protect(core)}{closing}{text[start + len(core) :]}"

    def _atom(self, text: str, part: Part) -> str:
        """Mark a name or key: behind it only."""
        if not text or text.isspace():
            return text
        number = self._add(part)
        self._atoms.add(number)
        return self._protect(text) + self.alphabet.mark(number)[1]

    def _leaf(self, value: Any, part: Part) -> Any:
        """Return a number, boolean or null: a mark would make it a text."""
        return value

    def _add(self, part: Part) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    def _protect(self, text: str) -> str:
        return self._control.sub(self._escaped, text)

    def _escaped(self, match: re.Match[str]) -> str:
        return match[0][0] + self.alphabet.escape + match[0][1:]


class Substituter(Marker):
    """Copies a conversation with a short word or number in the place of each part.

    For templates that treat marked texts differently (by their length, say), and for values that cannot be marked.
    """

    def missing(self, text: str) -> list[Part]:
        """Return the parts that are missing from the text of a substituted conversation."""
        found = {int(word or number) for word, number in _SUBSTITUTE.findall(text)}
        return [part for number, part in enumerate(self.parts) if number not in found]

    def _enclose(self, text: str, part: Part) -> str:
        core = text.strip()
        return text.replace(core, f"zq{self._add(part)}z", 1)

    def _atom(self, text: str, part: Part) -> str:
        return f"zq{self._add(part)}z" if text and not text.isspace() else text

    def _leaf(self, value: Any, part: Part) -> Any:
        # A null may be left out.
        return value if value is None else _LEAF + self._add(part)


_LEAF = 7_000_000_000
_SUBSTITUTE = re.compile(r"zq(\d+)z|70{0,9}(\d+)")


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """Return the JSON value with `function` applied to every string in it, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    return value
