"""One conversation as the chat template gets it, and the checks that a message passes on the way there.

Owns the message form of OpenAI and TRL: `role` and `content`, for assistants also `tool_calls`; `train` (true or false)
or `weight` (0 or 1) say whether an assistant turn is trained. Every other key goes to the template as it is.
Every fault is a ValueError that begins with the message's number, from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hbp_titan.data.sources.json_text import check_json, parse_json, shown

ROLES = ("system", "user", "assistant", "tool")
# Names in use for the four roles, where `roles` of the source gives no other meaning.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}


@dataclass(frozen=True)
class Conversation:
    """What one row says.

    messages: dicts with a `role` of ROLES and a `content` string (which may be absent beside `tool_calls`). An
    assistant message that is not to be trained has `train: False`; no other message has `train`, and none has `weight`.
    tools: the functions that the model may call, None without any. source: the row's own `source`, None without.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str | None = None


def check_message(message: Any, number: int, keys: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """A message of the data in the form of a Conversation.

    keys: the data's names of `role`, `content`, `train` and `weight`; roles: its names of roles, before ROLE_NAMES.
    """
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} is {shown(message)}, not an object with {keys['role']} and {keys['content']}"
        )
    role = _role(message.get(keys["role"]), number, roles)
    where = f"message {number} ({role})"
    content, tool_calls = message.get(keys["content"]), message.get("tool_calls")
    if tool_calls:
        tool_calls = _tool_calls(tool_calls, role, where)
    checked: dict[str, Any] = {"role": role}
    if content is not None or not tool_calls:
        checked["content"] = _text(content, keys["content"], where)
    trained = _is_trained(message.get(keys["train"]), message.get(keys["weight"]), where)
    named = {*keys.values(), "role", "content", "train", "weight", "tool_calls"}
    checked |= {key: value for key, value in message.items() if value is not None and key not in named}
    check_json(checked, where)
    if tool_calls:
        checked["tool_calls"] = tool_calls
    if role == "assistant" and not trained:
        checked["train"] = False
    return checked


def _role(name: Any, number: int, roles: dict[str, str]) -> str:
    role = roles.get(name) or ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role not in ROLES:
        expected = ", ".join([*ROLES, *roles])
        raise ValueError(f"message {number} has the unknown role {shown(name)}: expected one of {expected}")
    return role


def _text(content: Any, key: str, where: str) -> str:
    """The text of a message, whose parts are joined where it is a list of them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"{where}: {key} is {shown(content)}, not a string")
    for number, part in enumerate(content, start=1):
        if part.get("type") != "text":
            raise ValueError(f"{where}: part {number} of {key} is of type {shown(part.get('type'))}, which is not text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: part {number} of {key}: text is {shown(part.get('text'))}, not a string")
    return "".join(part["text"] for part in content)


def _is_trained(train: Any, weight: Any, where: str) -> bool:
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where}: train is {shown(train)}, not true or false")
    if weight is None:
        return train is not False
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise ValueError(f"{where}: weight is {shown(weight)}, not 0 or 1: other weights of a message are not known")
    if train is not None and train != bool(weight):
        raise ValueError(f"{where}: train is {shown(train)} and weight is {shown(weight)}: leave out one of them")
    return bool(weight)


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as templates expect them; OpenAI writes these as JSON text."""
    if role != "assistant":
        raise ValueError(f"{where}: tool_calls belong to an assistant message")
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is {shown(calls)}, not a list")
    check_json(calls, where)
    return [_tool_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {shown(call)}, not an object with the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
            check_json(arguments, "arguments")
        except ValueError as error:
            raise ValueError(f"{where}: arguments: {error}") from None
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"{where}: arguments is {shown(arguments)}, not an object")
    function = {key: value for key, value in function.items() if value is not None}
    if arguments is not None:
        function["arguments"] = arguments
    return {**call, "function": function} if "function" in call else function


def check_tools(tools: Any, name: str) -> list[dict[str, Any]] | None:
    """The tools of a row, given as a list of objects or as the JSON text of one; None where there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name} is {shown(tools)}, not a list of objects, nor the JSON text of one")
    check_json(tools, name)
    return tools
