"""Masks found by counting bytes, against the offsets that the tokenizers library computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hbp_titan.data.tokenizer import TextEncoder, read_tokenizer_folder, train_tokenizer
from tests.properties import examples

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
@examples(150)
def test_ids_and_masks_are_those_of_the_offsets(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, data: Any
) -> None:
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
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
