"""What becomes of a row: left out in part, split by its reasoning, truncated; each with its reason."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.components import export
from hbp_titan.data.store_summary import summary
from hbp_titan.data.token_store import TokenizeConfig, check_strict
from hbp_titan.data.tokenize_row import RowTokenizer, TokenizedRow
from hbp_titan.errors import UserError
from tests.data.preparing import byte_tokenizer, job, line, prepared, write
from tests.data.test_chat_tokenizer import CHATML_PLAIN, calls, chat, make_family, make_folder
from tests.properties import examples


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {
        family: make_family(family, tmp_path_factory.mktemp(family))
        for family in ("qwen3", "deepseek_r1", "deepseek_v3")
    }
    return {**made, "chatml": make_folder(tmp_path_factory.mktemp("chatml"), CHATML_PLAIN)}


@functools.cache
def row_tokenizer(folder: Path, **settings: Any) -> RowTokenizer:
    return RowTokenizer(TokenizeConfig(folder, **settings))


def tokenize(folder: Path, messages: list[dict[str, Any]], **settings: Any) -> TokenizedRow:
    return row_tokenizer(folder, **settings).tokenize({"messages": messages})


def texts(folder: Path, row: TokenizedRow) -> list[str]:
    """Each sample with its trained text in brackets."""
    tokenizer = row_tokenizer(folder)._chat_tokenizer.tokenizer
    shown = []
    for ids, mask in row.samples:
        text, before = "", False
        for index, trained in zip(ids.tolist(), mask.tolist(), strict=True):
            text += ("[" if trained else "]") if trained != before else ""
            text += tokenizer.decode([index], skip_special_tokens=False)
            before = trained
        shown.append(text + "]" * before)
    return shown


def outcome(row: TokenizedRow) -> tuple[str, str, tuple[str, ...], int]:
    return row.outcome, row.reason, row.notes, len(row.samples)


HI, BYE = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_empty_answers_are_not_trained_and_listed(folders: dict[str, Path], blank: str) -> None:
    row = tokenize(folders["chatml"], chat("Hi", blank, "Bye", "So long"))
    assert outcome(row) == ("partly", "empty answer", ("empty answer",), 1)
    assert texts(folders["chatml"], row) == [f"{HI}{blank}<|im_end|>\n{BYE}[So long<|im_end|>]\n"]
    assert outcome(tokenize(folders["chatml"], chat("Hi", blank))) == ("excluded", "empty answer", (), 0)
    assert outcome(tokenize(folders["chatml"], chat("Hi", "x", "Bye", blank), train_on="last"))[:2] == (
        "excluded",
        "empty answer",
    )
    row = tokenize(folders["chatml"], chat("Hi", blank), empty_answers="train")
    assert texts(folders["chatml"], row) == [f"{HI}[{blank}<|im_end|>]\n"]
    # A call is an answer, and so is a reasoning.
    assert tokenize(folders["qwen3"], [*chat("Hi"), calls({}, content="")]).outcome == "whole"
    assert (
        tokenize(folders["qwen3"], [*chat("Hi"), {"role": "assistant", "content": "", "reasoning": "w"}]).outcome
        == "whole"
    )


def test_an_answer_before_any_question_is_not_trained_and_listed(folders: dict[str, Path]) -> None:
    for family in ("chatml", "qwen3"):
        row = tokenize(folders[family], [{"role": "assistant", "content": "Welcome"}, *chat("Hi", "Yo")])
        assert outcome(row) == ("partly", "answer before any question", ("answer before any question",), 1)
        assert texts(folders[family], row)[0].startswith("<|im_start|>assistant\nWelcome<|im_end|>\n")
        assert texts(folders[family], row)[0].count("[") == 1
    row = tokenize(folders["chatml"], [{"role": "assistant", "content": "Welcome"}])
    assert outcome(row) == ("excluded", "answer before any question", (), 0)
    # A system prompt asks, too; and with all tokens trained there is no question.
    story = [{"role": "system", "content": "A story."}, {"role": "assistant", "content": "Once"}]
    assert tokenize(folders["chatml"], story).outcome == "whole"
    assert tokenize(folders["chatml"], [{"role": "assistant", "content": "Welcome"}], train_on="all").outcome == "whole"


def thought(text: str, reasoning: str, inline: bool) -> dict[str, Any]:
    if inline:
        return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{text}"}
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


@pytest.mark.parametrize("inline", [False, True], ids=["field", "inline"])
def test_reasoning_that_the_template_drops_is_an_error_a_split_or_dropped(
    folders: dict[str, Path], inline: bool
) -> None:
    qwen3 = folders["qwen3"]
    messages = [*chat("Hi"), thought("Yo", "r1", inline), *chat("Bye"), thought("So long", "r2", inline)]
    row = tokenize(qwen3, messages)
    assert outcome(row)[:2] == ("excluded", "malformed")
    assert "the reasoning of message 2" in row.detail
    first = f"{HI}[<think>\nr1\n</think>\n\nYo<|im_end|>]\n"
    second = f"{HI}Yo<|im_end|>\n{BYE}[<think>\nr2\n</think>\n\nSo long<|im_end|>]\n"
    row = tokenize(qwen3, messages, reasoning="split")
    assert outcome(row) == ("split", "reasoning of earlier turns", (), 2)
    assert texts(qwen3, row) == [first, second]
    row = tokenize(qwen3, messages, reasoning="drop")
    assert outcome(row) == ("partly", "reasoning dropped", ("reasoning dropped",), 1)
    assert texts(qwen3, row) == [f"{HI}[Yo<|im_end|>]\n{BYE}[<think>\nr2\n</think>\n\nSo long<|im_end|>]\n"]
    # Row by row: the others stay whole.
    plain = tokenize(qwen3, chat("Hi", "Yo", "Bye", "So long"), reasoning="split")
    assert outcome(plain) == ("whole", "", (), 1)
    # A template that drops all reasoning.
    single = [*chat("Hi"), thought("Yo", "r1", inline)]
    assert (
        "reasoning of message 2"
        in tokenize(folders["chatml"], [*chat("Hi"), thought("Yo", "r1", False)], reasoning="split").detail
    )
    assert "reasoning of message 2" in tokenize(folders["deepseek_r1"], single, reasoning="split").detail


def test_samples_split_by_reasoning_are_cut_to_max_tokens_by_the_policy(folders: dict[str, Path]) -> None:
    qwen3 = folders["qwen3"]
    messages = [*chat("Hi"), thought("Yo", "r1", False), *chat("Bye"), thought("So long", "r2", False)]
    whole = tokenize(qwen3, messages, reasoning="split")
    first, second = (len(ids) for ids, _ in whole.samples)
    limit = {"reasoning": "split", "max_tokens": second - 1}
    row = tokenize(qwen3, messages, **limit, max_length_policy="skip")
    assert (row.outcome, row.reason, len(row.samples)) == ("split", "over max_tokens", 1)
    assert row.detail == f"1 exchanges of {second} tokens fit nowhere"
    row = tokenize(qwen3, messages, **limit, max_length_policy="split")
    assert texts(qwen3, row)[1] == f"{BYE}[<think>\nr2\n</think>\n\nSo long<|im_end|>]\n"
    row = tokenize(qwen3, messages, **limit, max_length_policy="truncate")
    assert [len(ids) for ids, _ in row.samples] == [first, second - 1]


def test_arguments_are_written_as_the_row_has_them(folders: dict[str, Path]) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [*chat("Hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = tokenize(folders["deepseek_v3"], messages, train_on="all")
    assert '\n```json\n{"a":1}\n```' in texts(folders["deepseek_v3"], row)[0]
    assert '"arguments": {"a": 1}' in texts(folders["qwen3"], tokenize(folders["qwen3"], messages))[0]


QUESTIONS = chat("Name a colour.", "Red is a colour", "What is 17 times 3?", "51, easy.", "And 2 times 2?", "4.")


@given(max_tokens=st.integers(8, 260))
@examples(100)
def test_truncation_trains_only_answers_whose_question_is_whole(folders: dict[str, Path], max_tokens: int) -> None:
    row = tokenize(folders["chatml"], QUESTIONS, max_tokens=max_tokens, max_length_policy="truncate")
    (text,) = texts(folders["chatml"], row)
    *earlier, last = (piece.partition("]") for piece in text.split("[")[1:])
    assert (last[0] and (QUESTIONS[5]["content"] + "<|im_end|>").startswith(last[0])) or last[0] in "4.<|im_end|>"
    for answer, _, _ in earlier:
        number = next(k for k in (1, 3) if QUESTIONS[k]["content"] + "<|im_end|>" == answer)
        before = text[: text.index("[" + answer)]
        assert before.endswith(f"{QUESTIONS[number - 1]['content']}<|im_end|>\n<|im_start|>assistant\n")


def test_notes_and_parts_are_counted_in_the_accounting(tmp_path: Path) -> None:
    rows = [
        chat("a", "b"),
        chat("a", "", "c", "d"),
        chat("a", " "),
        [{"role": "assistant", "content": "x"}, *chat("a", "b")],
    ]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
    byte_tokenizer(tmp_path / "tokenizer")
    store = prepared(job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", *lines))]))
    totals = store.totals()
    assert {key: totals[key] for key in ("rows", "whole", "partly", "excluded: empty answer", "samples")} == {
        "rows": 4, "whole": 1, "partly": 2, "excluded: empty answer": 1, "samples": 3
    }  # fmt: skip
    listed = [(row["line"], row["outcome"], row["reason"], row["notes"]) for row in store.incomplete_rows()]
    assert listed == [
        (2, "partly", "empty answer", ["empty answer"]),
        (3, "excluded", "empty answer", []),
        (4, "partly", "answer before any question", ["answer before any question"]),
    ]
    assert store.turn_ends == [(3, "<|im_end|>", 3)]
    assert store.stores[0].meta["notes"] == {"answer before any question": 1, "empty answer": 1}


@pytest.mark.parametrize(
    ("base", "stops", "warned"),
    [
        # The base model stops at its text's end, as Llama's and Qwen's do; the second, an Instruct model, at both.
        ({"eos_token_id": 1}, [1, 3], "<|im_end|> (3)"),
        ({"eos_token_id": [1, 3]}, [1, 3], None),
        ({"eos_token_id": 3}, 3, None),
        ({}, 3, None),
    ],
)
def test_the_export_stops_at_the_end_of_trained_turns(
    tmp_path: Path, base: dict[str, Any], stops: Any, warned: str | None
) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a"), line("r", "b")))])
    store = prepared(config)
    (tmp_path / "generation_config.json").write_text(json.dumps(base))
    config.model.hf_path = str(tmp_path)
    assert export.token_ids(config, store)["eos_token_id"] == stops
    warnings = export.turn_end_warnings(config, store)
    assert [warned in warning for warning in warnings] == ([] if warned is None else [True])


def test_turns_without_an_end_token_are_warned_of_and_listed(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a"), line("r", "b")))])
    store = prepared(config)
    assert store.turn_ends == [(-1, "", 2)]
    assert "2 of 2 trained turns" in export.turn_end_warnings(config, store)[0]
    assert [(row["outcome"], row["notes"]) for row in store.incomplete_rows()] == [("whole", ["no end token"])] * 2
    assert "2 rows: no end token" in summary(store)
    # Nothing of them is lost: data.strict accepts them.
    check_strict(store, max_errors=1)


def test_rows_that_all_fail_alike_are_no_reason_to_skip_them(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = job(tmp_path, train_files=[str(write(tmp_path / "a.jsonl", line("q", "a"), line("r", "b")))])
    with pytest.raises(UserError) as caught:
        prepared(config)
    assert "the content of message 2" in caught.value.lines[0]
    assert "all 2 rows fail" in caught.value.lines[-1]
