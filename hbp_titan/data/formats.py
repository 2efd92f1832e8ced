"""Raw records -> conversations: the formats of chat data and their columns.

    messages           messages: [{role, content}, ...]
    sharegpt           conversations: [{from, value}, ...] (or with role and content)
    alpaca             instruction, output, input, history: [[instruction, output], ...]
    prompt_completion  prompt, completion: strings, or lists of messages; only the completion is trained

each with `system`, `tools`, `chat_template_kwargs` (variables for the template) and `source` (the row's origin). Only
the columns of _REQUIRED must exist. `columns` maps other names of columns and message keys. The result has the message
form of OpenAI and TRL. Owns what is refused because it only looks like these formats: rows with preferred and rejected
answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hbp_titan.data.jsonl import check_json, shown
from hbp_titan.data.messages import ROLES, check_message, check_tools, json_items, parse_text
from hbp_titan.utils import did_you_mean


@dataclass(frozen=True)
class Conversation:
    """The conversation of one row.

    messages: dicts with a `role` of ROLES and a `content` string (optional with `tool_calls`). An untrained assistant
    message has `train: False`; no other message has `train`, and none has `weight`. Other keys go to the template.
    tools: the functions that the model may call, or None. source: the row's own `source`, or None. variables: the row's
    own variables for the template.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)


# What a template gets from us (data/chat_template.py), and arguments of apply_chat_template that are no variables.
_NOT_VARIABLES = (
    *("messages", "tools", "add_generation_prompt", "generation_sentinels", "raise_exception", "strftime_now"),
    *("namespace", "dict", "range", "joiner", "cycler", "bos_token", "eos_token", "pad_token", "unk_token"),
    *("sep_token", "cls_token", "mask_token", "conversation", "chat_template", "continue_final_message", "tokenize"),
    "return_assistant_tokens_mask",
)


def check_variables(variables: Any, name: str) -> dict[str, Any]:
    """Return the variables for a template, given as an object or as its JSON text; null entries count as absent.

    name: of the column or configuration key, with which every ValueError begins.
    """
    if isinstance(variables, str) and variables.strip():
        variables = parse_text(variables, name)
    if not variables:
        return {}
    if not isinstance(variables, dict):
        raise ValueError(f"{name} is {shown(variables)}, not an object with the template's variables")
    for key in variables:
        if key in _NOT_VARIABLES:
            raise ValueError(f"{name}.{key}: a template variable must not replace {key}; remove it")
        if not key.isidentifier():
            raise ValueError(f"{name}: {shown(key)} is not a name that a template can use")
    check_json(variables, name)
    # Arrow gives every row the entries of all rows.
    return {key: value for key, value in variables.items() if value is not None}


_MESSAGE_KEYS = ("role", "content", "train", "weight")
_SHAREGPT_KEYS = ("from", "value", *_MESSAGE_KEYS)
# The columns by which a format is detected, in the order of the search; the other columns that it reads; and the keys
# of its messages, which `columns` maps as well.
_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
_SHARED = ("system", "tools", "source", "chat_template_kwargs")
_OPTIONAL = dict.fromkeys(_REQUIRED, _SHARED) | {"alpaca": (*_SHARED, "input", "history")}
_KEYS = dict.fromkeys(_REQUIRED, _SHAREGPT_KEYS) | {"prompt_completion": _MESSAGE_KEYS, "alpaca": ()}
# Columns that are read as `tools` under names of their own; their functions may be bare: OpenAI's older
# `functions`, `tool_defs` of the verifiers environments.
_TOOL_COLUMNS = ("functions", "tool_defs", "available_tools")
# KTO's mark of an answer as desired (TRL, LLaMA-Factory).
_DESIRED = ("label", "kto_tag")
FORMATS = tuple(_REQUIRED)


def check_mapping(format: str, columns: Mapping[str, str], roles: Mapping[str, str], key: str) -> None:
    """Raise ValueError "`key`..." if `columns` or `roles` map a name that the format (or no format) has."""
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"{key}.format = {shown(format)}: must be auto or one of {', '.join(FORMATS)}")
    formats = FORMATS if format == "auto" else (format,)
    known = sorted({name for one in formats for name in _REQUIRED[one] + _OPTIONAL[one] + _KEYS[one]})
    for name, column in columns.items():
        if name not in known:
            raise ValueError(
                f"{key}.columns: {shown(name)} is not a column of {' or '.join(formats)}; "
                f"must be one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if not isinstance(column, str) or not column:
            raise ValueError(f"{key}.columns: {name} is {shown(column)}, not the name of a column")
    for name, role in roles.items():
        if role not in ROLES:
            raise ValueError(f"{key}.roles: {shown(name)} is {shown(role)}; must be one of {', '.join(ROLES)}")


def read_columns(format: str, columns: Mapping[str, str]) -> frozenset[str]:
    """Return the data's names of the columns that a format reads."""
    names = {columns.get(name, name) for name in _REQUIRED[format] + _OPTIONAL[format]}
    return frozenset(names if "tools" in columns else {*names, *_TOOL_COLUMNS})


def mapped_columns(format: str, columns: Mapping[str, str]) -> set[str]:
    """Return the data's names that a format reads because `columns` maps them: columns, and keys of messages as
    "messages[].KEY"."""
    found = {columns[name] for name in _REQUIRED[format] + _OPTIONAL[format] if name in columns}
    list_name = columns.get(_REQUIRED[format][-1], _REQUIRED[format][-1])
    return found | {f"{list_name}[].{columns[key]}" for key in _KEYS[format] if key in columns}


def filled_names(record: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> set[str]:
    """Return the columns of a record that have a value, and the keys of its messages that have one, as in
    `mapped_columns`."""
    found = {name for name, value in record.items() if value is not None}
    row, list_name = _Record(record, columns, {}), columns.get(_REQUIRED[format][-1], _REQUIRED[format][-1])
    for column in _REQUIRED[format] if _KEYS[format] else ():
        # A malformed row is reported by `parse_record`; a prompt may be text.
        with suppress(ValueError):
            for turn in row.turns(column, ""):
                if isinstance(turn, dict):
                    found.update(f"{list_name}[].{key}" for key, value in turn.items() if value is not None)
    return found


def detect_format(record: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return the first of FORMATS whose columns the record has; raises ValueError if there is none."""
    _check_preferences(record, columns)
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
    _check_desired(record, columns)
    try:
        return _PARSERS[format](_Record(record, columns, roles))
    except ValueError:
        # If that is the reason, it is what the user must know.
        _check_preferences(record, columns)
        raise


def _check_desired(record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise ValueError for a KTO row, whose answer may be one that must not be trained."""
    for name in _DESIRED:
        value = record.get(name)
        if value is None or name in columns.values():
            continue
        # A CSV file has the words; any other label is just a column that is not read.
        if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
            raise ValueError(
                f"a KTO row: {name} is {shown(value)}, and answers with false are not to be trained; "
                f"write the rows with true to a file without the column {name}"
            )


def _check_preferences(record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise ValueError for a preference row whose `chosen` or `rejected` no setting takes, with that setting."""
    _check_desired(record, columns)
    chosen, rejected = (
        next((name for name in record if name.startswith(word) and isinstance(record[name], (str, list, dict))), None)
        for word in ("chosen", "rejected")
    )
    # A row that also has whole conversations is one to train; the other columns are listed as not read.
    if not (chosen and rejected) or record.get(columns.get("messages", "messages")) is not None:
        return
    if {chosen, rejected} & set(columns.values()):
        return
    raise ValueError(
        f"a preference row: {chosen} and {rejected}; to train the preferred answers, {_preferred(record, chosen)}"
    )


def _preferred(record: Mapping[str, Any], chosen: str) -> str:
    """Return the setting by which the preferred answers of a preference row are trained."""
    answer, prompt = record[chosen], record.get("prompt")
    if isinstance(answer, dict) or record.get("conversations") is not None:
        return f"append the turn of {chosen} to the conversation of each row"
    if record.get("instruction") is not None:
        return f'set columns = {{ output = "{chosen}" }}'
    if isinstance(answer, list) or answer.lstrip().startswith("[{"):
        first = answer[0] if isinstance(answer, list) and answer else None
        role = first.get("role", first.get("from")) if isinstance(first, dict) else None
        # TRL's explicit prompt: only then does the answer begin with its own turn.
        column = "completion" if prompt is not None and role in ("assistant", "gpt") else "messages"
        return f'set columns = {{ {column} = "{chosen}" }}'
    if prompt is not None:
        return f'set columns = {{ completion = "{chosen}" }}'
    return f'name the column of the question: columns = {{ prompt = "...", completion = "{chosen}" }}'


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
        """Return the list of a column, which may be given as JSON text, as may its elements."""
        value, name = self.get(column), self.name(column)
        if isinstance(value, str):
            value = parse_text(value, name)
        if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
            # The type Sequence of older versions of `datasets`: an object of lists in place of a list of objects.
            columns = list(value.values())
            if len({len(column) for column in columns}) == 1:
                value = [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
        if not isinstance(value, list):
            raise ValueError(f"no `{name}` list; expected an object with `{name}`, a list of {{{keys}}}")
        return json_items(value, name)

    def conversation(self, messages: list[dict[str, Any]]) -> Conversation:
        """Return `messages` with the system prompt, the tools and the origin of the record."""
        system, name = self.optional_text("system"), self.name("system")
        if system and messages and messages[0]["role"] == "system":
            if messages[0]["content"] != system:
                raise ValueError(
                    f"both the column {name} and message 1 have a system prompt; remove one of them, "
                    'or set columns = { system = "none" }'
                )
        elif system:
            messages = [{"role": "system", "content": system}, *messages]
        variables = check_variables(self.get("chat_template_kwargs"), self.name("chat_template_kwargs"))
        return Conversation(messages, self._tools(), self._source(), variables)

    def _tools(self) -> list[dict[str, Any]] | None:
        name = self.name("tools")
        found = check_tools(self.record.get(name), name, wrap=name in _TOOL_COLUMNS)
        # A mapped column is the only one.
        for other in () if "tools" in self.columns else _TOOL_COLUMNS:
            if self.record.get(other) is None or not (tools := check_tools(self.record[other], other, wrap=True)):
                continue
            if found and found != tools:
                raise ValueError(f"both {name} and {other} have tools; set columns = {{ tools = ... }} to one of them")
            found, name = tools, other
        return found

    def _source(self) -> str | None:
        """Return the origin of the row: a string as it is, another value as its JSON text."""
        value, name = self.get("source"), self.name("source")
        if value is None or isinstance(value, str):
            check_json(value, name)
            return value
        check_json(value, name)
        return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _parse_messages(row: _Record) -> Conversation:
    return row.conversation(_messages(row, "messages", row.keys(), row.keys("from", "value")))


def _parse_sharegpt(row: _Record) -> Conversation:
    return row.conversation(_messages(row, "conversations", row.keys("from", "value"), row.keys()))


def _messages(row: _Record, column: str, own: dict[str, str], other: dict[str, str]) -> list[dict[str, Any]]:
    """Return the messages of a column; `own` are its keys, `other` those that data of this column often has."""
    turns = row.turns(column, f"{own['role']}, {own['content']}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        is_other = isinstance(turn, dict) and own["role"] not in turn and other["role"] in turn
        messages.append(check_message(turn, number, other if is_other else own, row.roles))
    return messages


def _parse_alpaca(row: _Record) -> Conversation:
    turns = _history(row.get("history"), row.name("history"))
    # Joined as LLaMA-Factory joins them.
    prompt = "\n".join(text for text in (row.text("instruction"), row.optional_text("input")) if text)
    messages = []
    for question, answer in [*turns, (prompt, row.text("output"))]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return row.conversation(messages)


def _history(history: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(history, str) and history.strip():
        history = parse_text(history, name)
    # A CSV file has "" for no value.
    if history is None or history == "":
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
    value = row.get(column)
    if not isinstance(value, list):
        return [{"role": role, "content": row.text(column)}]
    keys = row.keys()
    items = json_items(value, row.name(column))
    return [check_message(message, number, keys, row.roles) for number, message in enumerate(items, first)]


_PARSERS = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt_completion": _parse_prompt_completion,
}
