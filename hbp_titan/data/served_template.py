"""Which chat template an exported folder serves with: the tokenizer folder's own, or the one of data.chat_template.

A ready template exists to train what the model's own template cannot; where both ask the same, the own one stays,
because every server knows it. Where they ask differently, the model must be asked as it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hbp_titan.data.call_forms import call_forms
from hbp_titan.data.chat_template import ChatTemplate, Message, plain_messages
from hbp_titan.data.tokenizer import read_tokenizer_folder
from hbp_titan.job_config import Data

_TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
_ASKS = {"role": "user", "content": "Is it wet?"}
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
_CALLS = {"role": "assistant", "tool_calls": [_CALL]}
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
    ([_SYSTEM, _ASKS], [_TOOL]),
    ([_ASKS, _CALLS, _FOUND], [_TOOL]),
    ([_ASKS, _CALLS, _FOUND, _CALLS, _FOUND], [_TOOL]),
    ([_ASKS, _CALLS, _FOUND, _ANSWER, _ASKS], None),
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
