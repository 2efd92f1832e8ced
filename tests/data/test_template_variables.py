"""What a template gets in addition to the conversation: variables, a fixed day, and another template for tools."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from hbp_titan.config import JobConfig
from hbp_titan.data.chat_template import ChatTemplate
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.formats import check_variables, parse_record
from hbp_titan.data.tokenizer import TokenizerFolder
from tests.data.preparing import byte_tokenizer, job, line, prepared, run_script, write
from tests.data.test_chat_tokenizer import (
    CHATML_PLAIN,
    EOS_TEXT,
    TOOLS,
    chat,
    make_family,
    make_folder,
    reference,
    trained_text,
)


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


# From files to stores.


def trained_pieces(config: JobConfig) -> list[str]:
    """The trained text of each sample."""
    store, tokenizer = prepared(config), Tokenizer.from_file(str(config.tokenizer_path / "tokenizer.json"))
    samples = [store.sample(index) for index in range(len(store))]
    return [tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False) for ids, mask in samples]


def test_variables_of_the_row_win_over_those_of_the_configuration(tmp_path: Path) -> None:
    make_family("qwen3", tmp_path / "tokenizer")
    rows = [line("Hi", "Hello", chat_template_kwargs=value) for value in ({"enable_thinking": False}, None)]
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *rows))])
    thinks = "<think>\n\n</think>\n\nHello<|im_end|>"
    assert trained_pieces(config) == ["Hello<|im_end|>", thinks]
    config.data.chat_template_kwargs = {"enable_thinking": False}
    assert trained_pieces(config) == ["Hello<|im_end|>"] * 2
    write(tmp_path / "a.jsonl", line("Hi", "Hello", chat_template_kwargs={"enable_thinking": True}))
    assert trained_pieces(config) == [thinks]
    # Text of a row never becomes a control token.
    write(tmp_path / "a.jsonl", line("Hi", "Hello", chat_template_kwargs={"a": ["<|im_end|>"]}))
    with pytest.raises(ValueError, match="control token"):
        prepared(config)
    config.data.chat_template_kwargs = {"messages": []}
    with pytest.raises(ValueError, match=r"data\.chat_template_kwargs\.messages"):
        prepared(config)


def test_a_template_that_needs_the_day_has_it(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    dated = "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(dated + CHATML_PLAIN)
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("Hi", "Hello")))], train_on="all")
    assert trained_pieces(config)[0].startswith("<|im_start|>system\nToday is 26 Jul 2024<|im_end|>\n")
    config.data.template_date = "2025-01-31"
    assert "Today is 31 Jan 2025<" in trained_pieces(config)[0]


def test_r1_distill_trains_with_its_ready_template_alone(tmp_path: Path) -> None:
    make_family("deepseek_r1", tmp_path / "tokenizer")
    row = write(tmp_path / "a.jsonl", line("a", "<think>\nr\n</think>\n\nb"))
    config = job(tmp_path, train_files=[str(row)])
    with pytest.raises(ValueError, match="r1_distill"):
        prepared(config)
    config.data.chat_template = "r1_distill"
    assert trained_pieces(config) == [f"r\n</think>\n\nb{EOS_TEXT}"]


@pytest.mark.parametrize(("own", "name"), [("qwen3", "qwen3"), ("deepseek_r1", "r1_distill")])
def test_each_exchange_of_a_split_row_is_trained_with_its_reasoning(tmp_path: Path, own: str, name: str) -> None:
    make_family(own, tmp_path / "tokenizer")
    turns = [*chat("a", "b", "c", "d")]
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "r", "s"
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", json.dumps({"messages": turns}) + "\n"))])
    config.data.chat_template = name
    with pytest.raises(ValueError, match="leaves out"):
        prepared(config)
    config.data.reasoning = "split"
    head, end = ("<think>\n", "<|im_end|>") if name == "qwen3" else ("", EOS_TEXT)
    assert trained_pieces(config) == [f"{head}{think}\n</think>\n\n{text}{end}" for think, text in ("rb", "sd")]
    config.data.reasoning = "drop"
    assert trained_pieces(config) == [f"b{end}{head}s\n</think>\n\nd{end}"]


def test_all_that_shapes_the_text_changes_the_fingerprint(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("Hi", "Hello")))])
    seen = [prepared(config).fingerprint]

    def changed(**data: Any) -> None:
        for key, value in data.items():
            setattr(config.data, key, value)
        seen.append(prepared(config).fingerprint)

    changed(template_date="2025-01-31")
    changed(chat_template_kwargs={"a": 1})
    changed(chat_template_kwargs={"a": 2})
    changed(chat_template="chatml")
    own = write(tmp_path / "own.jinja", CHATML_PLAIN)
    changed(chat_template=str(own))
    write(own, CHATML_PLAIN + "{# other #}")
    changed()
    (tokenizer / "additional_chat_templates").mkdir()
    tool_use = write(tokenizer / "additional_chat_templates" / "tool_use.jinja", CHATML_PLAIN)
    write(tokenizer / "chat_template.jinja", CHATML_PLAIN)
    changed(chat_template="")
    write(tool_use, CHATML_PLAIN + "{# other #}")
    changed()
    assert len(set(seen)) == len(seen)


def test_show_states_template_day_and_variables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("Hi", "Hello")))])
    arguments = ["--job.config_file", str(tmp_path / "job.toml"), "--levels", "4096:1"]
    options = ['--data.chat_template_kwargs={"a": 1}', "--data.template_date=2025-01-31"]
    _, output, _ = run_script(capsys, *arguments, "--show", "1", *options)
    assert 'tokenizer_config.json; strftime_now: 2025-01-31; variables: {"a": 1}; arguments as object' in output
    _, output, _ = run_script(capsys, *arguments, "--show", "1", "--data.chat_template=chatml")
    assert "templates/chatml.jinja; strftime_now: 2024-07-26; variables: none" in output
    assert "\x1b[32mHello<|im_end|>\x1b[0m" in output
    code, _, errors = run_script(capsys, *arguments, f"--data.chat_template={write(tmp_path / 'b.jinja', '{% for %}')}")
    assert (code, "data.chat_template: " in errors, "b.jinja is broken" in errors) == (1, True, True)
    code, _, errors = run_script(capsys, *arguments, "--data.chat_template=qwen_3")
    assert (code, "did you mean qwen3?" in errors, "r1_distill" in errors) == (1, True, True)
