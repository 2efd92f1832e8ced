"""Raw records -> conversations: the formats of chat data, and the checks of a message.

Owns the formats and their columns:

    messages           messages: [{role, content}, ...]
    sharegpt           conversations: [{from, value}, ...] (or with role and content), system
    alpaca             instruction, output, input, system, history: [[instruction, output], ...]
    prompt_completion  prompt, completion: strings, or lists of messages; only the completion is trained

each with `tools` and `source` (the row's origin). Only the columns of _REQUIRED must exist. `columns` maps other names
of columns and message keys. The result has the message form of OpenAI and TRL. Errors begin with the message's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hbp_titan.data.jsonl import check_json, parse_json, shown

ROLES = ("system", "user", "assistant", "tool")
# Names in use for the four roles; `roles` of a source takes precedence.
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}


@dataclass(frozen=True)
class Conversation:
    """The conversation of one row.

    messages: dicts with a `role` of ROLES and a `content` string (optional with `tool_calls`). An untrained assistant
    message has `train: False`; no other message has `train`, and none has `weight`. Other keys go to the template.
    tools: the functions that the model may call, or None. source: the row's own `source`, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str | None = None


def check_message(message: Any, number: int, keys: dict[str, str], roles: dict[str, str]) -> dict[str, Any]:
    """Return a message of the data in the form of a Conversation; raises ValueError "message `number` ...".

    keys: the data's names of `role`, `content`, `train` and `weight`. roles: the data's role -> one of ROLES.
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
    # Content may be missing only next to tool calls; _text reports it otherwise.
    if content is not None or not tool_calls:
        checked["content"] = _text(content, keys["content"], where)
    trained = _is_trained(message.get(keys["train"]), message.get(keys["weight"]), where)
    # Under either name: a mapped key must not reach the template a second time.
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
        raise ValueError(f"message {number} has the unknown role {shown(name)}: must be one of {expected}")
    return role


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


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Return tool calls with objects as arguments, as templates expect them; OpenAI writes arguments as JSON text."""
    if role != "assistant":
        raise ValueError(f"{where}: only an assistant message can have tool_calls")
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
    """Return the tools of a row, given as a list of objects or as its JSON text; None if there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    # An empty list would make templates write the header of a tool section.
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name} is {shown(tools)}, not a list of objects, nor the JSON text of one")
    check_json(tools, name)
    return tools


_MESSAGE_KEYS = ("role", "content", "train", "weight")
# The columns by which a format is detected, in the order of the search; and the other columns that it reads.
_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_OPTIONAL = {
    "messages": ("tools", "source", *_MESSAGE_KEYS),
    "sharegpt": ("tools", "source", "system", "from", "value", *_MESSAGE_KEYS),
    "alpaca": ("tools", "source", "input", "system", "history"),
    "prompt_completion": ("tools", "source", *_MESSAGE_KEYS),
}
FORMATS = tuple(_REQUIRED)


def check_mapping(format: str, columns: Mapping[str, str], roles: Mapping[str, str], key: str) -> None:
    """Raise ValueError "`key`..." if `columns` or `roles` map a name that the format (or no format) has."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"{key}.format = {shown(format)}: must be auto or one of {', '.join(FORMATS)}")
    formats = FORMATS if format == "auto" else (format,)
    known = sorted({name for one in formats for name in _REQUIRED[one] + _OPTIONAL[one]})
    for name, column in columns.items():
        if name not in known:
            raise ValueError(
                f"{key}.columns: {shown(name)} is not a column of {' or '.join(formats)}; "
                f"must be one of {', '.join(known)}"
            )
        if not isinstance(column, str) or not column:
            raise ValueError(f"{key}.columns: {name} is {shown(column)}, not the name of a column")
    for name, role in roles.items():
        if role not in ROLES:
            raise ValueError(f"{key}.roles: {shown(name)} is {shown(role)}; must be one of {', '.join(ROLES)}")


def detect_format(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the first of FORMATS whose columns the record has; raises ValueError if there is none."""
    # A column that is null in this row does not count: Arrow gives every row all columns.
    for format, required in _REQUIRED.items():
        if all(record.get(columns.get(name, name)) is not None for name in required):
            return format
    found = ", ".join(shown(name) for name in list(record)[:20]) or "none"
    expected = "; ".join(f"{format}: {' and '.join(required)}" for format, required in _REQUIRED.items())
    raise ValueError(f"unknown format: found the columns {found}; expected {expected}; map them with `columns`")


def parse_record(
    record: Mapping[str, Any], format: str, columns: Mapping[str, str], roles: Mapping[str, str]
) -> Conversation:
    """Return the conversation of a record, which may have no messages.

    columns: the format's name of a column or of a message key -> the data's name. roles: the data's role -> one of
    ROLES. Raises ValueError, without file and line, for a malformed record.
    """
    return _PARSERS[format](_Record(record, columns, roles))


class _Record:
    """A record, read by the names that its source uses."""

    def __init__(self, record: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, str]) -> None:
        self.record, self.columns, self.roles = record, columns, dict(roles)

    def name(self, column: str) -> str:
        """Return the data's name of the format's column."""
        return self.columns.get(column, column)

    def get(self, column: str) -> Any:
        """Return the value of the format's column, None if it is missing."""
        return self.record.get(self.name(column))

    def text(self, column: str) -> str:
        """Return the text of a required column."""
        value, name = self.get(column), self.name(column)
        if not isinstance(value, str):
            raise ValueError(f"{name} is {shown(value)}, not a string")
        check_json(value, name)
        return value

    def optional_text(self, column: str) -> str:
        """Return the text of an optional column, "" if it is missing."""
        return "" if self.get(column) is None else self.text(column)

    def keys(self, role: str = "role", content: str = "content") -> dict[str, str]:
        """Return the data's names of a message's keys."""
        return {"role": self.name(role), "content": self.name(content)} | {
            key: self.name(key) for key in ("train", "weight")
        }

    def turns(self, column: str, keys: str) -> list[Any]:
        """Return the list of a column, which may be given as JSON text."""
        value, name = self.get(column), self.name(column)
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if not isinstance(value, list):
            raise ValueError(f"no `{name}` list; expected an object with `{name}`, a list of {{{keys}}}")
        return value

    def conversation(self, messages: list[dict[str, Any]]) -> Conversation:
        """Return `messages` with the tools and the origin of the record."""
        source = self.get("source")
        if source is not None:
            source = self.text("source")
        return Conversation(messages, check_tools(self.get("tools"), self.name("tools")), source)


def _parse_messages(row: _Record) -> Conversation:
    keys = row.keys()
    messages = row.turns("messages", f"{keys['role']}, {keys['content']}")
    return row.conversation(
        [check_message(message, number, keys, row.roles) for number, message in enumerate(messages, start=1)]
    )


def _parse_sharegpt(row: _Record) -> Conversation:
    own, openai = row.keys("from", "value"), row.keys()
    values = row.turns("conversations", f"{own['role']}, {own['content']}")
    messages = []
    for number, value in enumerate(values, start=1):
        keys = own
        if isinstance(value, dict):
            # Many data sets use the column `conversations` with OpenAI's keys.
            keys = openai if own["role"] not in value and openai["role"] in value else own
            if value.get(keys["role"]) == "function_call" and "function_call" not in row.roles:
                value = _function_call(value, keys, number)
        messages.append(check_message(value, number, keys, row.roles))
    system = row.optional_text("system")
    if system and messages and messages[0]["role"] == "system":
        raise ValueError(f"both the column {row.name('system')} and message 1 have a system prompt; remove one of them")
    return row.conversation([{"role": "system", "content": system}, *messages] if system else messages)


def _function_call(message: dict[str, Any], keys: dict[str, str], number: int) -> dict[str, Any]:
    """Return ShareGPT's turn of role function_call, whose value is the JSON text of calls, as tool calls."""
    text = message.get(keys["content"])
    if not isinstance(text, str):
        raise ValueError(f"message {number} (function_call): {keys['content']} is {shown(text)}, not a string")
    try:
        calls = parse_json(text)
    except ValueError as error:
        raise ValueError(f"message {number} (function_call): {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    wrapped = [{"type": "function", "function": call} for call in calls]
    return {**message, keys["role"]: "assistant", keys["content"]: None, "tool_calls": wrapped}


def _parse_alpaca(row: _Record) -> Conversation:
    system, history = row.optional_text("system"), row.get("history")
    turns = _history(history, row.name("history"))
    # Joined as LLaMA-Factory joins them.
    prompt = "\n".join(text for text in (row.text("instruction"), row.optional_text("input")) if text)
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in [*turns, (prompt, row.text("output"))]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return row.conversation(messages)


def _history(history: Any, name: str) -> list[tuple[str, str]]:
    if history is None:
        return []
    is_list = isinstance(history, list)
    if not is_list or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise ValueError(f"{name} is {shown(history)}, not a list of [instruction, output] pairs")
    check_json(history, name)
    return [(question, answer) for question, answer in history]


def _parse_prompt_completion(row: _Record) -> Conversation:
    prompt = _turns(row, "prompt", "user", first=1)
    completion = _turns(row, "completion", "assistant", first=len(prompt) + 1)
    # Assistant turns of the prompt are context, not targets.
    prompt = [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]
    return row.conversation(prompt + completion)


def _turns(row: _Record, column: str, role: str, first: int) -> list[dict[str, Any]]:
    if not isinstance(row.get(column), list):
        return [{"role": role, "content": row.text(column)}]
    keys = row.keys()
    return [check_message(message, number, keys, row.roles) for number, message in enumerate(row.get(column), first)]


_PARSERS = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
}
