"""The form in which a chat template wants tool calls: arguments as an object or as text, content null, "" or absent.

Families differ (https://github.com/huggingface/transformers/issues/45419): DeepSeek's templates append the text of the
arguments, others write the object as JSON; some ask whether the content of a call is null, others append to it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from hbp_titan.data.chat_template import ChatTemplate, Message
from hbp_titan.data.messages import Arguments

_ARGUMENTS = {"city": "Oslo", "days": 2}
# Not the function that is called, whose name must come from the call.
_TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
# Ids of nine letters and digits: Mistral's templates refuse others.
_CALL = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": _ARGUMENTS}}
_PROBE: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [_CALL]},
    {"role": "tool", "name": "lookup", "tool_call_id": "call00001", "content": "rain"},
    {"role": "assistant", "content": "Wet."},
]


class CallForm(NamedTuple):
    """arguments: "object" or "text". content: of a call without text, "absent", "empty" or "null"."""

    arguments: str
    content: str

    def __str__(self) -> str:
        return f"arguments as {self.arguments}, content of calls {self.content}"

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with their tool calls in this form."""
        return [self._message(message) if message.get("tool_calls") else message for message in messages]

    def _message(self, message: Message) -> Message:
        changed = {**message, "tool_calls": [self._call(call) for call in message["tool_calls"]]}
        if not (changed.get("content") or "").strip():
            changed.pop("content", None)
            if self.content != "absent":
                changed["content"] = "" if self.content == "empty" else None
        return changed

    def _call(self, call: Any) -> Any:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, dict):
            text = arguments.text if isinstance(arguments, Arguments) else json.dumps(arguments, ensure_ascii=False)
            # A plain dict: a template reads `arguments.text` as the argument of that name.
            arguments = text if self.arguments == "text" else dict(arguments)
        function = {**function, "arguments": arguments}
        return function if "function" not in call else {**call, "function": function}


CALL_FORMS = tuple(itertools.starmap(CallForm, itertools.product(("object", "text"), ("absent", "empty", "null"))))


def call_forms(template: ChatTemplate) -> list[CallForm]:
    """Return all forms; the first one renders a call, its result and the answer, if any form does."""
    fitting = [form for form in CALL_FORMS if _fits(template, form)]
    return [*fitting[:1], *(form for form in CALL_FORMS if form not in fitting[:1])]


def _fits(template: ChatTemplate, form: CallForm) -> bool:
    try:
        text = template.render(form.apply(_PROBE), [_TOOL])
    except ValueError:
        return False
    # A template that appends the arguments as they are would write an object in Python's form.
    return repr(_ARGUMENTS) not in text and all(word in text for word in ("lookup", "Oslo", "rain", "Wet."))
