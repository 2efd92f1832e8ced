"""Where the assistant turns lie in a rendered conversation.

Owns the rule of what is trained: the text of an assistant turn with its end token. The template's `{% generation %}`
blocks mark where it begins and ends; without them, the conversation is rendered turn by turn. A turn whose place is not
certain is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hbp_titan.data.chat_template import ChatTemplate, Message
from hbp_titan.data.files import READY_TEMPLATES
from hbp_titan.data.tokenizer import Span

Tools = Sequence[dict[str, Any]] | None

_CUT_BLOCKS = (
    "the chat template cuts its {% generation %} blocks apart, so the loss mask is unknown; put each around a whole "
    "answer"
)
_USE_BLOCKS = (
    f"so the loss mask is unknown; set data.chat_template to a ready template ({', '.join(READY_TEMPLATES)}) or to "
    "your own with {% generation %} blocks"
)


class TurnLocator:
    """Renders conversations and finds the turns in them. control_pattern: matches the tokens that can end a turn."""

    def __init__(self, template: ChatTemplate, control_pattern: re.Pattern[str]) -> None:
        self._template = template
        self._control_pattern = control_pattern

    def locate(
        self,
        messages: Sequence[Message],
        tools: Tools,
        turns: Sequence[int],
        sentinels: tuple[str, str],
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return the conversation's text and the character spans of `turns`, indices of assistant messages.

        sentinels: two characters that no message contains. Raises ValueError if the place of a turn is not certain.
        """

        def render(messages: Sequence[Message], **options: Any) -> str:
            return self._template.render(messages, tools, variables=variables, **options)

        # Nothing to locate, so a template whose turns cannot be located is still usable.
        if not turns:
            return render(messages), []
        if self._template.has_generation_blocks:
            text, blocks = cut_sentinels(render(messages, sentinels=sentinels), sentinels)
            return text, self._blocks_of(messages, turns, text, blocks, render)
        text = render(messages)
        return text, [self._turn_span(messages, index, text, render) for index in turns]

    def _blocks_of(
        self,
        messages: Sequence[Message],
        turns: Sequence[int],
        text: str,
        blocks: list[Span],
        render: Callable[..., str],
    ) -> list[Span]:
        """Return the generation blocks of `turns`; the template may give a message one, several or no block.

        A turn's blocks begin after the text of the messages before it, and before the next assistant turn.
        """
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        # Usual case: all turns are wanted, so blocks need not be matched with turns, at a render per turn.
        if len(turns) == len(assistants):
            return blocks
        wanted = set(turns)
        boundaries = {}
        for index, following in zip(assistants, [*assistants[1:], None], strict=True):
            if index not in wanted:
                continue
            for boundary in (index, following):
                # Neither the start (0) nor the end (None) of the text needs a render.
                if boundary and boundary not in boundaries:
                    before = render(messages[:boundary])
                    if not text.startswith(before):
                        raise ValueError(
                            f"the chat template changes what precedes message {boundary + 1} (assistant) when it "
                            "follows, so its {% generation %} blocks cannot be matched with the turns"
                        )
                    boundaries[boundary] = len(before)
        boundaries[0] = 0
        spans = []
        for index, following in zip(assistants, [*assistants[1:], None], strict=True):
            if index in wanted:
                end = len(text) + 1 if following is None else boundaries[following]
                spans += [block for block in blocks if boundaries[index] <= block[0] < end]
        return spans

    def _turn_span(self, messages: Sequence[Message], index: int, text: str, render: Callable[..., str]) -> Span:
        """Return the span of a turn: what its message adds to the prompt that a model would be asked to continue."""
        turn = f"message {index + 1} (assistant)"
        try:
            prompt = render(messages[:index], add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"{turn} has no prompt before it, so the loss mask is unknown: {error}") from None
        answered = text if index + 1 == len(messages) else render(messages[: index + 1])
        if not answered.startswith(prompt):
            raise ValueError(f"the chat template renders {turn} differently from its prompt, {_USE_BLOCKS}")
        if not text.startswith(answered):
            answered = self._answered_earlier(messages, index, render) or ""
            if not answered.startswith(prompt) or not text.startswith(answered):
                raise ValueError(
                    f"the chat template changes {turn} when later messages follow (it drops earlier "
                    f"reasoning, for example), {_USE_BLOCKS}, or train the last turn only"
                )
        turn_text = answered[len(prompt) :]
        # A template without support for tool calls drops them silently: the turn would train an empty answer.
        lost = [name for name in _called(messages[index]) if name not in turn_text]
        if lost:
            raise ValueError(
                f"the chat template drops the call of {lost[0]!r} in {turn}; use a template that supports tool calls"
            )
        return len(prompt), len(prompt) + self._length_with_end_token(turn_text)

    def _answered_earlier(self, messages: Sequence[Message], index: int, render: Callable[..., str]) -> str | None:
        """Return the text up to the end of a turn that is not the last; None if that is not certain.

        Some templates (Qwen3's) treat the last turn differently. A user turn is appended once and twice; what the
        second one adds is cut off the end of the first text. The rest must contain all that the assistant wrote.
        """
        following = {"role": "user", "content": "?"}
        try:
            once = render([*messages[: index + 1], following])
            twice = render([*messages[: index + 1], following, following])
        except ValueError:
            return None
        added = twice[len(once) :]
        if not added or not twice.startswith(once) or not once.endswith(added):
            return None
        answered = once[: -len(added)]
        # What the cut removed must not contain text of the assistant.
        before = render(messages[:index])
        texts = [messages[index].get(field) for field in ("content", "reasoning_content")]
        if any(isinstance(text, str) and text.strip() not in answered[len(before) :] for text in texts):
            return None
        return answered

    def _length_with_end_token(self, turn: str) -> int:
        """Return the length of `turn` up to its end token: no model generates what a template writes after that."""
        ends = [match.end() for match in self._control_pattern.finditer(turn)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else len(turn)


def _called(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    calls = message.get("tool_calls")
    functions = (
        [call.get("function", call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    )
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def cut_sentinels(rendered: str, sentinels: tuple[str, str]) -> tuple[str, list[Span]]:
    """Return the text without its sentinels, and the non-empty spans that they enclosed."""
    opening, closing = sentinels
    first, *rest = rendered.split(opening)
    text, starts, spans = [first], [], []
    length = len(first)
    for piece in rest:
        starts.append(length)
        inside, *after = piece.split(closing)
        text += [inside, *after]
        length += len(inside)
        # Blocks may be nested: each closing sentinel ends the block that was opened last.
        for part in after:
            if not starts:
                raise ValueError(_CUT_BLOCKS)
            spans.append((starts.pop(), length))
            length += len(part)
    if starts or closing in first:
        raise ValueError(_CUT_BLOCKS)
    return "".join(text), [(start, end) for start, end in spans if start < end]
