"""Messages of a row: roles, texts, tool calls and tools of unknown origin in the one form that the package uses.

Owns the names in use for roles, and the older and encoded forms of tool calls: OpenAI's `function_call`, arguments as
JSON text, ShareGPT's turns of role function_call, and lists whose elements are the JSON text of objects (the type
List(Json()) of HF `datasets`). Errors begin with the message's number.
"""

from __future__ import annotations

import re
from typing import Any

from hbp_titan.data.jsonl import check_json, parse_json, shown

ROLES = ("system", "user", "assistant", "tool")
# A turn whose content is the JSON text of tool calls: ShareGPT's function_call, tool_call of ms-swift.
_CALL = "function_call"
# Names in use for the roles, in any capitalization; `roles` of a source takes precedence.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation", "ipython"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}


def parse_text(text: str, where: str) -> Any:
    """Return the value of a JSON text; raises ValueError "`where`: ..."."""
    try:
        value = parse_json(text)
        check_json(value, "the value")
    except ValueError as error:
        # What pandas writes for a list of objects in a CSV file.
        python = "; this is Python's notation: write it by json.dumps" if re.match(r"\s*\[?\s*{\s*'", text) else ""
        raise ValueError(f"{where}: {error}{python}") from None
    return value


def json_items(values: list[Any], where: str) -> list[Any]:
    """Return a list with every element that is the JSON text of an object as that object; `where` names the list."""
    if not any(isinstance(value, str) for value in values):
        return values
    return [
        parse_text(value, f"{where}: element {number}")
        if isinstance(value, str) and value.lstrip().startswith("{")
        else value
        for number, value in enumerate(values, start=1)
    ]


def check_message(message: Any, number: int, keys: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """Return a message of the data in the form of a Conversation; raises ValueError "message `number` ...".

    keys: the data's names of `role`, `content`, `train` and `weight`. roles: the data's role -> one of ROLES.
    """
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} is {shown(message)}, not an object with {keys['role']} and {keys['content']}"
        )
    role = _role(message.get(keys["role"]), number, roles)
    if role == _CALL:
        message, role = _call_message(message, keys["content"], f"message {number} ({_CALL})"), "assistant"
    where = f"message {number} ({role})"
    content, tool_calls = message.get(keys["content"]), message.get("tool_calls")
    if isinstance(tool_calls, str) and tool_calls.lstrip().startswith(("[", "null")):
        tool_calls = parse_text(tool_calls, f"{where}: tool_calls")
    if message.get("function_call"):
        tool_calls = _legacy_call(message["function_call"], tool_calls, where)
    if tool_calls:
        tool_calls = _tool_calls(tool_calls, role, where)
    checked: dict[str, Any] = {"role": role}
    # Content may be missing only next to tool calls; _text reports it otherwise.
    if content is not None or not tool_calls:
        checked["content"] = _text(content, keys["content"], where)
    trained = _is_trained(message.get(keys["train"]), message.get(keys["weight"]), where)
    # Under either name: a mapped key must not reach the template a second time.
    named = {*keys.values(), "role", "content", "train", "weight", "tool_calls", "function_call"}
    checked |= {key: value for key, value in message.items() if value is not None and key not in named}
    check_json(checked, where)
    if tool_calls:
        checked["tool_calls"] = tool_calls
    if role == "assistant" and not trained:
        checked["train"] = False
    return checked


def _role(name: Any, number: int, roles: dict[str, str]) -> str:
    if isinstance(name, str):
        role = roles.get(name) or ROLE_NAMES.get(name) or ROLE_NAMES.get(name.strip().lower())
        if role:
            return role
    fix = "name its role"
    if isinstance(name, str):
        fix = f'set roles = {{ {shown(name)} = "assistant" }} (or {", ".join(ROLES)}) in its [[data.sources]] block'
    names = ", ".join([*ROLE_NAMES, *roles])
    raise ValueError(f"message {number} has the unknown role {shown(name)}; {fix}; known are {names}")


def _text(content: Any, key: str, where: str) -> str:
    """Return the text of a message; a list of text parts is joined."""
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
        raise ValueError(f"{where}: weight is {shown(weight)}, not 0 or 1; other weights are not supported")
    if train is not None and train != bool(weight):
        raise ValueError(f"{where}: train is {shown(train)} and weight is {shown(weight)}; remove one of them")
    return bool(weight)


def _call_message(message: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a turn of role function_call, whose content is the JSON text of calls, as a message with tool calls."""
    calls = message.get(key)
    if not isinstance(calls, (str, dict, list)):
        raise ValueError(f"{where}: {key} is {shown(calls)}, not a call or its JSON text")
    if message.get("tool_calls") or message.get("function_call"):
        raise ValueError(f"{where} has both this role and tool_calls or function_call; keep one of them")
    calls = parse_text(calls, where) if isinstance(calls, str) else calls
    # A list without calls must not become an answer without text.
    if not calls:
        raise ValueError(f"{where}: {key} is {shown(message[key])}, which has no call")
    return {**message, key: None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _legacy_call(call: Any, tool_calls: Any, where: str) -> Any:
    """Return `tool_calls`, or the one call of OpenAI's older key `function_call` in their place."""
    call = parse_text(call, f"{where}: function_call") if isinstance(call, str) else call
    if call and tool_calls:
        raise ValueError(f"{where} has both function_call and tool_calls; keep one of them")
    return [call] if call else tool_calls


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Return tool calls with objects as arguments, as templates expect them; OpenAI writes arguments as JSON text."""
    if role != "assistant":
        raise ValueError(f"{where}: only an assistant message can have tool_calls or function_call")
    if not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls is {shown(calls)}, not a list")
    calls = json_items(calls, f"{where}: tool_calls")
    check_json(calls, where)
    return [_tool_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]


class Arguments(dict[str, Any]):
    """Arguments of a call that the row has as JSON text: templates that append the text must get it as it is."""

    text = ""


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return {"function": {"name", "arguments": object, ...}, ...} of a call, nested or flat."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} is {shown(call)}, not an object with the name of a function")
    # Llama writes calls with `parameters`, but templates read `arguments` only.
    key = "parameters" if function.get("arguments") is None and "parameters" in function else "arguments"
    arguments = function.get(key)
    if isinstance(arguments, str):
        # Some servers write "" for a function without parameters.
        text = arguments
        arguments = parse_text(text, f"{where}: {key}") if text.strip() else None
        if isinstance(arguments, dict):
            arguments = Arguments(arguments)
            arguments.text = text
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: {key} is {shown(arguments)}, not an object")
    if "function" in call:
        outer = {name: value for name, value in call.items() if value is not None and name != "function"}
    else:
        # A call with its name outside of `function`: templates read the nested form.
        outer = {name: call[name] for name in ("id", "type", "index") if call.get(name) is not None}
        outer.setdefault("type", "function")
        function = {name: value for name, value in call.items() if name not in outer}
    inner = {name: value for name, value in function.items() if value is not None and name not in (key, "arguments")}
    return {**outer, "function": {**inner, "arguments": arguments}}


def check_tools(tools: Any, name: str, wrap: bool = False) -> list[dict[str, Any]] | None:
    """Return the tools of a row, given as a list of objects or as its JSON text; None if there are none.

    name: the column. wrap: whether its elements may be bare functions, which become {"type", "function"}.
    """
    if isinstance(tools, str) and tools.strip():
        tools = parse_text(tools, name)
    elif isinstance(tools, str):
        tools = None
    # An empty list would make templates write the header of a tool section.
    if not tools:
        return None
    tools = json_items(tools, name) if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name} is {shown(tools)}, not a list of objects, nor the JSON text of one")
    check_json(tools, name)
    if wrap:
        return [tool if "function" in tool else _wrapped(tool) for tool in tools]
    return tools


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {key: value for key, value in function.items() if key != "type"}}
