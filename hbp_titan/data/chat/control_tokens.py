"""The guard against injection: text of a message that spells a control token stays text.

Owns which tokens are control tokens, and the encoding of a rendered conversation in which a message spells one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Encoding, Tokenizer

from hbp_titan.data.chat.jinja_template import ChatTemplate


class ControlTokens:
    """The control tokens of a tokenizer and its template: the special tokens, and other added tokens with which the
    template opens or closes turns (DeepSeek-V3's).

    pattern: matches the text of any of them.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        borders = _turn_ids(tokenizer, template)
        control = {
            index: token.content
            for index, token in added.items()
            if (token.special or index in borders) and not token.content.isspace() and len(token.content) > 1
        }
        self._ids = set(control)
        texts = sorted(control.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._literal = self._literal_tokenizer()

    def escape(self, value: Any, marker: str) -> Any:
        """The JSON value with `marker` put into each control token that its strings spell."""
        return map_strings(
            value, lambda text: self.pattern.sub(lambda match: match[0][0] + marker + match[0][1:], text)
        )

    def encode_escaped(self, marked: str, marker: str) -> Encoding:
        """Encoding of a text without its markers, in which only unmarked control tokens are such: they are encoded
        one by one, the text between them with none recognized.

        Raises ValueError where the tokenizer does not encode the pieces as it does the whole.
        """
        whole = self._tokenizer.encode(marked, add_special_tokens=False)
        control = [span for index, span in zip(whole.ids, whole.offsets, strict=True) if index in self._ids]
        pieces, checks, position = [], [], 0
        for start, end in [*control, (len(marked), len(marked))]:
            for piece, tokenizer in ((marked[position:start], self._literal), (marked[start:end], self._tokenizer)):
                pieces.append(tokenizer.encode(piece.replace(marker, ""), add_special_tokens=False))
                checks.append(tokenizer.encode(piece, add_special_tokens=False))
            position = end
        if Encoding.merge(checks, growing_offsets=True).ids != whole.ids:
            raise ValueError("a message spells a control token, and this tokenizer cannot encode it as plain text")
        return Encoding.merge(pieces, growing_offsets=True)

    def _literal_tokenizer(self) -> Tokenizer:
        """The same tokenizer, to which the control tokens are plain text."""
        values = json.loads(self._tokenizer.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["id"] in self._ids
        literal = Tokenizer.from_str(json.dumps(values))
        literal.encode_special_tokens = True
        return literal


def _turn_ids(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """The ids with which turns begin and end in a conversation that says nothing; empty where the template refuses it.

    Not those between: a template may write </think>, which messages may hold.
    """
    probe = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        texts = [template.render(probe[:count]) for count in (1, 2, 3)]
    except ValueError:
        return set()
    turns = [text.removeprefix(before) for before, text in zip(["", *texts], texts, strict=False)]
    ids = [tokenizer.encode(turn, add_special_tokens=False).ids for turn in turns]
    return {index for turn in ids for index in (*turn[:1], *turn[-1:])}


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, function: Any) -> Any:
    """The JSON value with `function` applied to every string in it, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    return value


def unused_characters(texts: list[str], count: int) -> list[str]:
    """Characters of the private use plane that no text holds."""
    texts = [text for text in texts if not text.isascii()]
    unused: list[str] = []
    candidate = 0x100000
    while len(unused) < count:
        if not any(chr(candidate) in text for text in texts):
            unused.append(chr(candidate))
        candidate += 1
    return unused
