"""One row -> its samples, and what became of it: trained whole, in part, truncated, split, or excluded for a reason.

Owns what is left out of a row by rule, never silently: answers without text, an answer that comes before any question,
reasoning that the template drops (data.reasoning), and what exceeds max_tokens (data/truncate.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hbp_titan.data.chat_tokenizer import ChatTokenizer, Encoded
from hbp_titan.data.formats import Conversation, parse_record
from hbp_titan.data.loss_mask import LostPartError
from hbp_titan.data.sentinels import REASONING, REASONING_END, REASONING_FIELDS
from hbp_titan.data.token_store import MALFORMED, TokenizeConfig
from hbp_titan.data.truncate import Sample, exchanges, split_conversation, truncate

WHOLE, PARTLY, TRUNCATED, SPLIT, EXCLUDED = "whole", "partly", "truncated", "split", "excluded"
EMPTY = "empty"
NO_ASSISTANT_TURN = "no assistant turn"
NO_TRAINED_TOKEN = "no trained token"
OVER_MAX_TOKENS = "over max_tokens"
SPLIT_BY_REASONING = "reasoning of earlier turns"
# What is left out of a row that is trained in part.
EMPTY_ANSWER, NO_PROMPT, REASONING_DROPPED = "empty answer", "answer before any question", "reasoning dropped"
_LEFT_OUT = (EMPTY_ANSWER, NO_PROMPT, REASONING_DROPPED)


@dataclass(frozen=True)
class TokenizedRow:
    """The samples of a row, and its outcome: whole, partly, truncated, split or excluded.

    tokens: before any cut; 0 if the row was not tokenized. reason: of the outcome. detail: what is wrong with a
    malformed row; which exchanges of a split row were dropped. ends: the control token at the end of each trained
    turn, -1 where there is none. notes: problems of the row's turns and what is left out of it, whatever the outcome.
    """

    outcome: str
    samples: list[Sample]
    source: str | None = None
    tokens: int = 0
    reason: str = ""
    detail: str = ""
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class RowTokenizer:
    """Tokenizes rows; never raises for a row. Raises ValueError for a tokenizer folder that cannot be used."""

    def __init__(self, settings: TokenizeConfig) -> None:
        self.settings = settings
        self._chat_tokenizer = ChatTokenizer(
            settings.tokenizer_path, settings.train_on, settings.chat_template, settings.template_date
        )

    def tokenize(self, record: dict[str, Any] | ValueError) -> TokenizedRow:
        """Return the samples of a record; a ValueError in its place is excluded as malformed."""
        settings = self.settings
        try:
            if isinstance(record, ValueError):
                raise record
            conversation = parse_record(record, settings.format, settings.columns, settings.roles)
            reason = _nothing_to_train(conversation, settings.train_on)
            if reason:
                return _excluded(reason)
            conversation, notes = self._without_untrainable(conversation)
            if notes and not self._trains(conversation):
                return _excluded(notes[0])
            return self._encode(conversation, notes)
        except RecursionError:
            # From any recursion over the row, for example in its template.
            return _excluded(MALFORMED, detail="nested too deeply")
        except ValueError as error:
            return _excluded(MALFORMED, detail=" ".join(str(error).split()))

    def _without_untrainable(self, conversation: Conversation) -> tuple[Conversation, list[str]]:
        """Return the conversation with `train: False` on answers that must not be trained, and the notes of why."""
        messages, notes = [], []
        asked = False
        for message in conversation.messages:
            asked = asked or message["role"] != "assistant"
            reason = ""
            if message["role"] == "assistant" and message.get("train") is not False:
                if self.settings.empty_answers == "skip" and _is_empty(message):
                    reason = EMPTY_ANSWER
                elif not asked and self.settings.train_on != "all":
                    reason = NO_PROMPT
            messages.append({**message, "train": False} if reason else message)
            notes += [reason] if reason and reason not in notes else []
        return (dataclasses.replace(conversation, messages=messages), notes) if notes else (conversation, [])

    def _trains(self, conversation: Conversation) -> bool:
        assistants = [message for message in conversation.messages if message["role"] == "assistant"]
        assistants = assistants[-1:] if self.settings.train_on == "last" else assistants
        return self.settings.train_on == "all" or any(message.get("train") is not False for message in assistants)

    def _encode(self, conversation: Conversation, notes: list[str]) -> TokenizedRow:
        limit, policy = self.settings.max_tokens, self.settings.max_length_policy
        encoded, reasoning_notes = self._samples(conversation)
        length = sum(len(sample.ids) for sample in encoded)
        outcome, reason, detail = (WHOLE, "", "") if len(encoded) == 1 else (SPLIT, SPLIT_BY_REASONING, "")
        samples: list[Sample] = []
        dropped = dropped_tokens = 0
        for number, sample in enumerate(encoded):
            if not limit or len(sample.ids) <= limit:
                samples.append((sample.ids, sample.loss_mask))
                continue
            outcome, reason = TRUNCATED if policy == "truncate" and len(encoded) == 1 else SPLIT, OVER_MAX_TOKENS
            if policy == "truncate":
                samples.append(truncate(sample, limit))
                continue
            if policy == "split":
                part = conversation if len(encoded) == 1 else _exchange(conversation, number, alone=True)
                pieces = split_conversation(part, self._encoded, limit)
                samples += pieces.pieces
                dropped, dropped_tokens = dropped + pieces.dropped, dropped_tokens + pieces.dropped_tokens
            else:
                dropped, dropped_tokens = dropped + 1, dropped_tokens + len(sample.ids)
        if dropped and not samples:
            return _excluded(reason, length, "no exchange fits" if policy == "split" else "")
        if dropped:
            detail = f"{dropped} exchanges of {dropped_tokens} tokens fit nowhere"
        # Nothing predicts the first token of a sample, so it does not count as trained.
        trained = [sample for sample in samples if sample[1][1:].any()]
        if not trained:
            return _excluded(NO_TRAINED_TOKEN, length)
        notes = [*notes, *reasoning_notes, *sorted({note for sample in encoded for note in sample.notes})]
        if outcome == WHOLE and notes and notes[0] in _LEFT_OUT:
            outcome, reason = PARTLY, notes[0]
        ends = tuple(end for sample in encoded for end in sample.ends)
        return TokenizedRow(outcome, trained, conversation.source, length, reason, detail, ends, tuple(notes))

    def _samples(self, conversation: Conversation) -> tuple[list[Encoded], list[str]]:
        """Return the conversation as one sample, or as data.reasoning asks if the template drops reasoning."""
        try:
            return [self._encoded(conversation)], []
        except LostPartError as error:
            if self.settings.reasoning == "error" or any(part.field != REASONING for part in error.parts):
                raise
            if self.settings.reasoning == "drop":
                lost = {part.message for part in error.parts}
                messages = [
                    _without_reasoning(message) if index in lost else message
                    for index, message in enumerate(conversation.messages)
                ]
                return [self._encoded(dataclasses.replace(conversation, messages=messages))], [REASONING_DROPPED]
            count = len(exchanges(conversation.messages)[1])
            if count == 1:
                raise
            parts = [_exchange(conversation, number, alone=False) for number in range(count)]
            return [self._encoded(part) for part in parts if self._trains(part)], []

    def _encoded(self, conversation: Conversation) -> Encoded:
        self._chat_tokenizer.check_variables(conversation.variables)
        variables = {**self.settings.chat_template_kwargs, **conversation.variables}
        return self._chat_tokenizer.encode(conversation.messages, conversation.tools, variables)


def _exchange(conversation: Conversation, number: int, alone: bool) -> Conversation:
    """Return the conversation up to an exchange, of which only that one is trained; without the earlier ones if
    `alone`."""
    system, parts = exchanges(conversation.messages)
    earlier = [
        {**message, "train": False} if message["role"] == "assistant" else message
        for part in parts[:number]
        for message in part
    ]
    return dataclasses.replace(conversation, messages=[*system, *([] if alone else earlier), *parts[number]])


def _is_empty(message: dict[str, Any]) -> bool:
    texts = [message.get(field) for field in ("content", *REASONING_FIELDS)]
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    if isinstance(message.get("content"), str):
        ends = [match.end() for match in REASONING_END.finditer(message["content"])]
        message["content"] = message["content"][ends[-1] :].lstrip("\n") if ends else message["content"]
    return message


def _nothing_to_train(conversation: Conversation, train_on: str) -> str:
    """Return the reason why the conversation has nothing to train, "" if it has."""
    messages = conversation.messages
    if not any(message.get("content") or message.get("tool_calls") for message in messages):
        return EMPTY
    if train_on != "all" and not any(message["role"] == "assistant" for message in messages):
        return NO_ASSISTANT_TURN
    return ""


def _excluded(reason: str, tokens: int = 0, detail: str = "") -> TokenizedRow:
    return TokenizedRow(EXCLUDED, [], tokens=tokens, reason=reason, detail=detail)
