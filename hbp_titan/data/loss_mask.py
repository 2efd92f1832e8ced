"""Where the assistant turns lie in a rendered conversation, and whether all of the conversation is in it.

Owns the rule of what is trained: the text of an assistant turn with its end token. The template's `{% generation %}`
blocks mark where it begins and ends; without them, the conversation is rendered turn by turn. A turn whose place is not
certain is an error, never a guess, and so is a part of a message that the template leaves out (data/sentinels.py).
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from hbp_titan.data.chat_template import ChatTemplate, Message
from hbp_titan.data.files import READY_TEMPLATES
from hbp_titan.data.sentinels import (
    CALL,
    REASONING,
    Alphabet,
    Marker,
    Part,
    Rendering,
    Span,
    Substituter,
    Tools,
    read_rendering,
    unused_alphabet,
)

_CUT_BLOCKS = (
    "the chat template cuts its {% generation %} blocks apart, so the loss mask is unknown; put each around a whole "
    "answer"
)
_USE_BLOCKS = (
    f"so the loss mask is unknown; set data.chat_template to a ready template ({', '.join(READY_TEMPLATES)}) or to "
    "your own with {% generation %} blocks"
)
# Places of turns are remembered by the text around them; templates that write random ids there never repeat it.
_MAX_REMEMBERED = 4096


class LostPartError(ValueError):
    """Parts of the conversation that the template leaves out, or of a trained turn that it writes outside of that.

    parts: all of them; the message names the first.
    """

    def __init__(self, template: str, parts: list[Part], outside: bool = False) -> None:
        self.parts = parts
        where = "writes outside of the trained turn" if outside else "leaves out"
        fix = "use a template that renders it" + (" inside the {% generation %} block" if outside else "")
        if parts[0].field == REASONING:
            fix += ', or set data.reasoning to "split" or "drop"'
        super().__init__(f"the chat template {template} {where} {parts[0]}; {fix}")


class Located(NamedTuple):
    """A rendered conversation.

    text: as rendered; escaped: the same with the escape character in control tokens that messages spell.
    turns: for each located turn the spans that the model writes. questions: where each user message's text begins.
    headers: whether each turn begins before the end of its prompt, so that its header would be trained.
    """

    text: str
    escaped: str
    escape: str
    turns: list[list[Span]]
    questions: list[int]
    headers: list[bool]


@dataclass
class _Row:
    """One conversation. anchors: first and last place of each message's marks, None where that is not certain."""

    messages: Sequence[Message]
    tools: Tools
    variables: Mapping[str, Any] | None
    template: ChatTemplate
    text: str
    blocks: list[Span] = field(default_factory=list)
    anchors: list[Span | None] = field(default_factory=list)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self.template.render(messages, self.tools, add_generation_prompt, variables=self.variables)

    @cached_property
    def assistants(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    @cached_property
    def _anchored(self) -> tuple[list[int], list[int], list[int]]:
        """The messages with anchors, the first and the last place of each; none if their order is not the text's."""
        known = [(index, *anchor) for index, anchor in enumerate(self.anchors) if anchor]
        if any(later[1] < earlier[2] for earlier, later in itertools.pairwise(known)):
            known = []
        return [k[0] for k in known], [k[1] for k in known], [k[2] for k in known]

    def owners(self, block: Span) -> list[int]:
        """Return the assistant messages that a block can belong to: those with marks in it, else the nearest; none for
        a block around a message of another role."""
        messages, first, last = self._anchored
        inside = messages[bisect_left(first, block[0]) : bisect_right(last, block[1])]
        owners = [index for index in inside if self.messages[index]["role"] == "assistant"]
        if owners:
            return owners
        earlier, later = bisect_right(first, block[0]), bisect_left(last, block[1])
        before = messages[earlier - 1] if earlier else 0
        after = messages[later] if later < len(messages) else len(self.messages) - 1
        return [] if inside else [k for k in range(before, after + 1) if self.messages[k]["role"] == "assistant"]


class TurnLocator:
    """Renders conversations and finds the turns in them. control_pattern: matches the tokens that can end a turn."""

    def __init__(self, template: ChatTemplate, control_pattern: re.Pattern[str]) -> None:
        self._template = template
        self._control_pattern = control_pattern
        protected = sorted({*template.literals}, key=len, reverse=True)
        self._protected = re.compile("|".join([*map(re.escape, protected), control_pattern.pattern]))
        # Offsets of a turn from its anchors, and whether its header is in it, by what surrounds it.
        self._places: dict[Any, tuple[int, int, bool]] = {}
        self._complete_shapes: set[str] = set()

    def locate(
        self,
        messages: Sequence[Message],
        tools: Tools,
        turns: Sequence[int],
        trained: set[int],
        variables: Mapping[str, Any] | None = None,
    ) -> Located:
        """Return the conversation's text and the places of `turns`, indices of assistant messages.

        trained: messages that are trained: only their reasoning must be in the text. Raises LostPartError if a part of
        the conversation is not in the text, or a part of a trained message not in its turn, and ValueError if the place
        of a turn is not certain.
        """
        text = self._template.render(messages, tools, variables=variables)
        row = _Row(messages, tools, variables, self._template, text)
        # Characters that only a message has which is not rendered cannot be taken for marks.
        alphabet = unused_alphabet(text)
        marker = Marker(alphabet, self._protected, self._control_pattern)
        rendering = self._rendering(row, *marker.conversation(messages, tools), alphabet)
        if rendering is not None and rendering.text == row.text:
            lost = marker.lost(rendering)
            row.anchors = _anchors(len(messages), marker, rendering)
            if not lost and _has_leaf([message.get("tool_calls") for message in messages]):
                lost = self._lost_leaves(row)
        else:
            # The marks changed what the template does.
            lost = self._substituted(row, alphabet)
            row.anchors = [None] * len(messages)
            rendering = self._rendering(row, marker.escape(messages), marker.escape(tools), alphabet)
            if rendering is None or rendering.text != row.text:
                raise ValueError("a message spells a control token and the chat template rewrites it; remove it")
        lost = [part for part in lost if part.field != REASONING or part.message in trained]
        if lost:
            raise LostPartError(self._template.name, lost)
        if turns and rendering.unbalanced:
            raise ValueError(_CUT_BLOCKS)
        row.blocks = rendering.blocks
        located = self._turns(row, turns)
        if outside := _outside(
            marker, rendering, trained.intersection(turns), [span for t in located for span in t[0]]
        ):
            raise LostPartError(self._template.name, outside, outside=True)
        questions = [
            anchor[0]
            for message, anchor in zip(messages, row.anchors, strict=True)
            if message["role"] == "user" and anchor
        ]
        return Located(
            row.text, rendering.escaped, alphabet.escape, [turn[0] for turn in located], questions,
            [turn[1] for turn in located],
        )  # fmt: skip

    def _rendering(
        self, row: _Row, messages: list[Message], tools: list[Any] | None, alphabet: Alphabet
    ) -> Rendering | None:
        """Render a marked copy of the conversation; None if the template rejects that."""
        try:
            text = self._template.render(messages, tools, sentinels=alphabet.block, variables=row.variables)
        except ValueError:
            return None
        return read_rendering(text, alphabet)

    def _substituted(self, row: _Row, alphabet: Alphabet) -> list[Part]:
        """Return the parts that the template leaves out of a conversation with other words in the same places."""
        substituter = Substituter(alphabet, self._protected, self._control_pattern)
        messages, tools = substituter.conversation(row.messages, row.tools)
        try:
            text = self._template.render(messages, tools, variables=row.variables)
        except ValueError as error:
            raise ValueError(f"it is not certain that the template renders the whole conversation: {error}") from None
        return substituter.missing(text)

    def _lost_leaves(self, row: _Row) -> list[Part]:
        """Return the numbers and booleans of calls that the template leaves out, tried once per shape of the calls."""
        shape = repr([row.variables or {}, *(_shape(message.get("tool_calls")) for message in row.messages)])
        if shape in self._complete_shapes:
            return []
        try:
            lost = [part for part in self._substituted(row, unused_alphabet("")) if part.field == CALL]
        except ValueError:
            # The template wants other values than ours, so the marks, which it took, must do.
            lost = []
        if not lost and len(self._complete_shapes) < _MAX_REMEMBERED:
            self._complete_shapes.add(shape)
        return lost

    def _turns(self, row: _Row, turns: Sequence[int]) -> list[tuple[list[Span], bool]]:
        """Return for each turn its spans, and whether its header is in them."""
        # Nothing to locate, so a template whose turns cannot be located is still usable.
        if not turns:
            return []
        if not self._template.has_generation_blocks:
            return [([self._turn_span(row, index)], False) for index in turns]
        blocks = self._blocks_of_turns(row, turns)
        return [(spans, self._has_header(row, index, spans[0][0])) for index, spans in blocks if spans]

    def _turn_span(self, row: _Row, index: int) -> Span:
        """Return the span of a turn: what its message adds to the prompt that a model would be asked to continue."""
        context, anchor = _context(row, index), row.anchors[index]
        if context is None or anchor is None:
            return self._rendered_span(row, index)
        # Renders per turn would make the time quadratic: a turn between the same texts begins and ends alike.
        if context not in self._places:
            start, end = self._rendered_span(row, index)
            self._remember(context, (anchor[0] - start, end - anchor[1], False))
        before, after, _ = self._places[context]
        return anchor[0] - before, anchor[1] + after

    def _has_header(self, row: _Row, index: int, start: int) -> bool:
        """Return whether a turn that begins at `start` begins inside of its prompt."""
        context, anchor = _context(row, index), row.anchors[index]
        if context is None or anchor is None:
            return False
        place = self._places.get(context)
        if place is None or place[0] != anchor[0] - start:
            prompt = self._prompt(row, index)
            header = prompt is not None and row.text.startswith(prompt) and start < len(prompt)
            place = (anchor[0] - start, 0, header)
            self._remember(context, place)
        return place[2]

    def _remember(self, context: Any, place: tuple[int, int, bool]) -> None:
        if len(self._places) >= _MAX_REMEMBERED:
            self._places.clear()
        self._places[context] = place

    def _prompt(self, row: _Row, index: int) -> str | None:
        try:
            return row.render(row.messages[:index], add_generation_prompt=True)
        except ValueError:
            return None

    def _rendered_span(self, row: _Row, index: int) -> Span:
        """Return the span of a turn, found by rendering the conversation up to it."""
        turn = f"message {index + 1} (assistant)"
        try:
            prompt = row.render(row.messages[:index], add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"{turn} has no prompt before it, so the loss mask is unknown: {error}") from None
        text = row.text
        answered = text if index + 1 == len(row.messages) else row.render(row.messages[: index + 1])
        if not answered.startswith(prompt):
            start = self._start_after_header(row, index, prompt)
            if start is None:
                raise ValueError(f"the chat template renders {turn} differently from its prompt, {_USE_BLOCKS}")
            prompt = text[:start]
        if not text.startswith(answered):
            answered = self._answered_earlier(row, index) or ""
        if not answered.startswith(prompt) or not text.startswith(answered):
            raise ValueError(
                f"the chat template changes {turn} when later messages follow, {_USE_BLOCKS} or train the last turn "
                "only"
            )
        return len(prompt), len(prompt) + self._length_with_end_token(answered[len(prompt) :])

    def _start_after_header(self, row: _Row, index: int, prompt: str) -> int | None:
        """Return where a turn begins whose prompt is not a beginning of the text; None if that is not certain.

        Some templates (Qwen3's) write a turn differently while it is the last: two answers in a row have such a prompt.
        The header that asks for an answer must be there once, between the message before and the turn's own text.
        """
        anchor, before = row.anchors[index], row.anchors[index - 1] if index else None
        if anchor is None or before is None or before[1] > anchor[0]:
            return None
        asked = row.render(row.messages[:index])
        header, between = prompt.removeprefix(asked), row.text[before[1] : anchor[0]]
        if not prompt.startswith(asked) or not header or between.count(header) != 1:
            return None
        return before[1] + between.index(header) + len(header)

    def _answered_earlier(self, row: _Row, index: int) -> str | None:
        """Return the text up to the end of a turn that is not the last; None if that is not certain.

        Some templates (Qwen3's) treat the last turn differently. A user turn is appended once and twice; what the
        second one adds is cut off the end of the first text. The rest must contain all that the assistant wrote.
        """
        following = {"role": "user", "content": "?"}
        try:
            once = row.render([*row.messages[: index + 1], following])
            twice = row.render([*row.messages[: index + 1], following, following])
        except ValueError:
            return None
        added = twice[len(once) :]
        if not added or not twice.startswith(once) or not once.endswith(added):
            return None
        answered = once[: -len(added)]
        # What the cut removed must not contain text of the assistant.
        before = row.render(row.messages[:index])
        texts = [row.messages[index].get(field) for field in ("content", "reasoning_content")]
        if any(isinstance(text, str) and text.strip() not in answered[len(before) :] for text in texts):
            return None
        return answered

    def _length_with_end_token(self, turn: str) -> int:
        """Return the length of `turn` up to its end token: no model generates what a template writes after that."""
        ends = [match.end() for match in self._control_pattern.finditer(turn)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else len(turn)

    def _blocks_of_turns(self, row: _Row, turns: Sequence[int]) -> list[tuple[int, list[Span]]]:
        """Return the generation blocks of `turns`; the template may give a message one, several or no block."""
        found: dict[int, list[Span]] = {index: [] for index in turns}
        shared: list[tuple[int, list[Span]]] = []
        wanted = set(turns)
        for block in row.blocks:
            owners = row.owners(block)
            if not owners:
                raise ValueError("the chat template puts {% generation %} blocks around messages of other roles")
            if len(owners) == 1:
                if owners[0] in wanted:
                    found[owners[0]].append(block)
            elif wanted.issuperset(owners):
                shared.append((owners[0], [block]))
            elif wanted.intersection(owners):
                return self._blocks_by_rendering(row, turns)
        return sorted([*found.items(), *shared], key=lambda turn: turn[1])

    def _blocks_by_rendering(self, row: _Row, turns: Sequence[int]) -> list[tuple[int, list[Span]]]:
        """Return the same by rendering the messages before each turn and before the next assistant turn."""
        found = []
        ends = dict(zip(row.assistants, [*row.assistants[1:], None], strict=True))
        for index in turns:
            places = []
            for boundary in (index, ends[index]):
                before = "" if boundary == 0 else row.text if boundary is None else row.render(row.messages[:boundary])
                if not row.text.startswith(before):
                    raise ValueError(
                        f"the chat template changes what precedes message {(boundary or 0) + 1} (assistant) when it "
                        "follows, so its {% generation %} blocks cannot be matched with the turns"
                    )
                places.append(len(before) if boundary is not None else len(row.text) + 1)
            found.append((index, [block for block in row.blocks if places[0] <= block[0] < places[1]]))
        return found


def _anchors(count: int, marker: Marker, rendering: Rendering) -> list[Span | None]:
    """Return the first and last place of the marks of each message; None without marks, or if one is written twice."""
    anchors: list[Span | None] = [None] * count
    repeated = set()
    for number, part in enumerate(marker.parts):
        if part.message is None:
            continue
        places = [*rendering.opened.get(number, ()), *rendering.closed.get(number, ())]
        if len(rendering.closed.get(number, ())) > 1:
            repeated.add(part.message)
        elif places:
            known = anchors[part.message] or (places[0], places[0])
            anchors[part.message] = min(known[0], *places), max(known[1], *places)
    for message in repeated:
        anchors[message] = None
    return anchors


def _outside(marker: Marker, rendering: Rendering, messages: set[int], spans: list[Span]) -> list[Part]:
    """Return the parts of `messages` whose marks are not in any of the spans."""
    spans = sorted(spans)
    starts = [start for start, _ in spans]

    def is_inside(place: int, is_end: bool) -> bool:
        """Whether the character before (`is_end`) or behind the place is in a span."""
        place -= is_end
        number = bisect_right(starts, place) - 1
        return number >= 0 and place < spans[number][1]

    return [
        part
        for number, part in enumerate(marker.parts)
        # Without a place the part was found by substitution, not by marks.
        if part.message in messages and number in rendering.closed
        if not any(is_inside(place, True) for place in rendering.closed[number])
        or not all(is_inside(place, False) for place in rendering.opened.get(number, ())[:1])
    ]


def _neighbours(row: _Row, index: int) -> tuple[int, int]:
    """Return the nearest messages with anchors before and after `index`; -1 and the number of messages without one."""
    before = next((k for k in range(index - 1, -1, -1) if row.anchors[k]), -1)
    return before, next((k for k in range(index + 1, len(row.messages)) if row.anchors[k]), len(row.messages))


def _context(row: _Row, index: int) -> Any:
    """Return all that decides where a turn begins and ends, relative to its anchors; None if that is not certain."""
    anchor = row.anchors[index]
    if anchor is None:
        return None
    before, after = _neighbours(row, index)
    start = row.anchors[before][1] if before >= 0 else 0  # type: ignore[index]
    end = row.anchors[after][0] if after < len(row.messages) else len(row.text)  # type: ignore[index]
    if not start <= anchor[0] <= anchor[1] <= end:
        return None
    between = [row.text[start : anchor[0]], row.text[anchor[1] : end]]
    messages = row.messages[max(before, 0) : after + 1]
    for message in messages:
        calls = message.get("tool_calls") or ()
        for name in (message.get("tool_call_id"), *(call.get("id") for call in calls if isinstance(call, dict))):
            # Random ids would make every context a new one.
            if isinstance(name, str) and len(name) > 3:
                between = [text.replace(name, "\0" * len(name)) for text in between]
    message = row.messages[index]
    kind = bool(message.get("content")), "reasoning_content" in message, len(message.get("tool_calls") or ())
    # The same text may continue another prompt: Qwen3's enable_thinking moves its empty reasoning into the prompt.
    variables = repr(row.variables or {})
    return (before < 0, after == len(row.messages), *(m["role"] for m in messages), kind, variables, *between)


def _has_leaf(value: Any) -> bool:
    """Return whether a JSON value has a number or a boolean in it."""
    if isinstance(value, dict):
        return any(map(_has_leaf, value.values()))
    if isinstance(value, list):
        return any(map(_has_leaf, value))
    return value is not None and not isinstance(value, str)


def _shape(value: Any) -> str:
    """Return the structure of a JSON value as text: s for texts, n for numbers and booleans."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_shape(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + "".join(map(_shape, value)) + "]"
    return "s" if isinstance(value, str) else "-" if value is None else "n"
