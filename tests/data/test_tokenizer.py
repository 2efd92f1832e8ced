"""The embedded tokenizer's folder: what transformers makes of it, and what a broken folder answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbp_titan.data.tokenizer import read_tokenizer_folder, train_tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n"] * 8 + ["Adds two numbers, 1234 and 5."] * 4


def test_transformers_opens_the_folder_with_its_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(TEXTS, tmp_path, vocab_size=280)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 280
    assert tokenizer.convert_tokens_to_ids(["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 3)
    text = "def sub(a, b):\n\n    return a - b  # \u00e9\U0001f600\t\r\n"
    ids = read_tokenizer_folder(tmp_path).load().encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(TEXTS, tmp_path / name, vocab_size=280)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_offsets_cover_blanks_although_the_folder_trims_them(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=260)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = read_tokenizer_folder(tmp_path).load()
    assert tokenizer.encode("a b", add_special_tokens=False).offsets == [(0, 1), (1, 2), (2, 3)]


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=260)
    assert "<|im_start|>" in read_tokenizer_folder(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert read_tokenizer_folder(tmp_path).chat_template == "from the file"


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=260)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    folder = read_tokenizer_folder(tmp_path)
    assert (folder.chat_template, folder.other_for_tools) == ("D", True)


def test_special_tokens_are_read_as_text_or_as_objects(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=260)
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<s>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>", "bos_token": "older"}))
    expected = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<|pad|>"}
    assert read_tokenizer_folder(tmp_path).special_tokens == expected


def test_a_folder_without_tokenizer_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.tokenizer_path: .*/nothing has no tokenizer.json"):
        read_tokenizer_folder(tmp_path / "nothing")


def test_broken_files_are_named(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, tmp_path, vocab_size=260)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        read_tokenizer_folder(tmp_path).load()
