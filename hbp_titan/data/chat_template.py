"""Conversation -> token ids and loss mask, by the chat template of the tokenizer folder.

Owns the rule of what is trained: the text of each assistant turn with its end token. Where it begins and ends is
said by the template's `{% generation %}` blocks; without them, by rendering the conversation turn by turn.
Owns the guard against injection: text of a message that spells a control token stays text.

    <|im_start|> user \\n  Hi  <|im_end|> \\n <|im_start|> assistant \\n  Hello <|im_end|> \\n
         0        0   0   0       0      0       0          0      0    1       1      0     loss mask

Ids equal those of transformers' apply_chat_template, except for such control-token text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from hbp_titan.data.jinja_template import ChatTemplate, Message
from hbp_titan.data.tokenizer import read_tokenizer_folder

Span = tuple[int, int]


class ChatTokenizer:
    """A tokenizer folder ready to encode conversations.

    Raises ValueError where the folder lacks a file or a template, or the template does not compile.
    """

    def __init__(self, path: Path) -> None:
        folder = read_tokenizer_folder(path)
        self.tokenizer = folder.load()
        self._template = ChatTemplate(folder)
        control = self._find_control_tokens()
        self._control_ids = set(control)
        texts = sorted(control.values(), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._literal = self._literal_tokenizer()

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, name: str) -> int | None:
        """The id of a named special token such as "eos_token"; None where the folder names none."""
        text = self._template.special_tokens.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def encode(self, messages: Sequence[Message]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32 and loss mask [L] bool of one conversation.

        Raises ValueError where the template refuses the conversation or cannot tell what the assistant said.
        """
        # transformers drops null fields before it renders: templates test for presence.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        marker, opening, closing = _unused_characters(messages, 3)
        if any(self._control_pattern.search(text) for text in _strings(messages)):
            spans, encoding = self._encode_escaped(messages, marker, (opening, closing))
        else:
            text, spans = self._render(messages, (opening, closing))
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32), _mask_spans(encoding, spans)

    def _render(self, messages: Sequence[Message], sentinels: tuple[str, str]) -> tuple[str, list[Span]]:
        """The conversation's text and the character spans to train."""
        if self._template.has_generation_blocks:
            return _cut_sentinels(self._template.render(messages, sentinels=sentinels), sentinels)
        return self._render_by_turns(messages)

    def _render_by_turns(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Each assistant turn is what its message adds to the text that a model would be asked to continue."""
        text = self._template.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = f"message {index + 1} (assistant)"
            prompt = self._template.render(messages[:index], add_generation_prompt=True)
            answered = text if index + 1 == len(messages) else self._template.render(messages[: index + 1])
            if not answered.startswith(prompt):
                raise ValueError(
                    f"the chat template renders {turn} differently from the prompt that asks for it, so the loss mask "
                    "is unknown: use a template with {% generation %} blocks"
                )
            if not text.startswith(answered):
                raise ValueError(
                    f"the chat template changes {turn} when later messages follow, so the loss mask is unknown: "
                    "use a template with {% generation %} blocks"
                )
            spans.append((len(prompt), len(prompt) + self._spoken(answered[len(prompt) :])))
        return text, spans

    def _spoken(self, turn: str) -> int:
        """Length of `turn` up to its end token: what a template writes after it, no model says."""
        ends = [match.end() for match in self._control_pattern.finditer(turn)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else len(turn)

    def _encode_escaped(
        self, messages: Sequence[Message], marker: str, sentinels: tuple[str, str]
    ) -> tuple[list[Span], Encoding]:
        """Spans and encoding where some message spells a control token.

        1. Put `marker` into each control token that a message spells, and render: what now matches is the template's.
        2. Encode the template's control tokens as such, and the text between them with none recognized.
        """
        marked, marked_spans = self._render(_map_strings(messages, self._escape(marker)), sentinels)
        text = marked.replace(marker, "")
        if text != self._render(messages, sentinels)[0]:
            raise ValueError("a message spells a control token and the chat template rewrites it: remove it")
        spans = [tuple(end - marked.count(marker, 0, end) for end in span) for span in marked_spans]
        whole = self.tokenizer.encode(marked, add_special_tokens=False)
        pieces, checks, position = [], [], 0
        for start, end in [*self._control_spans(whole), (len(marked), len(marked))]:
            between, control = marked[position:start], marked[start:end]
            for piece, tokenizer in ((between, self._literal), (control, self.tokenizer)):
                pieces.append(tokenizer.encode(piece.replace(marker, ""), add_special_tokens=False))
                checks.append(tokenizer.encode(piece, add_special_tokens=False))
            position = end
        if Encoding.merge(checks, growing_offsets=True).ids != whole.ids:
            raise ValueError("a message spells a control token, and this tokenizer cannot encode it as plain text")
        return [(start, end) for start, end in spans], Encoding.merge(pieces, growing_offsets=True)

    def _escape(self, marker: str) -> Callable[[str], str]:
        def split(match: re.Match[str]) -> str:
            return match[0][0] + marker + match[0][1:]

        return lambda text: self._control_pattern.sub(split, text)

    def _control_spans(self, encoding: Encoding) -> list[Span]:
        return [span for index, span in zip(encoding.ids, encoding.offsets, strict=True) if index in self._control_ids]

    def _find_control_tokens(self) -> dict[int, str]:
        """The special tokens, and other added tokens by which the template opens turns (DeepSeek-V3's)."""
        added = self.tokenizer.get_added_tokens_decoder()
        probe = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            written = set(self.tokenizer.encode(self._template.render(probe), add_special_tokens=False).ids)
        except ValueError:
            written = set()
        return {
            index: token.content
            for index, token in added.items()
            if (token.special or index in written) and not token.content.isspace() and len(token.content) > 1
        }

    def _literal_tokenizer(self) -> Tokenizer:
        """The same tokenizer, to which the control tokens are plain text."""
        values = json.loads(self.tokenizer.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["id"] in self._control_ids
        literal = Tokenizer.from_str(json.dumps(values))
        literal.encode_special_tokens = True
        return literal


def _cut_sentinels(rendered: str, sentinels: tuple[str, str]) -> tuple[str, list[Span]]:
    """The text without its sentinels, and the spans that they enclosed."""
    pieces = re.split("([" + "".join(sentinels) + "])", rendered)
    text, starts, spans = [], [], []
    length = 0
    for piece in pieces:
        if piece == sentinels[0]:
            starts.append(length)
        elif piece == sentinels[1]:
            if not starts:
                raise ValueError("the chat template cuts its {% generation %} blocks apart: the loss mask is unknown")
            spans.append((starts.pop(), length))
        else:
            text.append(piece)
            length += len(piece)
    # An empty block trains nothing.
    return "".join(text), [(start, end) for start, end in spans if start < end]


def _mask_spans(encoding: Encoding, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """True for each token that shares a character with a span, as transformers' assistant mask has it.

    From the offsets alone: a merged Encoding no longer answers char_to_token.
    """
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    return value


def _unused_characters(messages: Sequence[Message], count: int) -> list[str]:
    """Characters of the private use plane that no message holds."""
    texts = list(_strings(messages))
    unused: list[str] = []
    candidate = 0x100000
    while len(unused) < count:
        if not any(chr(candidate) in text for text in texts):
            unused.append(chr(candidate))
        candidate += 1
    return unused
