"""Conversation -> token ids and loss mask, by the chat template of the tokenizer folder.

    <|im_start|> user \\n  Hi  <|im_end|> \\n <|im_start|> assistant \\n  Hello <|im_end|> \\n
         0        0   0   0       0      0       0          0      0    1       1      0     loss mask

Owns which turns are trained (data/loss_mask.py finds where they lie), and the guard against injection: message text
that spells a control token stays text. Otherwise ids equal those of transformers' apply_chat_template.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from hbp_titan.data.chat_template import ChatTemplate, Message, plain_messages
from hbp_titan.data.loss_mask import Tools, TurnLocator
from hbp_titan.data.tokenizer import Span, TextEncoder, mask_spans, read_tokenizer_folder
from hbp_titan.job_config import Data


class ControlTokens:
    """The control tokens of a tokenizer and its template.

    They are the special tokens, and the other added tokens that open or close turns (DeepSeek-V3 has such). pattern:
    matches the text of any of them.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        boundaries = _turn_ids(tokenizer, template)
        control = {
            index: token.content
            for index, token in added.items()
            if (token.special or index in boundaries) and not token.content.isspace() and len(token.content) > 1
        }
        self._ids = set(control)
        # The longest first: an alternation takes the first branch that matches.
        texts = sorted(control.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._literal = self._literal_tokenizer()

    def escape(self, value: Any, marker: str) -> Any:
        """Return the JSON value with `marker` inserted into each control token that its strings spell."""
        return map_strings(
            value, lambda text: self.pattern.sub(lambda match: match[0][0] + marker + match[0][1:], text)
        )

    def encode_escaped(self, marked: str, marker: str) -> Encoding:
        """Return the encoding of a text without its markers, in which marked control tokens are plain text.

        Unmarked control tokens are encoded one by one, the text between them by a tokenizer that recognizes none.
        Raises ValueError if the tokenizer encodes the pieces differently from the whole.
        """
        whole = self._tokenizer.encode(marked, add_special_tokens=False)
        control = [span for index, span in zip(whole.ids, whole.offsets, strict=True) if index in self._ids]
        pieces, checks, position = [], [], 0
        for start, end in [*control, (len(marked), len(marked))]:
            for piece, tokenizer in ((marked[position:start], self._literal), (marked[start:end], self._tokenizer)):
                pieces.append(tokenizer.encode(piece.replace(marker, ""), add_special_tokens=False))
                checks.append(tokenizer.encode(piece, add_special_tokens=False))
            position = end
        # Some tokenizers treat the start of a text differently: pieces must add up to the whole.
        if Encoding.merge(checks, growing_offsets=True).ids != whole.ids:
            raise ValueError("a message spells a control token, and this tokenizer cannot encode it as plain text")
        return Encoding.merge(pieces, growing_offsets=True)

    def _literal_tokenizer(self) -> Tokenizer:
        """Return the same tokenizer, but with control tokens as plain text."""
        values = json.loads(self._tokenizer.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["id"] in self._ids
        # encode_special_tokens makes special tokens plain text: hence all control tokens were marked as special.
        literal = Tokenizer.from_str(json.dumps(values))
        literal.encode_special_tokens = True
        return literal


def _turn_ids(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """Return the ids with which turns begin and end in a trivial conversation; empty if the template rejects it.

    Ids inside of turns do not count: a template may write </think>, which messages may contain as well.
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
    """Yield every string in a JSON value, keys included."""
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
    """Return the JSON value with `function` applied to every string in it, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, function) for item in value]
    return value


def unused_characters(texts: list[str], count: int) -> list[str]:
    """Return characters of the private use plane that no text contains."""
    texts = [text for text in texts if not text.isascii()]
    unused: list[str] = []
    candidate = 0x100000
    while len(unused) < count:
        if not any(chr(candidate) in text for text in texts):
            unused.append(chr(candidate))
        candidate += 1
    return unused


TRAIN_ON = ("assistant", "last", "all")


class ChatTokenizer:
    """A tokenizer folder, ready to encode conversations.

    train_on: "assistant" trains every assistant turn, "last" only the conversation's last one, "all" every token. In
        each, a message with `train: False` is not trained.
    chat_template: a file in place of the folder's templates. date: the day of the template's strftime_now. for_tools:
        whether to use the folder's template for conversations with tools; `encode` does so by itself.
    Raises ValueError if the folder lacks a file or a template, or the template does not compile.
    """

    def __init__(
        self,
        path: Path,
        train_on: str = "assistant",
        chat_template: Path | None = None,
        date: str = Data.template_date,
        for_tools: bool = False,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on = {train_on!r}: must be one of {', '.join(TRAIN_ON)}")
        folder = read_tokenizer_folder(path, chat_template)
        self._for_tools: ChatTokenizer | None = None
        if for_tools:
            folder = dataclasses.replace(folder, chat_template=folder.tool_template, template_name="tool_use")
        elif folder.tool_template:
            self._for_tools = ChatTokenizer(path, train_on, chat_template, date, for_tools=True)
        self.tokenizer = folder.load()
        self.train_on = train_on
        self._encoder = TextEncoder(self.tokenizer)
        self._template = ChatTemplate(folder, date)
        self._control = ControlTokens(self.tokenizer, self._template)
        self._locator = TurnLocator(self._template, self._control.pattern)

    @property
    def vocab_size(self) -> int:
        """The largest token id + 1, added tokens included: the rows of an embedding that they need."""
        # Not the number of tokens: ids may have gaps, and two tokens may share one.
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, name: str) -> int | None:
        """Return the id of a named special token such as "eos_token", None if the folder has none."""
        text = self._template.special_tokens.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def encode(
        self, messages: Sequence[Message], tools: Tools = None, variables: Mapping[str, Any] | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Return token ids [L] uint32 and loss mask [L] bool of one conversation.

        messages: dicts with a `role`; `train: False` excludes a message from training. tools: JSON schemas, as
            apply_chat_template takes them. variables: further names for the template.
        Raises ValueError if the template rejects the conversation or leaves unclear where the assistant's text lies.
        """
        if not messages:
            raise ValueError("the conversation has no message")
        # As transformers chooses.
        if tools is not None and self._for_tools:
            return self._for_tools.encode(messages, tools, variables)
        # Before plain_messages removes the key `train`.
        turns = self._turns(messages)
        messages = plain_messages(messages)
        try:
            return self._encode(messages, tools, turns, variables)
        except ValueError:
            # OpenAI omits the content of a tool call; templates that append to it (Qwen3's) fail then.
            filled = [{"content": "", **message} if "tool_calls" in message else message for message in messages]
            if filled == messages:
                raise
        return self._encode(filled, tools, turns, variables)

    def _encode(
        self, messages: list[Message], tools: Tools, turns: Sequence[int], variables: Mapping[str, Any] | None
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        texts = list(strings([messages, tools, dict(variables or {})]))
        # Characters that no text contains can be found and removed again without doubt.
        marker, opening, closing = unused_characters(texts, 3)
        if any(map(self._control.pattern.search, texts)):
            text, spans = self._locate_escaped(messages, tools, turns, variables, marker, (opening, closing))
            encoding = self._control.encode_escaped(text, marker)
            ids, mask = np.array(encoding.ids, dtype=np.uint32), mask_spans(encoding, spans)
        else:
            text, spans = self._locator.locate(messages, tools, turns, (opening, closing), variables)
            ids, mask = self._encoder.encode(text, spans)
        return ids, ~mask if self.train_on == "all" else mask

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        """Return the messages whose place must be known: the trained ones or, with "all", the others."""
        # Each turn that must be located may cost a render: only those that matter.
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last":
            assistants = assistants[-1:]
        trained = self.train_on != "all"
        return [index for index in assistants if (messages[index].get("train", True) is not False) == trained]

    def _locate_escaped(
        self,
        messages: list[Message],
        tools: Tools,
        turns: Sequence[int],
        variables: Mapping[str, Any] | None,
        marker: str,
        sentinels: tuple[str, str],
    ) -> tuple[str, list[Span]]:
        """Return the conversation's text with a `marker` in the control tokens that messages spell, and the spans of
        `turns` in the text without markers."""
        escaped_messages, escaped_tools = self._control.escape([messages, tools], marker)
        marked, spans = self._locator.locate(escaped_messages, escaped_tools, turns, sentinels, variables)
        # A template that, say, trims or splits at the token would behave differently with the marker inside.
        if marked.replace(marker, "") != self._template.render(messages, tools, variables=variables):
            raise ValueError("a message spells a control token and the chat template rewrites it; remove it")
        return marked, [
            (start - marked.count(marker, 0, start), end - marked.count(marker, 0, end)) for start, end in spans
        ]
