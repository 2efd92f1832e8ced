"""Tokenizer folders as transformers reads them, and masks by counted bytes against the offsets of the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hbp_titan.data.chat_tokenizer import ChatTokenizer
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
    assert (folder.chat_template, folder.tool_template) == ("D", "T")
    # Files take the place of the list, as in transformers.
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("U")
    with pytest.raises(ValueError, match="templates tool_use, but none named default"):
        read_tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("E")
    folder = read_tokenizer_folder(tmp_path)
    assert (folder.chat_template, folder.tool_template) == ("E", "U")
    (tmp_path / "own.jinja").write_text("F")
    folder = read_tokenizer_folder(tmp_path, tmp_path / "own.jinja")
    assert (folder.chat_template, folder.tool_template) == ("F", "")


@pytest.mark.parametrize("value", [3, [1], ["a"], [{"name": "default"}], {"default": 1}])
def test_a_template_that_is_not_text_is_named(tmp_path: Path, value: Any) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template is neither"):
        read_tokenizer_folder(tmp_path)


def test_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    config = {"eos_token": eos, "bos_token": "<|pad|>", "add_bos_token": False}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<|pad|>", "lstrip": False}, "bos_token": "<|im_start|>"})
    )
    older = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|pad|>"}
    newer = {"eos_token": "<|im_end|>", "bos_token": "<|pad|>"}
    for more, expected in ({}, older), ({"added_tokens_decoder": {}}, newer):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        assert read_tokenizer_folder(tmp_path).special_tokens == expected
        assert AutoTokenizer.from_pretrained(tmp_path).special_tokens_map == expected


# Added tokens, compared with transformers.AutoTokenizer.

START = "<|im_start|>"
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def token(content: str, *flags: str) -> dict[str, Any]:
    return {"content": content, **{flag: flag in flags for flag in FLAGS}}


def folder_with(
    folder: Path, added: dict[str, Any] | None = None, without: tuple[str, ...] = (), **config: Any
) -> Path:
    """Write a byte-level tokenizer of ids 0 to 259, with changed added tokens and configuration.

    added: added_tokens.json. without: tokens that tokenizer.json does not have.
    """
    train_tokenizer(["text"], folder, vocab_size=260)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["content"] not in without]
    for name in without:
        del values["model"]["vocab"][name]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def ids(folder: Path, text: str) -> list[int]:
    return read_tokenizer_folder(folder).load().encode(text, add_special_tokens=False).ids


def transformers_ids(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def test_tokens_of_the_configuration_alone_are_whole(tmp_path: Path) -> None:
    turns = {"260": token("<|turn|>", "special"), "261": token("<|end|>", "special")}
    folder = folder_with(tmp_path, added_tokens_decoder=turns, eos_token="<|end|>")
    assert ids(folder, "<|turn|>ab<|end|>") == [260, 68, 69, 261] == transformers_ids(folder, "<|turn|>ab<|end|>")


@pytest.mark.parametrize(
    ("config", "added", "largest"),
    [
        ({"added_tokens_decoder": {"260": token("<t>", "lstrip", "rstrip")}}, None, 260),
        ({"added_tokens_decoder": {"260": token("<t>", "single_word", "special"), "261": token("ww")}}, None, 261),
        # With this table, special_tokens_map.json and added_tokens.json are not read.
        ({"added_tokens_decoder": {"260": token("<t>")}}, {"<u>": 260}, 260),
        ({}, {"<t>": 260, "<u>": 261}, 261),
        ({"additional_special_tokens": ["<t>"]}, {"<t>": 260}, 260),
        # Named only: the next free ids.
        ({"pad_token": "<t>", "unk_token": "<u>"}, None, 261),
        ({"extra_special_tokens": ["<t>"], "mask_token": "<u>"}, None, 261),
        # Flags that differ from those of tokenizer.json.
        ({"added_tokens_decoder": {"2": token("<|im_start|>", "lstrip", "rstrip", "special")}}, None, 259),
        ({"added_tokens_decoder": {"260": token("aB", "normalized"), "261": token("ab")}}, None, 261),
    ],
)
def test_added_tokens_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], added: dict[str, Any] | None, largest: int
) -> None:
    folder = folder_with(tmp_path, added, **config)
    text = "a <t> b <u><t>w w.w\n<|im_start|> x<t>x aB ab <|im_end|> ww xww"
    assert ids(folder, text) == transformers_ids(folder, text)
    assert max(read_tokenizer_folder(folder).load().get_vocab().values()) == largest


added_tokens = st.lists(
    st.tuples(st.sampled_from(["<t>", "<u>", " s ", "W", "w", "<|im_end|>"]), st.sets(st.sampled_from(FLAGS))),
    unique_by=lambda entry: entry[0],
    max_size=4,
)


@given(
    added_tokens=added_tokens,
    named=st.dictionaries(st.sampled_from(["pad_token", "cls_token", "x_token"]), st.sampled_from(["<t>", "<p>", "W"])),
    in_config=st.booleans(),
    text=st.lists(st.sampled_from(["<t>", "<u>", " s ", "W", "w", "<p>", " ", "x", "<|im_end|>"])).map("".join),
)
@examples(25)
def test_random_added_tokens_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory,
    added_tokens: list[tuple[str, set[str]]],
    named: dict[str, str],
    in_config: bool,
    text: str,
) -> None:
    folder, free, listed = tmp_path_factory.mktemp("random"), 260, {}
    for name, flags in added_tokens:
        index = {"<|im_end|>": 3, "W": 58, "w": 90}.get(name, free)
        free += index == free
        listed[index] = token(name, *flags)
    if in_config:
        folder_with(folder, added_tokens_decoder={str(index): value for index, value in listed.items()}, **named)
    else:
        folder_with(folder, {value["content"]: index for index, value in listed.items()}, **named)
    assert ids(folder, text) == transformers_ids(folder, text)


@pytest.mark.parametrize(
    ("config", "added", "message"),
    [
        # transformers would give it 260, or the id of another token, without a word.
        ({"added_tokens_decoder": {"3": token("<t>")}}, None, r"config.json: .*'<t>' has the id 3, .*'<\|im_end\|>'"),
        ({}, {"<t>": 3}, r"added_tokens.json: .*'<t>' has the id 3, .*'<\|im_end\|>'"),
        ({"added_tokens_decoder": {"300": token("<t>")}}, None, r"'<t>' has the id 300, but .* 260"),
        ({"added_tokens_decoder": {"261": token("<|im_end|>")}}, None, r"has the id 261, but .* 3"),
        ({"added_tokens_decoder": {"2": token(START)}, "without": (START,)}, None, "json lacks it, .* 259"),
        ({"added_tokens_decoder": ["<t>"]}, None, "tokenizer_config.json: added tokens"),
        ({"added_tokens_decoder": {"260": {"content": 5}}}, None, "tokenizer_config.json: added"),
    ],
)
def test_ids_on_which_the_files_do_not_agree_are_refused(
    tmp_path: Path, config: dict[str, Any], added: dict[str, Any] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_tokenizer_folder(folder_with(tmp_path, added, **config)).load()


def test_an_id_that_the_library_would_change_is_refused(tmp_path: Path) -> None:
    path = folder_with(tmp_path) / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append({"id": 300, **token("<t>")})
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer.json: .*'<t>' has the id 300, but .* 260"):
        read_tokenizer_folder(tmp_path).load()


def test_the_bound_of_token_ids_is_the_largest_not_the_count(tmp_path: Path) -> None:
    path = folder_with(tmp_path / "gap") / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["ab"] = 400
    path.write_text(json.dumps(values))
    assert ChatTokenizer(tmp_path / "gap").vocab_size == 401
    values["model"]["vocab"]["ab"] = values["model"]["vocab"]["cd"] = 259
    path.write_text(json.dumps(values))
    assert len(read_tokenizer_folder(tmp_path / "gap").load().get_vocab()) == 262
    assert ChatTokenizer(tmp_path / "gap").vocab_size == 260


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("{tmp}", "model.tokenizer_path: .* has no tokenizer.json"),
        ("{tmp}/nothing", "model.tokenizer_path = '.*/nothing': no such folder"),
        ("org/nothing-1.5B", "hbp-titan download org/nothing-1.5B .*models/nothing-1.5B"),
        ("https://host.org/org/nothing", "hbp-titan download org/nothing "),
    ],
)
def test_a_folder_without_tokenizer_is_named_with_its_key(tmp_path: Path, folder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tokenizer_folder(Path(folder.format(tmp=tmp_path)))


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "tokenizer.model", "vocab.json"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    train_tokenizer(FOLDER_TEXTS, tmp_path, vocab_size=260)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"/{name} is a Git LFS pointer"):
        read_tokenizer_folder(tmp_path)


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
    ids, ranges = TextEncoder(tokenizers[kind]).encode(text, spans)
    mask = np.zeros(len(ids), dtype=bool)
    for first, last in ranges.tolist():
        mask[first:last] = True
    encoding = tokenizers[kind].encode(text, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    shared = [any(first < end and start < last for start, end in spans) for first, last in encoding.offsets]
    assert mask.tolist() == shared
    assert str(ids.dtype) == "uint32"


def test_offsets_are_computed_only_where_bytes_cannot_tell(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []

    def token_ranges(encoding: Any, spans: Any) -> Any:
        encoded.append("offsets")
        return []

    monkeypatch.setattr("hbp_titan.data.tokenizer.token_ranges", token_ranges)
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
