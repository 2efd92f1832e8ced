"""The ready training templates: the text of their families' own templates, and what of it is trained."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.chat_template import ChatTemplate, plain_messages
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.files import READY_TEMPLATES, chat_template_file
from hbp_titan.data.sentinels import read_rendering, unused_alphabet
from hbp_titan.data.template_probes import served_template
from hbp_titan.data.tokenizer import TokenizerFolder
from hbp_titan.job_config import Data
from tests.data.test_chat_tokenizer import (
    BOS_TEXT,
    EOS_TEXT,
    TEMPLATES,
    TOOLS,
    arguments,
    calls,
    chat,
    conversations,
    make_family,
    reference,
    texts,
)
from tests.properties import examples

OWN = {
    "chatml": "chatml",
    "llama3": "llama3_1",
    "qwen2_5": "qwen2_5",
    "qwen3": "qwen3",
    "deepseek_v3": "deepseek_v3",
    "r1_distill": "deepseek_r1",
}
MARKS = unused_alphabet("")
SPECIAL = {"bos_token": BOS_TEXT, "eos_token": EOS_TEXT}


def compiled(source: str, date: str = "2024-07-26") -> ChatTemplate:
    return ChatTemplate(TokenizerFolder(Path("folder"), SPECIAL, source), date)


@cache
def ready_template(name: str) -> ChatTemplate:
    return compiled((chat_template_file(name) or Path()).read_text())


@cache
def family_template(name: str) -> ChatTemplate:
    return compiled((TEMPLATES / f"{OWN[name]}.jinja").read_text())


def text(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    return template.render(plain_messages(messages), tools, **options)


def trained(name: str, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> list[str]:
    """The pieces of text that are trained."""
    found = read_rendering(
        text(ready_template(name), messages, tools, sentinels=MARKS.block, variables=variables), MARKS
    )
    return [found.text[start:end] for start, end in found.blocks]


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def assistant(content: str, reasoning: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | ({} if reasoning is None else {"reasoning_content": reasoning})


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any, prompt: bool, **variables: Any) -> Any:
    try:
        return text(template, messages, tools, add_generation_prompt=prompt, variables=variables)
    except ValueError:
        return None


VARIABLES = st.sampled_from([{}, {}, {"enable_thinking": False}, {"enable_thinking": True}, {"date_string": "1 May"}])


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2_5", "qwen3"])
@given(
    messages=conversations, tools=st.sampled_from([None, TOOLS, TOOLS * 2]), prompt=st.booleans(), variables=VARIABLES
)
@examples(100)
def test_text_equals_that_of_the_familys_own_template(
    name: str, messages: list[dict[str, Any]], tools: Any, prompt: bool, variables: dict[str, Any]
) -> None:
    own, ready = (
        rendered(group(name), messages, tools, prompt, **variables) for group in (family_template, ready_template)
    )
    if own is None or ready is None:
        # Contradictory alone: reasoning in an answer that is asked for without.
        assert own is None or variables.get("enable_thinking") is False
    else:
        assert ready == own


@st.composite
def deepseek_conversations(draw: st.DrawFn, results: int = 2) -> list[dict[str, Any]]:
    """Exchanges of which one, at most, has a turn with two calls: own templates garble others."""
    number, messages = draw(st.integers(1, 4)), []
    calling = draw(st.integers(-1, number - 1))
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for index in range(number):
        messages.append({"role": "user", "content": draw(texts)})
        if index == calling:
            messages += [calls('{"a": 1}', "{}"), *(tool(draw(texts)) for _ in range(results))]
        if index < number - 1 or draw(st.booleans()):
            messages.append(assistant(draw(texts)))
    return messages


def null_content(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As DeepSeek's own templates want calls."""
    return [{"content": None, **message} for message in messages]


@given(messages=deepseek_conversations(), prompt=st.booleans())
@examples(100)
def test_text_equals_deepseek_v3s_own(messages: list[dict[str, Any]], prompt: bool) -> None:
    own = family_template("deepseek_v3").render(null_content(messages), add_generation_prompt=prompt)
    assert text(ready_template("deepseek_v3"), messages, add_generation_prompt=prompt) == own


THOUGHT = re.compile("<think>\n[^<]*\n</think>\n\n")


@given(messages=deepseek_conversations(), prompt=st.booleans(), data=st.data())
@examples(100)
def test_text_equals_deepseek_r1s_own_but_for_the_reasoning_of_the_last_exchange(
    messages: list[dict[str, Any]], prompt: bool, data: st.DataObject
) -> None:
    asked = max(k for k, message in enumerate(messages) if message["role"] == "user")
    own, reasoned = [*messages], [*messages]
    for index, message in enumerate(messages):
        reasoning = data.draw(st.sampled_from([None, "R", "R1\nR2"]))
        if message["role"] != "assistant" or reasoning is None:
            continue
        if "content" in message and data.draw(st.booleans()):
            answer = message["content"].lstrip("\n")
            own[index] = assistant(answer)
            reasoned[index] = assistant(f"<think>\n{reasoning}\n</think>\n\n{answer}")
        else:
            reasoned[index] = {**message, "reasoning_content": reasoning}
        if index < asked:
            own[index] = reasoned[index]
    ready = text(ready_template("r1_distill"), reasoned, add_generation_prompt=prompt)
    before = family_template("r1_distill").render(null_content(own[: asked + 1]))
    assert ready.startswith(before)
    expected = family_template("r1_distill").render(null_content(own), add_generation_prompt=prompt)
    assert before + THOUGHT.sub("", ready[len(before) :]) == expected
    # What is trained first in the last exchange continues what the own template asks with.
    asks = family_template("r1_distill").render(null_content(own[: asked + 1]), add_generation_prompt=True)
    if len(messages) > asked + 1:
        assert ready.startswith(asks)
        found = read_rendering(text(ready_template("r1_distill"), reasoned, sentinels=MARKS.block), MARKS)
        assert len(asks) in [start for start, _ in found.blocks]


CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, OUTPUT_BEGIN, OUTPUT_END, OUTPUTS_BEGIN, OUTPUTS_END, SEP = (
    f"<\uff5ctool\u2581{name}\uff5c>".replace(" ", "\u2581")
    for name in (
        *("call begin", "call end", "calls begin", "calls end"),
        *("output begin", "output end", "outputs begin", "outputs end", "sep"),
    )
)


def deepseek_call(number: int, arguments: str) -> str:
    return f"{CALL_BEGIN}function{SEP}f{number}\n```json\n{arguments}\n```{CALL_END}"


QWEN_CALL = '<tool_call>\n{"name": "f0", "arguments": {"a": 1}}\n</tool_call>'
# Two questions, the first with two turns of calls.
AGENT = [
    *chat("q"),
    calls({"a": 1}, content="I will"),
    tool("r"),
    calls({"a": 1}),
    tool("s"),
    assistant("b"),
    *chat("c", "d"),
]
REASONED = [*chat("q"), assistant("b", "why"), *chat("c"), calls({"a": 1}, reasoning_content="how"), tool("r")]
REASONED = [*REASONED, assistant("d", "then")]


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("chatml", chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>"]),
        ("llama3", chat("a", " b ", "c", "d"), ["b<|eot_id|>", "d<|eot_id|>"]),
        (
            "llama3",
            [*chat("q"), calls({"a": 1}), tool("r"), assistant("b")],
            ['{"name": "f0", "parameters": {"a": 1}}<|eot_id|>', "b<|eot_id|>"],
        ),
        (
            "qwen2_5",
            AGENT,
            [f"I will\n{QWEN_CALL}<|im_end|>", f"{QWEN_CALL}<|im_end|>", "b<|im_end|>", "d<|im_end|>"],
        ),
        ("qwen3", chat("a", "b"), ["<think>\n\n</think>\n\nb<|im_end|>"]),
        (
            "qwen3",
            REASONED,
            [
                "b<|im_end|>",
                f"<think>\nhow\n</think>\n\n{QWEN_CALL}<|im_end|>",
                "<think>\nthen\n</think>\n\nd<|im_end|>",
            ],
        ),
        ("qwen3", chat("a", "<think>\nw\n</think>\n\nb"), ["<think>\nw\n</think>\n\nb<|im_end|>"]),
        (
            "deepseek_v3",
            AGENT,
            [
                f'I will{CALLS_BEGIN}{deepseek_call(0, """{"a": 1}""")}{CALLS_END}{EOS_TEXT}',
                f'{CALLS_BEGIN}{deepseek_call(0, """{"a": 1}""")}{CALLS_END}{EOS_TEXT}',
                f"b{EOS_TEXT}",
                f"d{EOS_TEXT}",
            ],
        ),
        ("r1_distill", chat("a", "<think>\nr\n</think>\n\nb"), [f"r\n</think>\n\nb{EOS_TEXT}"]),
        ("r1_distill", [*chat("a"), assistant("b", "r")], [f"r\n</think>\n\nb{EOS_TEXT}"]),
        ("r1_distill", chat("a", "b"), [f"\n</think>\n\nb{EOS_TEXT}"]),
        (
            "r1_distill",
            REASONED,
            [
                f"b{EOS_TEXT}",
                f'how\n</think>\n\n{CALLS_BEGIN}{deepseek_call(0, """{"a": 1}""")}{CALLS_END}{EOS_TEXT}',
                f"<think>\nthen\n</think>\n\nd{EOS_TEXT}",
            ],
        ),
    ],
)
def test_exactly_what_the_model_writes_is_trained(
    name: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    assert trained(name, messages) == expected


def test_thinking_that_is_turned_off_is_part_of_the_prompt() -> None:
    assert trained("qwen3", chat("a", "b"), enable_thinking=False) == ["b<|im_end|>"]
    assert trained("qwen3", chat("a", "b", "c", "d"), enable_thinking=False) == ["b<|im_end|>", "d<|im_end|>"]
    with pytest.raises(ValueError, match="enable_thinking"):
        trained("qwen3", chat("a", "<think>\nw\n</think>\n\nb"), enable_thinking=False)


def test_each_turn_of_calls_is_complete_where_the_models_own_template_garbles_them() -> None:
    one = CALLS_BEGIN + deepseek_call(0, '{"a": 1}') + CALLS_END + EOS_TEXT
    user, ask = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
    result = f"{OUTPUTS_BEGIN}{OUTPUT_BEGIN}{{}}{OUTPUT_END}{OUTPUTS_END}"
    assert text(ready_template("deepseek_v3"), AGENT) == (
        f"{BOS_TEXT}{user}q{ask}I will{one}{result.format('r')}{one}{result.format('s')}b{EOS_TEXT}"
        f"{user}c{ask}d{EOS_TEXT}"
    )
    # The second turn continues what the own template asks with.
    first = [*AGENT[:1], calls('{"a": 1}', content=None), tool("r")]
    asked = family_template("r1_distill").render(first, add_generation_prompt=True)
    ready = text(ready_template("r1_distill"), [*AGENT[:1], *AGENT[3:4], *AGENT[2:]]).replace(
        "<think>\n\n</think>\n\n", ""
    )
    assert ready.startswith(asked + one)


def test_llama_tools_may_be_built_in_or_listed_in_the_system_turn() -> None:
    asks = [*chat("q"), calls({"query": "x"}), tool("r"), assistant("b")]
    variables = {"builtin_tools": ["f0", "code_interpreter"]}
    assert trained("llama3", asks, **variables) == ['<|python_tag|>f0.call(query="x")<|eom_id|>', "b<|eot_id|>"]
    shown = text(ready_template("llama3"), asks, variables=variables)
    assert "Environment: ipython\nTools: f0\n\nCutting Knowledge Date" in shown
    listed = text(ready_template("llama3"), asks, TOOLS, variables={"tools_in_user_message": False})
    assert listed.index("You have access to") < listed.index("<|eot_id|>") < listed.index("user<|end_header_id|>\n\nq<")


def test_llama_writes_the_day_of_the_configuration() -> None:
    assert "Today Date: 26 Jul 2024\n\n" in text(ready_template("llama3"), chat("a"))
    template = compiled((chat_template_file("llama3") or Path()).read_text(), "2025-01-31")
    assert "Today Date: 31 Jan 2025\n\n" in text(template, chat("a"))
    assert "Today Date: 1 May\n\n" in text(template, chat("a"), variables={"date_string": "1 May"})


# Through the tokenizer, compared with transformers.


@st.composite
def whole_rows(draw: st.DrawFn, name: str) -> tuple[list[dict[str, Any]], Any]:
    """Conversations with all that the family has a form for."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    number = draw(st.integers(1, 3))
    for index in range(number):
        thinks = index == number - 1 and name in ("qwen3", "r1_distill") and draw(st.booleans())
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2)) if name != "chatml" else 0):
            turn = calls(*draw(st.lists(arguments, min_size=1, max_size=1 if name == "llama3" else 2)))
            turn |= {"reasoning_content": "R"} if thinks else {}
            turn |= {"content": "C"} if name != "llama3" and draw(st.booleans()) else {}
            messages += [turn, *(tool(draw(texts)) for _ in turn["tool_calls"])]
        messages.append(assistant("A" + draw(texts), "R" if thinks else None))
    return messages, draw(st.sampled_from([None, TOOLS])) if name in ("llama3", "qwen2_5", "qwen3") else None


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTokenizer, Any]]:
    found = {}
    for name, own in OWN.items():
        folder = make_family(own, tmp_path_factory.mktemp(name), vocab_size=300)
        found[name] = ChatTokenizer(folder, "assistant", chat_template_file(name)), reference(folder)
    return found


@pytest.fixture(scope="module")
def lasts(pairs: dict[str, tuple[ChatTokenizer, Any]]) -> dict[str, ChatTokenizer]:
    """The tokenizers, training the last turn only."""
    folders = {name: Path(oracle.name_or_path) for name, (_, oracle) in pairs.items()}
    return {name: ChatTokenizer(folder, "last", chat_template_file(name)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", READY_TEMPLATES)
@given(data=st.data())
@examples(30)
def test_ids_and_masks_equal_those_of_transformers(
    pairs: dict[str, tuple[ChatTokenizer, Any]], lasts: dict[str, ChatTokenizer], name: str, data: st.DataObject
) -> None:
    messages, tools = data.draw(whole_rows(name))
    tokenizer, oracle = pairs[name]
    encoded = tokenizer.encode(messages, tools)
    expected = oracle.apply_chat_template(
        messages,
        tools,
        chat_template=(chat_template_file(name) or Path()).read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
        # Its strftime_now is today.
        date_string="26 Jul 2024",
    )
    assert encoded.ids.tolist() == expected["input_ids"]
    assert encoded.loss_mask.astype(int).tolist() == expected["assistant_masks"]
    assert not encoded.notes
    # The same turns, wherever only some are wanted.
    last = [index for index, message in enumerate(messages) if message["role"] == "assistant"][-1]
    untrained = [{**message, "train": False} if index == last else message for index, message in enumerate(messages)]
    start = encoded.turns[-1, 0]
    assert encoded.loss_mask[start:].any()
    for kept, mask in (
        (lasts[name].encode(messages, tools), np.arange(len(encoded.ids)) >= start),
        (tokenizer.encode(untrained, tools), np.arange(len(encoded.ids)) < start),
    ):
        assert kept.loss_mask.tolist() == (encoded.loss_mask & mask).tolist()


# What the exported folder serves with.


@pytest.mark.parametrize(
    ("own", "name", "stays"),
    [
        ("chatml", "chatml", True),
        ("llama3_1", "llama3", True),
        ("qwen2_5", "qwen2_5", True),
        ("qwen3", "qwen3", True),
        # Their own templates garble a second turn of calls.
        ("deepseek_v3", "deepseek_v3", False),
        ("deepseek_r1", "r1_distill", False),
        ("qwen3", "chatml", False),
        ("qwen3", "", True),
    ],
)
def test_the_own_template_is_exported_where_it_asks_as_in_training(
    tmp_path: Path, own: str, name: str, stays: bool
) -> None:
    folder, file = make_family(own, tmp_path), chat_template_file(name)
    served = served_template(folder, file, Data())
    assert served == ("" if stays else (file or Path()).read_text())


def test_the_training_template_is_exported_where_the_own_asks_otherwise(tmp_path: Path) -> None:
    folder, file = make_family("llama3_1", tmp_path), chat_template_file("llama3")
    assert "strftime_now" in served_template(folder, file, Data(template_date="2025-01-31"))
    assert not served_template(folder, file, Data(chat_template_kwargs={"date_string": "1 May"}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert "strftime_now" in served_template(folder, file, Data())
    for broken in ("", "{% for %}"):
        (folder / "chat_template.jinja").write_text(broken)
        assert "strftime_now" in served_template(folder, file, Data())


# Copies of the families' own templates in TRL's package, read as text; nothing of it is imported.
PUBLIC = {"llama3": ("llama3_1", "llama3_2"), "qwen2_5": ("qwen2_5",), "qwen3": ("qwen3",)}


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="needs trl, which has public templates; run: .venv/bin/pip install trl && scripts/run_tests.sh tests/data",
)
@pytest.mark.parametrize("name", PUBLIC)
@given(messages=conversations, tools=st.sampled_from([None, TOOLS]), prompt=st.booleans(), variables=VARIABLES)
@examples(100)
def test_text_equals_that_of_public_templates(
    name: str, messages: list[dict[str, Any]], tools: Any, prompt: bool, variables: dict[str, Any]
) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    for file in PUBLIC[name]:
        public = compiled((Path(spec.origin).parent / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8"))
        own, ready = (rendered(one, messages, tools, prompt, **variables) for one in (public, ready_template(name)))
        if own is not None and ready is not None:
            assert ready == own
