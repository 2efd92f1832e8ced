"""What a template gets in addition to the conversation: variables, a fixed day, and another template for tools."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.data.chat_template import ChatTemplate
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.formats import check_variables, parse_record
from hbp_titan.data.tokenizer import TokenizerFolder
from tests.data.test_chat_tokenizer import CHATML_PLAIN, TOOLS, chat, make_folder, reference, trained_text


def render(template: str, date: str = "2024-07-26", **variables: Any) -> str:
    return ChatTemplate(TokenizerFolder(Path("folder"), {}, template), date).render([], variables=variables)


CODES = "aAbBcdDeFGhHIjmMnprRStTuUVwWxXyYZz%"


@pytest.mark.parametrize("date", ["2024-07-06", "2023-01-01", "2020-12-31"])
def test_strftime_now_writes_a_day_as_datetime_does(date: str) -> None:
    formats = [f"%{code}" for code in CODES] + ["%d %b %Y", "%A%n100%%", "%-d %-m %-e", "none", ""]
    day = datetime.datetime.fromisoformat(date)
    assert [render(f"{{{{ strftime_now({format!r}) }}}}", date) for format in formats] == [
        day.strftime(format) for format in formats
    ]


@pytest.mark.parametrize("format", ["'%Q'", "'%'", "'%1000000000d'", "'%-B'", "'%s'", "3", "'%c' * 40000000"])
def test_a_format_that_no_platform_must_have_is_an_error(format: str) -> None:
    with pytest.raises(ValueError, match=r"strftime_now|stopped"):
        render(f"{{{{ strftime_now({format}) }}}}")


DATED = {
    # Llama 3.2 falls back to this day where there is no clock.
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}": "26 Jul 2024",
    "{{ strftime_now('%Y-%m-%d') }}": "2024-07-26",  # Mistral Small 3, gpt-oss
    "{{ strftime_now('%d %B %Y') }}": "26 July 2024",  # SmolLM3
    "{{ strftime_now('%B %d, %Y') }}": "July 26, 2024",  # Granite 3
}


@pytest.mark.parametrize("template", DATED)
def test_templates_get_a_fixed_day(template: str) -> None:
    assert render(template) == DATED[template]
    assert render(template, "2025-01-31") != DATED[template]


def test_a_row_may_have_variables_of_its_own() -> None:
    def variables(value: Any) -> dict[str, Any]:
        row = {"messages": [{"role": "user", "content": "Hi"}], "kw": value}
        return parse_record(row, "messages", {"chat_template_kwargs": "kw"}, {}).variables

    assert variables({"enable_thinking": False, "tags": [1]}) == {"enable_thinking": False, "tags": [1]}
    # Arrow gives every row the entries of all rows; some files hold JSON text.
    assert variables({"enable_thinking": None, "date_string": "x"}) == {"date_string": "x"}
    assert variables('{"enable_thinking": true}') == {"enable_thinking": True}
    assert [variables(value) for value in (None, {}, "", "{}")] == [{}] * 4
    for value, word in (
        ([1], "not an object"),
        ("{", "kw: "),
        ({"messages": []}, r"kw\.messages: .*must not replace"),
        ({"add_generation_prompt": True}, "must not replace"),
        ({"a-b": 1}, "not a name"),
    ):
        with pytest.raises(ValueError, match=word):
            variables(value)
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs\.tools"):
        check_variables({"tools": []}, "data.chat_template_kwargs")


TOOL_USE = "{{- tools | tojson }}" + CHATML_PLAIN


@pytest.mark.parametrize("form", ["list", "folder"])
def test_rows_with_tools_use_the_template_for_tools_as_transformers_does(tmp_path: Path, form: str) -> None:
    folder = make_folder(tmp_path, "")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "list":
        values["chat_template"] = [
            {"name": "tool_use", "template": TOOL_USE},
            {"name": "default", "template": CHATML_PLAIN},
        ]
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
        (folder / "chat_template.jinja").write_text(CHATML_PLAIN)
    tokenizer, oracle = ChatTokenizer(folder, "all"), reference(folder)
    plain = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    listed = json.dumps(TOOLS, ensure_ascii=False)
    for tools, text in ((None, plain), (TOOLS, listed + plain)):
        assert trained_text(tokenizer, chat("a", "b"), tools) == text
        assert oracle.apply_chat_template(chat("a", "b"), tools=tools, tokenize=False) == text
    assert trained_text(ChatTokenizer(folder), chat("a", "b"), TOOLS) == "b<|im_end|>"
    (tmp_path / "own.jinja").write_text("{{- 'own' }}" + TOOL_USE)
    own = ChatTokenizer(folder, "all", tmp_path / "own.jinja")
    assert trained_text(own, chat("a", "b"), TOOLS) == "own" + listed + plain
