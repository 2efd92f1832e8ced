"""Formats of chat data: a conversation from each, and one error for a malformed record."""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import Any

import pytest

from hbp_titan.data.formats import (
    Conversation,
    check_mapping,
    detect_format,
    filled_names,
    mapped_columns,
    parse_record,
    read_columns,
)

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TEXT = {"type": "text", "text": "a"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def parse(
    record: dict[str, Any], columns: dict[str, str] | None = None, roles: dict[str, str] | None = None
) -> Conversation:
    return parse_record(record, detect_format(record, columns or {}), columns or {}, roles or {})


def messages(*items: Any, **row: Any) -> list[dict[str, Any]]:
    return parse({"messages": list(items), **row}).messages


def complaint(record: dict[str, Any], **mapping: dict[str, str]) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        parse(record, **mapping)
    assert "\n" not in str(error.value)
    assert str(error.value).isascii()
    return str(error.value)


def call(arguments: Any) -> dict[str, Any]:
    return {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": arguments}]}


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"messages": [], "prompt": "x", "completion": "y"}, "messages"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"instruction": "x", "input": "", "output": "y"}, "alpaca"),
        ({"prompt": "x", "completion": "y", "messages": None}, "prompt_completion"),
    ],
)
def test_a_format_is_detected_by_its_columns(record: dict[str, Any], format: str) -> None:
    assert detect_format(record, {}) == format


def test_unknown_columns_are_listed() -> None:
    message = complaint({"text": "x", "id\n": 1})
    assert 'found the columns "text", "id\\n"; expected messages: messages; sharegpt: conversations; ' in message
    assert "found the columns none" in complaint({})


def test_messages_pass_with_their_other_keys_and_without_nulls() -> None:
    tool = {"role": "tool", "content": "5", "name": "add", "tool_call_id": "a1", "refusal": None, "tool_calls": []}
    record = {"messages": [USER, tool, ASSISTANT], "id": 7, "source": "mine", "tools": [TOOL]}
    expected = [USER, {"role": "tool", "content": "5", "name": "add", "tool_call_id": "a1"}, ASSISTANT]
    assert parse(record) == Conversation(expected, [TOOL], "mine")
    assert parse({"messages": []}) == Conversation([], None, None)
    assert messages({"role": "developer", "content": ""}) == [{"role": "system", "content": ""}]


def test_a_record_is_not_changed_by_parsing() -> None:
    record = {"messages": [{**ASSISTANT, "weight": 0, "tool_calls": [{"name": "f", "arguments": "{}"}]}]}
    before = json.dumps(record)
    parse(record)
    assert json.dumps(record) == before


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages({"role": "user", "content": parts}) == [{"role": "user", "content": "ab"}]


def test_tool_calls_have_objects_as_arguments_and_need_no_content() -> None:
    call = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": [2]}'}}
    parsed = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
    assert messages({"role": "assistant", "content": None, "tool_calls": [call]}) == [
        {"role": "assistant", "tool_calls": [parsed]}
    ]
    assert messages({"role": "assistant", "content": "Let me see", "tool_calls": [parsed]}) == [
        {"role": "assistant", "content": "Let me see", "tool_calls": [parsed]}
    ]
    assert messages({"role": "assistant", "tool_calls": [{"name": "now", "arguments": None}]}) == [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    ]


CITY = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "unit": None}}}
CITY_TEXT = '{"city": "Oslo", "unit": null}'


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": CITY_TEXT}}]}, CITY),
        ({"tool_calls": [json.dumps(CITY)]}, CITY),
        ({"tool_calls": json.dumps([CITY])}, CITY),
        ({"tool_calls": [{"id": "c", "name": "f", "arguments": {"a": 1}}]},
         {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}),
        ({"tool_calls": [{"function": {"name": "f", "parameters": {"a": 1}}}]},
         {"function": {"name": "f", "arguments": {"a": 1}}}),
        ({"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, {"function": {"name": "f", "arguments": {}}}),
        ({"tool_calls": [{"function": {"name": "f", "arguments": " \n"}}]},
         {"function": {"name": "f", "arguments": {}}}),
        ({"function_call": {"name": "f", "arguments": CITY_TEXT}}, CITY),
        ({"function_call": {"name": "f", "arguments": ""}},
         {"type": "function", "function": {"name": "f", "arguments": {}}}),
        ({"function_call": json.dumps(CITY["function"]), "tool_calls": []}, CITY),
        ({"function_call": "null", "tool_calls": [CITY]}, CITY),
        ({"function_call": CITY["function"], "tool_calls": "null"}, CITY),
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "Let me see."}])
def test_calls_of_every_form_have_nested_functions_and_objects(
    call: dict[str, Any], expected: dict[str, Any], content: dict[str, Any]
) -> None:
    text = {key: value for key, value in content.items() if value is not None}
    assert messages({"role": "assistant", **content, **call}) == [
        {"role": "assistant", **text, "tool_calls": [expected]}
    ]


def test_the_older_form_of_function_calls_is_read_as_tools_calls_and_results() -> None:
    function = {"name": "f", "parameters": {}}
    record = {
        "messages": [
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": "Let me see.", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "f", "content": "1"},
            {"role": "assistant", "content": "one", "function_call": None},
        ],
        "functions": [function],
    }
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    expected = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "assistant", "content": "one"},
    ]
    assert parse(record) == Conversation(expected, [{"type": "function", "function": function}], None)


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, True),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0, "train": False}, False),
        ({"weight": 1.0, "train": None}, True),
    ],
)
def test_an_assistant_message_can_be_excluded_from_training(keys: dict[str, Any], trained: bool) -> None:
    expected = ASSISTANT if trained else {**ASSISTANT, "train": False}
    assert messages({**USER, **keys}, {**ASSISTANT, **keys}) == [USER, expected]


MALFORMED: list[tuple[Any, str]] = [
    # train and weight
    ([USER, {**ASSISTANT, "weight": math.nan}], "message 2 (assistant): weight is NaN, not 0 or 1"),
    ([USER, {**ASSISTANT, "weight": math.inf}], "message 2 (assistant): weight is Infinity"),
    ([USER, {**ASSISTANT, "weight": 0.5}], "message 2 (assistant): weight is 0.5"),
    ([USER, {**ASSISTANT, "weight": "x"}], 'message 2 (assistant): weight is "x"'),
    ([USER, {**ASSISTANT, "weight": True}], "message 2 (assistant): weight is true"),
    ([USER, {**ASSISTANT, "train": "no"}], 'message 2 (assistant): train is "no"'),
    ([USER, {**ASSISTANT, "train": 0}], "message 2 (assistant): train is 0"),
    ([USER, {**ASSISTANT, "train": True, "weight": 0}], "message 2 (assistant): train is true and weight is 0"),
    # messages, roles, contents
    ({"role": "user"}, "no `messages` list"),
    (["Hi"], 'message 1 is "Hi", not an object'),
    ([None], "message 1 is null, not an object"),
    ([USER, {"role": "bot", "content": "x"}], 'message 2 has the unknown role "bot"'),
    ([{"content": "x"}], "message 1 has the unknown role null"),
    ([{"role": ["user"], "content": "x"}], 'message 1 has the unknown role ["user"]'),
    ([{"role": "Anv\u00e4ndare\n", "content": "x"}], 'message 1 has the unknown role "Anv\\u00e4ndare\\n"'),
    ([{"role": "user", "content": None}], "message 1 (user): content is null"),
    ([{"role": "user"}], "message 1 (user): content is null"),
    ([{"role": "user", "content": ["a"]}], 'message 1 (user): content is ["a"]'),
    ([{"role": "user", "content": "\ud800"}], "message 1 (user) contains half a surrogate pair, \\ud800"),
    ([{**USER, "x": ["\udfff"]}], "message 1 (user) contains half a surrogate pair, \\udfff"),
    ([{**USER, "x": {"\udfff": 1}}], "message 1 (user) contains half a surrogate pair, \\udfff"),
    ([{**USER, "x": b"a"}], "message 1 (user) contains a value of type bytes"),
    ([{**USER, "x": ValueError("no")}], "message 1 (user): no"),
    ([{"role": "user", "content": [TEXT, {"type": "image_url"}]}], "message 1 (user): part 2 of content is of type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "message 1 (user): part 1 of content: text is null"),
    # tool calls
    ([{**USER, "tool_calls": [{"name": "f"}]}], "message 1 (user): only an assistant message"),
    ([{**ASSISTANT, "tool_calls": "f"}], 'message 1 (assistant): tool_calls is "f"'),
    ([{**ASSISTANT, "tool_calls": [{"function": None}]}], 'message 1 (assistant): tool call 1 is {"function": null}'),
    ([call("{}"), call('{"a": 1')], "message 2 (assistant): tool call 1: arguments: not JSON"),
    ([call('{"a": 1, "a": 2}')], 'message 1 (assistant): tool call 1: arguments: an object has the key "a" twice'),
    ([call("[1]")], "message 1 (assistant): tool call 1: arguments is [1]"),
    ([{**call("{}"), "function_call": {"name": "f"}}], "message 1 (assistant) has both function_call and tool_calls"),
    ([{**USER, "function_call": {"name": "f"}}], "message 1 (user): only an assistant message"),
    ([{**ASSISTANT, "function_call": "f"}], "message 1 (assistant): function_call: not JSON"),
    ([{**ASSISTANT, "function_call": {"arguments": ""}}], "message 1 (assistant): tool call 1 is"),
    ([{"role": "function_call", "content": "[]"}], 'message 1 (function_call): content is "[]", which has no call'),
    ([{"role": "tool_call", "content": "{}", "tool_calls": [1]}], "message 1 (function_call) has both this role"),
    (['{"role": "user", "content"}'], "messages: element 1: not JSON"),
]


@pytest.mark.parametrize(("items", "start"), MALFORMED)
def test_a_malformed_message_is_reported_with_its_number(items: Any, start: str) -> None:
    assert complaint({"messages": items}).startswith(start)


def test_deep_nesting_is_an_error() -> None:
    value: Any = "x"
    for _ in range(900):
        value = [value]
    assert "nested too deeply" in complaint({"messages": [{**USER, "x": value}]})
    assert "content is [[[" in complaint({"messages": [{"role": "user", "content": value}]})


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_are_a_list_or_its_text(tools: Any) -> None:
    for record in (
        {"messages": [USER]},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"prompt": "x", "completion": "y"},
        {"instruction": "x", "output": "y"},
    ):
        assert parse({**record, "tools": tools}).tools == [TOOL]
        assert parse({**record, "tools": "" if isinstance(tools, str) else []}).tools is None


@pytest.mark.parametrize(
    ("tools", "start"),
    [
        ("add", "tools: not JSON: Expecting value at character 1"),
        ({"name": "x"}, 'tools is {"name": "x"}, not a list of objects'),
        (["add"], 'tools is ["add"], not a list of objects'),
        ([{"name": "\ud800"}], "tools contains half a surrogate pair"),
        ([{"name": b"x"}], "tools contains a value of type bytes"),
    ],
)
def test_malformed_tools_are_an_error(tools: Any, start: str) -> None:
    assert complaint({"messages": [USER], "tools": tools}).startswith(start)


@pytest.mark.parametrize("column", ["functions", "tool_defs", "available_tools"])
def test_tools_of_other_columns_are_wrapped_and_merged_with_nothing(column: str) -> None:
    bare, row = TOOL["function"], {"messages": [USER]}
    for tools in ([bare], [TOOL], [{"type": "function", **bare}], [json.dumps(bare)], json.dumps([bare])):
        assert parse({**row, column: tools, "tools": None}).tools == [TOOL]
    assert parse({**row, column: [bare], "tools": [TOOL]}).tools == [TOOL]
    assert f"both tools and {column}" in complaint({**row, column: [{"name": "other"}], "tools": [TOOL]})
    assert parse({**row, column: [{"name": "other"}], "mine": [TOOL]}, {"tools": "mine"}).tools == [TOOL]
    assert column in read_columns("messages", {})
    assert column not in read_columns("messages", {"tools": "mine"})


def test_each_format_of_turns_knows_the_keys_of_the_other() -> None:
    turns = [{"from": "human", "value": "Hi"}, ASSISTANT]
    for column in ("messages", "conversations"):
        assert parse({column: turns}).messages == [USER, ASSISTANT]
    assert complaint({"messages": [{"from": "gpt", "value": 3}]}).startswith("message 1 (assistant): value is 3")


def test_python_notation_in_place_of_json_is_named() -> None:
    for record in ({"messages": str([USER])}, {"conversations": str([USER])}, {"messages": [], "tools": str([TOOL])}):
        assert complaint(record).endswith("write it by json.dumps")


def test_a_table_of_turns_is_read_as_the_list_of_its_rows() -> None:
    # The type Sequence of older data sets of HF `datasets`.
    assert parse({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Yo"]}}).messages == [USER, ASSISTANT]
    assert "no `messages` list" in complaint({"messages": {"role": ["user"], "content": []}})


def test_elements_of_lists_may_be_the_json_text_of_objects() -> None:
    texts = [json.dumps(USER), json.dumps(ASSISTANT)]
    shared = {"role": "user", "content": "Hi"}
    turns = ['{"from": "human", "value": "Hi"}', '{"from": "gpt", "value": "Yo"}']
    for record in ({"messages": texts}, {"messages": [shared, texts[1]]}, {"conversations": turns},
                   {"prompt": texts[:1], "completion": texts[1:]}):  # fmt: skip
        assert parse(record).messages == [USER, ASSISTANT]
    assert parse({"prompt": texts[0], "completion": "Yo"}).messages[0]["content"] == texts[0], "a prompt is text"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (None, None),
        ("x", "x"),
        (3, "3"),
        (1.5, "1.5"),
        (True, "true"),
        (["b", "\u00e4"], '["b", "\u00e4"]'),
        ({"b": 1, "a": None}, '{"a": null, "b": 1}'),
    ],
)
def test_the_origin_of_a_row_becomes_text(source: Any, text: str | None) -> None:
    assert parse({"messages": [], "source": source}).source == text
    assert parse({"messages": [], "dataset": source}, {"source": "dataset"}).source == text


def test_an_origin_that_json_cannot_have_is_an_error() -> None:
    assert "source contains a value of type bytes" in complaint({"messages": [], "source": b"x"})
    assert "source contains half a surrogate" in complaint({"messages": [], "source": "\ud800"})


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("User", "Assistant"), ("user", "assistant")),
        (("HUMAN", "GPT"), ("user", "assistant")),
        ((" user ", "ChatGPT"), ("user", "assistant")),
        (("System", "Prompter"), ("system", "user")),
        (("Tool", "Observation"), ("tool", "tool")),
    ],
)
def test_roles_are_known_in_any_capitalization(names: tuple[str, str], roles: tuple[str, str]) -> None:
    assert messages(*({"role": name, "content": "x"} for name in names)) == [
        {"role": role, "content": "x"} for role in roles
    ]


KTO = {"prompt": "q", "completion": "No", "label": False}
CHOSEN, REJECTED = [USER, ASSISTANT], [USER, {**ASSISTANT, "content": "No"}]


@pytest.mark.parametrize(
    "record",
    [
        KTO,
        {**KTO, "label": True},
        {**KTO, "label": "False"},
        {"messages": CHOSEN, "label": False},
        {"messages": CHOSEN, "kto_tag": True},
    ],
)
def test_kto_rows_are_refused_by_name(record: dict[str, Any]) -> None:
    assert "KTO" in complaint(record)
    assert parse({**record, "label": None, "kto_tag": None}).messages


def test_a_label_that_is_no_mark_of_answers_is_another_column() -> None:
    assert parse({**KTO, "label": 0}).messages == [{"role": "user", "content": "q"}, {**ASSISTANT, "content": "No"}]
    record = {"prompt": "Is it?", "label": "true"}
    assert parse(record, {"completion": "label"}).messages[1] == {"role": "assistant", "content": "true"}


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"chosen": CHOSEN, "rejected": REJECTED}, {"messages": "chosen"}),
        ({"prompt": "Hi", "chosen": CHOSEN, "rejected": REJECTED}, {"messages": "chosen"}),
        ({"prompt": [USER], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]}, {"completion": "chosen"}),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, {"completion": "chosen"}),
        ({"prompt": "Hi", "chosen_response": "Yo", "rejected_response": "No"}, {"completion": "chosen_response"}),
        ({"instruction": "Hi", "chosen": "Yo", "rejected": "No"}, {"output": "chosen"}),
        ({"chosen": json.dumps(CHOSEN), "rejected": json.dumps(REJECTED)}, {"messages": "chosen"}),
    ],
)
def test_preference_rows_are_refused_with_the_setting_that_takes_the_preferred_answer(
    record: dict[str, Any], columns: dict[str, str]
) -> None:
    message = complaint(record)
    ((name, column),) = columns.items()
    assert message.startswith("a preference row: ")
    assert f'columns = {{ {name} = "{column}" }}' in message
    assert parse(record, columns).messages == [USER, ASSISTANT]
    # Also where the format is set, so that nothing is detected.
    with pytest.raises(ValueError, match="preference"):
        parse_record(record, "sharegpt", {}, {})


def test_other_preference_rows_are_refused_and_whole_conversations_are_read() -> None:
    turn = {"from": "gpt", "value": "Yo"}
    assert "append" in complaint({"conversations": [turn], "chosen": turn, "rejected": turn})
    assert 'prompt = "..."' in complaint({"question": "Hi", "chosen": "Yo", "rejected": "No"})
    record = {"messages": CHOSEN, "chosen": CHOSEN, "rejected": REJECTED, "score_chosen": 3.5}
    assert parse(record).messages == CHOSEN
    assert read_columns("messages", {}).isdisjoint({"chosen", "rejected"})


def test_sharegpt_turns_have_other_names() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 2, "y": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4!", "weight": 0},
            {"from": "user", "value": "Sure?"},
            {"from": "chatgpt", "value": "Yes"},
        ],
        "system": "Add.",
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 2, "y": 2}}}
    assert parse(record).messages == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "4!", "train": False},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    assert parse({"conversations": [USER, ASSISTANT], "system": ""}).messages == [USER, ASSISTANT]
    function = {"name": "add", "arguments": {"x": 2, "y": 2}}
    for value in (function, [function], json.dumps([function])):
        assert parse({"conversations": [{"from": "tool_call", "value": value}]}).messages == [
            {"role": "assistant", "tool_calls": [call]}
        ]
    assert parse({"conversations": json.dumps([USER])}).messages == [USER]


@pytest.mark.parametrize(
    ("record", "start"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, 'message 1 has the unknown role "alien"'),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "message 1 (assistant): value is 3, not a string"),
        ({"conversations": ["x"]}, 'message 1 is "x", not an object with from and value'),
        ({"conversations": "x"}, "conversations: not JSON: Expecting value at character 1"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "message 1 (function_call): not JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "message 1 (assistant): tool call 1 is"),
        ({"conversations": [], "system": 3}, "system is 3, not a string"),
        (
            {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
            "both the column system and message 1",
        ),
    ],
)
def test_a_malformed_sharegpt_row_is_an_error(record: dict[str, Any], start: str) -> None:
    assert complaint(record).startswith(start)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "Hi", "output": "Yo"},
        {"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]},
    ],
)
def test_every_format_reads_the_column_system_once(record: dict[str, Any]) -> None:
    assert parse({**record, "system": "S"}).messages == [{"role": "system", "content": "S"}, USER, ASSISTANT]


def test_two_system_prompts_are_an_error_that_names_the_way_out() -> None:
    record = {"messages": [{"role": "system", "content": "a"}], "system": "b"}
    assert 'columns = { system = "none" }' in complaint(record)
    assert parse(record, {"system": "none"}).messages == record["messages"]


def test_alpaca_is_one_exchange_after_its_history() -> None:
    record = {"instruction": "Add", "input": "2 2", "output": "4", "system": "s", "history": [["a", "b"]]}
    assert parse(record).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Add\n2 2"},
        {"role": "assistant", "content": "4"},
    ]
    assert parse({**record, "history": '[["a", "b"]]'}) == parse(record)
    assert parse({"instruction": "Hi", "input": "", "output": "Yo", "history": ""}).messages == [USER, ASSISTANT]
    assert complaint({"instruction": "x", "output": 4}) == "output is 4, not a string"
    assert complaint({"instruction": "x", "output": ValueError("broken cell")}) == "output is broken cell, not a string"
    assert complaint({"instruction": "x", "output": "y", "history": [["a"]]}) == (
        'history is [["a"]], not a list of [instruction, output] pairs'
    )


def test_only_the_completion_of_a_prompt_is_trained() -> None:
    assert parse({"prompt": "Hi", "completion": "Yo"}).messages == [USER, ASSISTANT]
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT, USER, {**ASSISTANT, "weight": 0}]}
    untrained = {**ASSISTANT, "train": False}
    assert parse(record).messages == [USER, untrained, USER, ASSISTANT, USER, untrained]
    assert complaint({"prompt": "x", "completion": 3}) == "completion is 3, not a string"
    assert complaint({"prompt": [USER], "completion": ["x"]}) == (
        'message 2 is "x", not an object with role and content'
    )


def test_columns_and_roles_may_have_other_names() -> None:
    columns = {"messages": "dialog", "role": "speaker", "content": "text", "weight": "loss"}
    record = {"dialog": [{"speaker": "A", "text": "Hi"}, {"speaker": "B", "text": "Yo", "loss": 0}]}
    roles = {"A": "user", "B": "assistant"}
    assert parse(record, columns, roles).messages == [USER, {**ASSISTANT, "train": False}]
    message = complaint({"dialog": [{"speaker": "C"}]}, columns=columns, roles=roles)
    assert 'unknown role "C"; set roles = { "C" = "assistant" }' in message
    assert message.endswith("tool_call, A, B")
    # A mapping may give a known name another meaning.
    assert parse({"messages": [USER]}, {}, {"user": "assistant"}).messages == [{**ASSISTANT, "content": "Hi"}]
    record = {"chat": [{"who": "human", "says": "Hi"}], "persona": "p"}
    columns = {"conversations": "chat", "from": "who", "value": "says", "system": "persona"}
    assert parse(record, columns).messages == [{"role": "system", "content": "p"}, USER]
    assert parse({"question": "Hi", "answer": "Yo"}, {"prompt": "question", "completion": "answer"}).messages == [
        USER,
        ASSISTANT,
    ]


def test_a_row_in_another_format_is_an_error() -> None:
    for format, start in (
        ("messages", "no `messages` list"),
        ("sharegpt", "no `conversations` list"),
        ("alpaca", "instruction is null, not a string"),
        ("prompt_completion", "prompt is null, not a string"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(start)):
            parse_record({"text": "x", "day": datetime.date(2024, 1, 1)}, format, {}, {})


def test_a_mapping_of_unknown_names_is_an_error() -> None:
    key = "data.sources[0]"
    check_mapping("auto", {"messages": "x", "from": "y", "prompt": "z"}, {"A": "user"}, key)
    cases: list[tuple[str, dict[str, str], dict[str, str], str]] = [
        ("chat", {}, {}, '.format = "chat"'),
        ("alpaca", {"messages": "x"}, {}, '.columns: "messages"'),
        ("auto", {"mesages": "x"}, {}, '.columns: "mesages"'),
        ("auto", {"message": "x"}, {}, '.columns: "message"'),
        ("auto", {"messages": ""}, {}, '.columns: messages is ""'),
        ("auto", {}, {"A": "bot"}, '.roles: "A" is "bot"'),
    ]
    for format, columns, roles, message in cases:
        with pytest.raises(ValueError, match="^" + re.escape(key + message)):
            check_mapping(format, columns, roles, key)
    with pytest.raises(ValueError, match=r"did you mean messages\?"):
        check_mapping("messages", {"message": "x"}, {}, key)


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("messages", {"dialog": [{"who": "a", "says": None}]}),
        ("messages", {"dialog": '[{"who": "a"}]', "says": "b"}),
        ("sharegpt", {"dialog": {"who": ["a"], "says": [None]}}),
        ("prompt_completion", {"prompt": "x", "dialog": [{"who": "a"}]}),
        ("messages", {"dialog": 3}),
    ],
)
def test_mapped_names_are_found_in_rows_and_messages(format: str, record: dict[str, Any]) -> None:
    list_name = {"sharegpt": "conversations", "prompt_completion": "completion"}.get(format, "messages")
    columns = {list_name: "dialog", "role": "who", "weight": "says", "source": "origin"}
    assert mapped_columns(format, columns) == {"dialog", "dialog[].who", "dialog[].says", "origin"}
    found = mapped_columns(format, columns) & filled_names(record, format, columns)
    assert found == {"dialog"} | ({"dialog[].who"} if record["dialog"] != 3 else set())
