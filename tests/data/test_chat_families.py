"""Chat templates of well-known families: ids against transformers' apply_chat_template, trained text by literals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.chat_tokenizer import ChatTokenizer
from tests.data.chat_families import BEGIN, END, FAMILIES, calls, chat, make_family
from tests.properties import examples

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f0",
            "description": "Adds \u4e2d <b> & 'c'",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
ASSISTANT = "<\uff5cAssistant\uff5c>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTokenizer, Any]]:
    """A tokenizer with merges of each family that trains every token, and transformers' of the same folder."""
    from transformers import AutoTokenizer

    pairs = {}
    for family in FAMILIES:
        folder = make_family(family, tmp_path_factory.mktemp(family), vocab_size=300)
        pairs[family] = ChatTokenizer(folder, "all"), AutoTokenizer.from_pretrained(folder)
    return pairs


texts = st.text(alphabet=st.sampled_from("ab user\n\t:'1\u00e9\u4e2d\U0001f600\u00a0{\"}"), max_size=10)
contents = texts | st.sampled_from(["<think>\nwhy\n</think>\n\nb", "<tool_response>x</tool_response>"])
arguments = st.sampled_from([{"a": 1, "b": "\u4e2d"}, '{"a": 1}'])
said = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), contents)
others = st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["tool", "system"]), texts)
called = st.builds(
    lambda values, text: calls(*values, content=text), st.lists(arguments, min_size=1, max_size=2), texts
)
reasoned = st.builds(
    lambda field, why, text: {"role": "assistant", field: why, "content": text},
    st.sampled_from(["reasoning_content", "reasoning", "thinking"]),
    texts,
    texts,
)
conversations = st.lists(said | said | others | called | reasoned, min_size=1, max_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@given(messages=conversations, tools=st.sampled_from([None, TOOLS, TOOLS * 2, []]))
@examples(30)
def test_ids_equal_transformers_and_rejections_are_errors(
    merging: dict[str, tuple[ChatTokenizer, Any]], family: str, messages: list[dict[str, Any]], tools: Any
) -> None:
    tokenizer, oracle = merging[family]
    try:
        expected = oracle.apply_chat_template(messages, tools=tools, return_dict=False)
    except Exception:
        with pytest.raises(ValueError, match=r"^the chat template rejects the conversation: "):
            tokenizer.encode(messages, tools)
        return
    ids, mask = tokenizer.encode(messages, tools)
    assert ids.tolist() == expected
    assert mask.all()


def trained(folder: Path, messages: list[dict[str, Any]], train_on: str = "assistant", tools: Any = None) -> str:
    tokenizer = ChatTokenizer(folder, train_on)
    ids, mask = tokenizer.encode(messages, tools)
    return tokenizer.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)


# What each family writes for an answer "<text>" after the prompt that asks for it.
ANSWERS = {
    "chatml": lambda text: text + "<|im_end|>",
    "llama3_1": lambda text: text.strip() + "<|eot_id|>",
    "qwen2_5": lambda text: text + "<|im_end|>",
    "deepseek_v2": lambda text: " " + text + END,
    "deepseek_v3": lambda text: text + END,
    "deepseek_v3_1": lambda text: text + END,
}


@pytest.mark.parametrize("family", ANSWERS)
@given(turns=st.lists(texts, min_size=2, max_size=6), system=st.none() | texts, tools=st.sampled_from([None, TOOLS]))
@examples(30)
def test_only_answers_and_their_end_tokens_are_trained(
    folders: dict[str, Path], family: str, turns: list[str], system: str | None, tools: Any
) -> None:
    messages = chat(*turns)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    answers = [ANSWERS[family](text) for text in turns[1::2]]
    assert trained(folders[family], messages, tools=tools) == "".join(answers)
    assert trained(folders[family], messages, "last", tools) == answers[-1]
    for message in messages:
        message.update({"train": False} if message["role"] == "assistant" and message["content"] != turns[1] else {})
    expected = [answer for answer, text in zip(answers, turns[1::2], strict=True) if text == turns[1]]
    assert trained(folders[family], messages, tools=tools) == "".join(expected)


QWEN_CALL = '<tool_call>\n{"name": "f0", "arguments": {"a": 1}}\n</tool_call>'
USES_TOOL = [*chat("add"), calls({"a": 1}, content=""), {"role": "tool", "content": "2"}, *chat("", "Two")[1:]]
USES_TOOL_TEXT = [*chat("add"), calls('{"a": 1}', content=""), *USES_TOOL[2:]]


@pytest.mark.parametrize(
    ("family", "messages", "expected"),
    [
        ("qwen2_5", USES_TOOL, [QWEN_CALL + "<|im_end|>", "Two<|im_end|>"]),
        # The last turn alone is given the place for its reasoning.
        ("qwen3", USES_TOOL, [QWEN_CALL + "<|im_end|>", "<think>\n\n</think>\n\nTwo<|im_end|>"]),
        ("llama3_1", USES_TOOL, ['{"name": "f0", "parameters": {"a": 1}}<|eot_id|>', "Two<|eot_id|>"]),
        (
            "deepseek_v3_1",
            USES_TOOL_TEXT,
            [
                "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>f0"
                '<\uff5ctool\u2581sep\uff5c>{"a": 1}<\uff5ctool\u2581call\u2581end\uff5c>'
                "<\uff5ctool\u2581calls\u2581end\uff5c>" + END,
                "Two" + END,
            ],
        ),
        ("chatml", [*chat("a", "b"), {"role": "assistant", "content": "c"}], ["b<|im_end|>", "c<|im_end|>"]),
        ("llama3_1", [*chat("a", " "), {"role": "assistant", "content": "c"}], ["<|eot_id|>", "c<|eot_id|>"]),
        ("qwen3", chat("a", "b", "c", "d"), ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
        ("qwen3", chat("a", "<think>\nw\n</think>\n\nb"), ["<think>\nw\n</think>\n\nb<|im_end|>"]),
        ("deepseek_v3_1", chat("a", "b", "</think>c", "d"), ["b" + END, "d" + END]),
    ],
)
def test_tool_calls_and_answers_in_a_row_are_trained(
    folders: dict[str, Path], family: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    tools = TOOLS if "qwen" in family else None
    assert trained(folders[family], messages, tools=tools) == "".join(expected)
    assert trained(folders[family], messages, "last", tools) == expected[-1]


def test_a_tool_call_without_content_is_one_with_empty_content(folders: dict[str, Path]) -> None:
    bare = [{key: value for key, value in message.items() if value != ""} for message in USES_TOOL]
    assert "content" not in bare[1]
    for family in ("qwen2_5", "qwen3", "llama3_1"):
        assert trained(folders[family], bare) == trained(folders[family], USES_TOOL)
    assert trained(folders["qwen3"], [*bare[:1], {**bare[1], "content": None}, *bare[2:]]).startswith(QWEN_CALL)


def test_dropped_earlier_reasoning_is_an_error_unless_only_the_last_turn_is_trained(folders: dict[str, Path]) -> None:
    messages = chat("a", "<think>\nw\n</think>\n\nb", "c", "<think>\nv\n</think>\n\nd")
    with pytest.raises(ValueError, match=r"changes message 2 \(assistant\)"):
        trained(folders["qwen3"], messages)
    last = "<think>\nv\n</think>\n\nd<|im_end|>"
    assert trained(folders["qwen3"], messages, "last") == last
    assert trained(folders["qwen3"], [messages[0], {**messages[1], "train": False}, *messages[2:]]) == last
    field = [messages[0], {"role": "assistant", "reasoning": "w", "content": "b"}, *messages[2:]]
    with pytest.raises(ValueError, match=r"changes message 2 \(assistant\)"):
        trained(folders["qwen3"], field)
    assert trained(folders["qwen3"], field, "last") == last


def test_a_prompt_that_begins_a_reasoning_without_answer_is_an_error(folders: dict[str, Path]) -> None:
    for train_on in ("assistant", "last"):
        with pytest.raises(ValueError, match=r"renders message 2 \(assistant\) differently from its prompt"):
            trained(folders["deepseek_r1"], chat("a", "<think>\nw\n</think>\n\nb"), train_on)
    assert trained(folders["deepseek_r1"], chat("a", "<think>w</think>b"), "all") == (
        BEGIN + "<\uff5cUser\uff5c>a" + ASSISTANT + "b" + END
    )


def test_tool_calls_that_a_template_drops_are_an_error(folders: dict[str, Path]) -> None:
    for family in ("chatml", "deepseek_v2", "deepseek_v3"):
        with pytest.raises(ValueError, match=r"drops the call of 'f0' in message 2"):
            trained(folders[family], USES_TOOL)
        assert "Two" in trained(folders[family], USES_TOOL, "last")


def test_the_day_does_not_enter_the_text(folders: dict[str, Path], tmp_path: Path) -> None:
    # Llama 3.2 asks for the day where it can and falls back to a fixed date.
    template = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}"
    folder = make_family("llama3_1", tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    assert trained(folder, chat("a"), "all") == "26 Jul 2024"
    assert "Today Date: 26 Jul 2024\n\n" in trained(folders["llama3_1"], chat("a"), "all")
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    with pytest.raises(ValueError, match="'strftime_now' is undefined"):
        trained(folder, chat("a"), "all")
