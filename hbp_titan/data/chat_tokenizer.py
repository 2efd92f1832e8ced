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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from hbp_titan.data.chat_template import ChatTemplate, Message, plain_messages
from hbp_titan.data.loss_mask import Located, LostPartError, TurnLocator
from hbp_titan.data.sentinels import CALL, Tools, strings
from hbp_titan.data.template_probes import call_forms
from hbp_titan.data.tokenizer import TextEncoder, read_tokenizer_folder, token_ranges
from hbp_titan.job_config import Data


class ControlTokens:
    """The control tokens of a tokenizer and its template.

    They are the special tokens, and the other added tokens that open or close turns (DeepSeek-V3 has such). pattern:
    matches the text of any of them. ids: of all; openers: of those that open turns; closers: of the others.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        boundaries = _turn_ids(tokenizer, template)
        at_boundaries = boundaries[0] | boundaries[1]
        control = {
            index: token.content
            for index, token in added.items()
            if (token.special or index in at_boundaries) and not token.content.isspace() and len(token.content) > 1
        }
        self.ids = set(control)
        self.openers = boundaries[0] & self.ids
        self.closers = self.ids - self.openers
        # The longest first: an alternation takes the first branch that matches.
        texts = sorted(control.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._literal = self._literal_tokenizer()

    def encode_escaped(self, marked: str, marker: str) -> Encoding:
        """Return the encoding of a text without its markers, in which marked control tokens are plain text.

        Unmarked control tokens are encoded one by one, the text between them by a tokenizer that recognizes none.
        Raises ValueError if the tokenizer encodes the pieces differently from the whole.
        """
        whole = self._tokenizer.encode(marked, add_special_tokens=False)
        control = [span for index, span in zip(whole.ids, whole.offsets, strict=True) if index in self.ids]
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
            token["special"] = token["id"] in self.ids
        # encode_special_tokens makes special tokens plain text: hence all control tokens were marked as special.
        literal = Tokenizer.from_str(json.dumps(values))
        literal.encode_special_tokens = True
        return literal


def _turn_ids(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[set[int], set[int]]:
    """Return the ids with which turns begin and those with which they end, in a trivial conversation; empty if the
    template rejects it.

    Ids inside of turns do not count: a template may write </think>, which messages may contain as well.
    """
    probe = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    try:
        texts = [template.render(probe[:count]) for count in (1, 2, 3)]
    except ValueError:
        return set(), set()
    turns = [text.removeprefix(before) for before, text in zip(["", *texts], texts, strict=False)]
    ids = [tokenizer.encode(turn, add_special_tokens=False).ids for turn in turns]
    return {turn[0] for turn in ids if turn}, {turn[-1] for turn in ids if turn}


TRAIN_ON = ("assistant", "last", "all")
NO_END_TOKEN, END_OUTSIDE, HEADER = "no end token", "end token outside the turn", "header is trained"
"""Problems of trained turns that do not exclude their row."""


class Encoded(NamedTuple):
    """A conversation as tokens.

    ids: uint32 [L]; loss_mask: bool [L]. turns: int64 [n, 2], first token and end of each trained turn; questions:
    int64 [m], the first token of the text of each user message. ends: the control token that ends each trained turn,
    -1 where there is none. notes: problems of the turns. With train_on = "all", turns, ends, notes are empty.
    """

    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    turns: NDArray[np.int64]
    questions: NDArray[np.int64]
    ends: tuple[int, ...]
    notes: tuple[str, ...]


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
        self.call_forms = call_forms(self._template)

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
    ) -> Encoded:
        """Return tokens and loss mask of one conversation.

        messages: dicts with a `role`; `train: False` excludes a message from training. tools: JSON schemas, as
            apply_chat_template takes them. variables: further names for the template.
        Raises LostPartError if the template leaves a part of the conversation out, and ValueError if it rejects the
        conversation or leaves unclear where the assistant's text lies.
        """
        if not messages:
            raise ValueError("the conversation has no message")
        # As transformers chooses.
        if tools is not None and self._for_tools:
            return self._for_tools.encode(messages, tools, variables)
        # Before plain_messages removes the key `train`.
        turns = self._turns(messages)
        trained = {k for k, m in enumerate(messages) if m["role"] == "assistant"}
        trained = trained - set(turns) if self.train_on == "all" else set(turns)
        messages = plain_messages(messages)
        if not any(message.get("tool_calls") for message in messages):
            return self._encode(messages, tools, turns, trained, variables)
        first_error: ValueError | None = None
        # The same order for every row, so that a row's tokens do not depend on the rows before it.
        for form in self.call_forms:
            try:
                return self._encode(form.apply(messages), tools, turns, trained, variables)
            except ValueError as error:
                # What a form loses says more than that the template rejects another form.
                if first_error is None or (isinstance(error, LostPartError) > isinstance(first_error, LostPartError)):
                    first_error = error
                if isinstance(error, LostPartError) and error.parts[0].field != CALL:
                    break
        assert first_error is not None
        raise first_error

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        """Raise ValueError if a row's own template variables spell a control token, which would not stay text."""
        for text in strings(dict(variables)):
            if found := self._control.pattern.search(text):
                raise ValueError(f"chat_template_kwargs: spells the control token {found[0]!r}; remove it")

    def _encode(
        self,
        messages: list[Message],
        tools: Tools,
        turns: Sequence[int],
        trained: set[int],
        variables: Mapping[str, Any] | None,
    ) -> Encoded:
        located = self._locator.locate(messages, tools, turns, trained, variables)
        spans = [span for turn in located.turns for span in turn]
        questions = [(place, place + 1) for place in located.questions]
        if located.escape in located.escaped:
            encoding = self._control.encode_escaped(located.escaped, located.escape)
            ids, ranges = np.array(encoding.ids, dtype=np.uint32), token_ranges(encoding, [*spans, *questions])
        else:
            ids, ranges = self._encoder.encode(located.text, [*spans, *questions])
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, end in ranges[: len(spans)].tolist():
            mask[start:end] = True
        if self.train_on == "all":
            return Encoded(ids, ~mask, np.zeros((0, 2), np.int64), ranges[len(spans) :, 0], (), ())
        return self._with_turns(located, ids, mask, ranges)

    def _with_turns(
        self, located: Located, ids: NDArray[np.uint32], mask: NDArray[np.bool_], ranges: NDArray[np.int64]
    ) -> Encoded:
        """Add where the turns lie and how they end. ranges: tokens of all spans, then of the questions."""
        rows = ranges.tolist()
        turns, ends, notes, position = [], [], set(), 0
        for spans, header in zip(located.turns, located.headers, strict=True):
            start, end = rows[position][0], rows[position + len(spans) - 1][1]
            position += len(spans)
            turns.append((start, end))
            final = self._end_token(ids, start, end)
            ends.append(final)
            if final < 0:
                outside = end < len(ids) and int(ids[end]) in self._control.closers
                notes.add(END_OUTSIDE if outside else NO_END_TOKEN)
            # A turn that is found by its prompt begins behind its header.
            opens = self._template.has_generation_blocks and end > start and int(ids[start]) in self._control.openers
            if header or opens:
                notes.add(HEADER)
        places = np.array(turns, dtype=np.int64).reshape(-1, 2)
        return Encoded(ids, mask, places, ranges[position:, 0], tuple(ends), tuple(sorted(notes)))

    def _end_token(self, ids: NDArray[np.uint32], start: int, end: int) -> int:
        """Return the control token that ends a turn of these tokens; -1 if there is none."""
        for place in range(end - 1, start - 1, -1):
            index = int(ids[place])
            if index in self._control.ids:
                return index
            # Some blocks include the line end behind the token.
            if self.tokenizer.decode([index], skip_special_tokens=False).strip():
                break
        return -1

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        """Return the messages whose place must be known: the trained ones or, with "all", the others."""
        # Each turn that must be located may cost a render: only those that matter.
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last":
            assistants = assistants[-1:]
        trained = self.train_on != "all"
        return [index for index in assistants if (messages[index].get("train", True) is not False) == trained]
