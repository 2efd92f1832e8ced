"""Tokenizer folders as transformers reads them, and masks by counted bytes against the offsets of the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hbp_titan.data.tokenizer import TextEncoder, read_tokenizer_folder, train_tokenizer
from tests.properties import examples

FOLDER_TEXTS = ["def add(a, b):\n    return a + b\n"] * 8 + ["Adds two numbers, 1234 and 5."] * 4


def test_transformers_opens_the_folder_with_its_special_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=280)
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
        train_tokenizer(FOLDER_TEXTS, tmp_path / name, vocab_size=280)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_offsets_cover_blanks_although_the_folder_trims_them(tmp_path: Path) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = read_tokenizer_folder(tmp_path).load()
    assert tokenizer.encode("a b", add_special_tokens=False).offsets == [(0, 1), (1, 2), (2, 3)]


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    assert "<|im_start|>" in read_tokenizer_folder(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert read_tokenizer_folder(tmp_path).chat_template == "from the file"


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    folder = read_tokenizer_folder(tmp_path)
    assert (folder.chat_template, folder.other_for_tools) == ("D", True)


def test_special_tokens_are_read_as_text_or_as_objects(tmp_path: Path) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    config = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<s>", "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>", "bos_token": "older"}))
    expected = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<|pad|>"}
    assert read_tokenizer_folder(tmp_path).special_tokens == expected


def test_a_folder_without_tokenizer_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.tokenizer_path: .*/nothing has no tokenizer.json"):
        read_tokenizer_folder(tmp_path / "nothing")


def test_broken_files_are_named(tmp_path: Path) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not JSON"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        read_tokenizer_folder(tmp_path).load()


# Masks.

TEXTS = ["def add(a, b):\n    return a + b\n", "the cat\n\nsat on the mat", "\u00e9\u00e9 \u4e2d\u4e2d"] * 4


def byte_level(folder: Path, nfc: bool = False, takes_blanks: bool = False) -> Tokenizer:
    train_tokenizer(TEXTS, folder, 300)
    tokenizer = read_tokenizer_folder(folder).load()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<t\u00e9>", lstrip=takes_blanks, rstrip=takes_blanks, normalized=False)])
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=80, unk_token="<u>", special_tokens=["<u>"])
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "bytes": byte_level(tmp_path_factory.mktemp("bytes")),
        "composed": byte_level(tmp_path_factory.mktemp("composed"), nfc=True),
        "blanks": byte_level(tmp_path_factory.mktemp("blanks"), takes_blanks=True),
        "metaspace": metaspace(),
    }


pieces = st.sampled_from(
    ["a", "the", " ", "\n", "\n\n", "\u00e9", "e\u0301", "\u4e2d", "\U0001f600", "<s>", "<t\u00e9>", "A"]
)
texts = st.lists(pieces, max_size=12).map("".join)


@pytest.mark.parametrize("kind", ["bytes", "composed", "blanks", "metaspace"])
@given(text=texts, data=st.data())
@examples(80)
def test_ids_and_masks_are_those_of_the_offsets(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, data: Any
) -> None:
    boundaries = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(boundaries[::2], boundaries[1::2], strict=False))
    ids, mask = TextEncoder(tokenizers[kind]).encode(text, spans)
    encoding = tokenizers[kind].encode(text, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    shared = [any(first < end and start < last for start, end in spans) for first, last in encoding.offsets]
    assert mask.tolist() == shared
    assert str(ids.dtype) == "uint32"


def test_offsets_are_computed_only_where_bytes_cannot_tell(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def mask_spans(encoding: Any, spans: Any) -> Any:
        encoded.append("offsets")
        return []

    monkeypatch.setattr("hbp_titan.data.tokenizer.mask_spans", mask_spans)
    for kind, text, counted in [
        ("bytes", "the \u4e2d<s>\n", True),
        ("composed", "\u00e9", True),
        ("composed", "e\u0301", False),
        ("blanks", "a b", True),
        ("blanks", "a <t\u00e9> b", False),
        ("metaspace", "the cat", False),
    ]:
        encoded.clear()
        TextEncoder(tokenizers[kind]).encode(text, [(0, 1)])
        assert encoded == ([] if counted else ["offsets"]), (kind, text)
