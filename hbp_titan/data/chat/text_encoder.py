"""Text -> token ids, and which tokens share a character with given spans.

Owns the two ways to tell where a token lies in the text: by counting bytes, for byte-level tokenizers, whose every
token is as long as its name; and by the offsets that the tokenizers library computes, which cost it a fifth of its
time.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]


class TextEncoder:
    """A tokenizer whose ids come with a mask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        values = json.loads(tokenizer.to_str())
        normalizers = _sequence(values["normalizer"], "normalizers")
        self._composes = any(normalizer["type"] == "NFC" for normalizer in normalizers)
        lossless = all(normalizer["type"] == "NFC" for normalizer in normalizers)
        self._token_bytes = _token_bytes(tokenizer) if lossless and _is_byte_level(values) else None

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32, and True [L] for each token that shares a character with a span.

        Raises ValueError for a text that is not Unicode (a lone surrogate).
        """
        if self._token_bytes is not None and (not self._composes or unicodedata.is_normalized("NFC", text)):
            size = len(_utf8(text))
            ids = _ids(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])
            ends = np.cumsum(self._token_bytes[ids])
            # Less where an added token takes the blanks around it.
            if size == (ends[-1] if len(ends) else 0):
                mask = np.zeros(len(ids), dtype=np.bool_)
                for start, end in spans:
                    start, end = (len(_utf8(text[:border])) if size > len(text) else border for border in (start, end))
                    mask[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, end) + 1] = True
                return ids, mask
        _utf8(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return _ids(encoding), mask_spans(encoding, spans)


def mask_spans(encoding: Encoding, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """True for each token that shares a character with a span, as transformers' assistant mask has it."""
    # Not char_to_token: a merged Encoding does not answer it.
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask


def _ids(encoding: Encoding) -> NDArray[np.uint32]:
    # numpy reads an array ten times as fast as a list of ints.
    return np.array(array("I", encoding.ids))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a message holds a lone surrogate, U+{ord(text[error.start]):04X}, which is no text"
        ) from None


def _sequence(value: dict[str, Any] | None, items: str) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers of a tokenizer.json entry, in one list."""
    if value is None:
        return []
    if value["type"] == "Sequence":
        return [inner for item in value[items] for inner in _sequence(item, items)]
    return [value]


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Whether each token's name spells its bytes, one character a byte, and no byte of the text is lost."""
    model, steps = values["model"], _sequence(values["pre_tokenizer"], "pretokenizers")
    keeps = all(
        step["type"] in ("Split", "Digits", "ByteLevel")
        and step.get("behavior") != "Removed"
        and not step.get("add_prefix_space")
        for step in steps
    )
    return (
        model["type"] == "BPE"
        and not model.get("byte_fallback")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and keeps
        and any(step["type"] == "ByteLevel" for step in steps)
    )


def _token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each id of a byte-level tokenizer stands for [V]."""
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for name, index in vocabulary.items():
        token_bytes[index] = len(name.encode()) if index in added else len(name)
    return token_bytes
