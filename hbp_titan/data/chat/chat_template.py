"""Conversation -> token ids and loss mask, by the chat template of the tokenizer folder.

Owns the choice of the turns that are trained; loss_mask.py says where they lie, control_tokens.py keeps what messages
say from being taken for control tokens.

    <|im_start|> user \\n  Hi  <|im_end|> \\n <|im_start|> assistant \\n  Hello <|im_end|> \\n
         0        0   0   0       0      0       0          0      0    1       1      0     loss mask

Ids equal those of transformers' apply_chat_template, except for such control-token text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.chat.control_tokens import ControlTokens, strings, unused_characters
from hbp_titan.data.chat.jinja_template import ChatTemplate, Message, plain_messages
from hbp_titan.data.chat.loss_mask import Tools, TurnLocator
from hbp_titan.data.chat.text_encoder import Span, TextEncoder, mask_spans
from hbp_titan.data.chat.tokenizer import read_tokenizer_folder

TRAIN_ON = ("assistant", "last", "all")


class ChatTokenizer:
    """A tokenizer folder ready to encode conversations.

    train_on: "assistant" trains every assistant turn, "last" the conversation's last assistant turn alone, "all" every
        token. In each, a message with `train: False` is not trained.
    Raises ValueError where the folder lacks a file or a template, or the template does not compile.
    """

    def __init__(self, path: Path, train_on: str = "assistant") -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on: {train_on!r} is none of {', '.join(TRAIN_ON)}")
        folder = read_tokenizer_folder(path)
        self.tokenizer = folder.load()
        self.train_on = train_on
        self._other_for_tools = folder.other_for_tools
        self._encoder = TextEncoder(self.tokenizer)
        self._template = ChatTemplate(folder)
        self._control = ControlTokens(self.tokenizer, self._template)
        self._locator = TurnLocator(self._template, self._control.pattern)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, name: str) -> int | None:
        """The id of a named special token such as "eos_token"; None where the folder names none."""
        text = self._template.special_tokens.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def encode(self, messages: Sequence[Message], tools: Tools = None) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids [L] uint32 and loss mask [L] bool of one conversation.

        messages: dicts with a `role`; `train: False` on a message that is not to be trained.
        tools: JSON schemas, as apply_chat_template takes them.
        Raises ValueError where the template refuses the conversation or cannot tell what the assistant said.
        """
        if not messages:
            raise ValueError("the conversation has no message")
        if tools and self._other_for_tools:
            raise ValueError(
                "the tokenizer folder has another template for tools (tool_use): make it chat_template.jinja"
            )
        turns = self._turns(messages)
        messages = plain_messages(messages)
        try:
            return self._encode(messages, tools, turns)
        except ValueError:
            # OpenAI leaves the content of a tool call out, which templates that add to it (Qwen3's) refuse.
            filled = [{"content": "", **message} if "tool_calls" in message else message for message in messages]
            if filled == messages:
                raise
        return self._encode(filled, tools, turns)

    def _encode(
        self, messages: list[Message], tools: Tools, turns: Sequence[int]
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        texts = list(strings([messages, tools]))
        marker, opening, closing = unused_characters(texts, 3)
        if any(map(self._control.pattern.search, texts)):
            text, spans = self._locate_escaped(messages, tools, turns, marker, (opening, closing))
            encoding = self._control.encode_escaped(text, marker)
            ids, mask = np.array(encoding.ids, dtype=np.uint32), mask_spans(encoding, spans)
        else:
            text, spans = self._locator.locate(messages, tools, turns, (opening, closing))
            ids, mask = self._encoder.encode(text, spans)
        return ids, ~mask if self.train_on == "all" else mask

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        """The messages whose place must be known: those that are trained; under "all", those that are not."""
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last":
            assistants = assistants[-1:]
        trained = self.train_on != "all"
        return [index for index in assistants if (messages[index].get("train", True) is not False) == trained]

    def _locate_escaped(
        self, messages: list[Message], tools: Tools, turns: Sequence[int], marker: str, sentinels: tuple[str, str]
    ) -> tuple[str, list[Span]]:
        """The conversation's text, in which control tokens that messages spell hold a `marker`, and the spans of
        `turns` in the text without the markers."""
        escaped_messages, escaped_tools = self._control.escape([messages, tools], marker)
        marked, spans = self._locator.locate(escaped_messages, escaped_tools, turns, sentinels)
        if marked.replace(marker, "") != self._template.render(messages, tools):
            raise ValueError("a message spells a control token and the chat template rewrites it: remove it")
        return marked, [
            (start - marked.count(marker, 0, start), end - marked.count(marker, 0, end)) for start, end in spans
        ]
