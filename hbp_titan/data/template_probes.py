"""What a chat template does with conversations of ours: the form in which it wants calls, and the prompts it writes.

Families want calls in different forms (https://github.com/huggingface/transformers/issues/45419): DeepSeek's templates
append the text of the arguments, others write the object as JSON; some ask whether the content of a call is null,
others append to it. Owns also which template an exported folder serves with: a ready template exists to train what the
model's own template cannot. Where both write the same prompts the own one stays, because every server knows it;
otherwise the model must be asked as it was trained.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hbp_titan.data.chat_template import ChatTemplate, Message, plain_messages
from hbp_titan.data.messages import Arguments
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.job_config import Data

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


_LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
_ASKS = {"role": "user", "content": "Is it wet?"}
_LOOK_CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
_ASKED_TOOL = {"role": "assistant", "tool_calls": [_LOOK_CALL]}
_FOUND = {"role": "tool", "content": "rain"}
_ANSWER = {"role": "assistant", "content": "Yes."}
_THINKS = {"role": "assistant", "content": "<think>\nrain\n</think>\n\nYes."}
_SYSTEM = {"role": "system", "content": "Be brief."}
# Conversations that wait for an answer.
_PROMPTS: list[tuple[list[Message], list[dict[str, Any]] | None]] = [
    ([_ASKS], None),
    ([_SYSTEM, _ASKS, _ANSWER, _ASKS, _ANSWER, _ASKS], None),
    ([_ASKS, _THINKS, _ASKS], None),
    ([_ASKS, {**_ANSWER, "reasoning_content": "rain"}, _ASKS], None),
    ([_SYSTEM, _ASKS], [_LOOK]),
    ([_ASKS, _ASKED_TOOL, _FOUND], [_LOOK]),
    ([_ASKS, _ASKED_TOOL, _FOUND, _ASKED_TOOL, _FOUND], [_LOOK]),
    ([_ASKS, _ASKED_TOOL, _FOUND, _ANSWER, _ASKS], None),
]


def served_template(tokenizer_path: Path, chat_template: Path | None, data: Data) -> str:
    """Return the source of the template that must replace the tokenizer folder's; "" where its own asks the same.

    chat_template: file of data.chat_template. data: the variables and the day with which both are compared.
    """
    if chat_template is None:
        return ""
    trained = read_tokenizer_folder(tokenizer_path, chat_template)
    prompts = _prompts(ChatTemplate(trained, data.template_date), data)
    try:
        folder = read_tokenizer_folder(tokenizer_path)
        own = ChatTemplate(folder, data.template_date)
    except ValueError:
        # It has none, or none that works.
        return trained.chat_template
    same = not folder.tool_template and _prompts(own, data) == prompts
    return "" if same else trained.chat_template


def _prompts(template: ChatTemplate, data: Data) -> list[str | None]:
    """Return the prompts that a template writes, None for those that it rejects."""
    form = call_forms(template)[0]
    prompts: list[str | None] = []
    for messages, tools in _PROMPTS:
        asked = form.apply(plain_messages(messages))
        try:
            prompts.append(template.render(asked, tools, True, variables=data.chat_template_kwargs))
        except ValueError:
            prompts.append(None)
    return prompts
