"""One row -> its samples, or the reason why it has none.

Owns what becomes of a row: trained whole, truncated, split, or excluded for a reason that the ledger keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hbp_titan.data.chat.chat_template import ChatTokenizer
from hbp_titan.data.chat.overlong import Sample, split_conversation, truncate
from hbp_titan.data.sources.conversation import Conversation
from hbp_titan.data.sources.row_formats import parse_record

WHOLE, TRUNCATED, SPLIT, EXCLUDED = "whole", "truncated", "split", "excluded"
MALFORMED = "malformed"
EMPTY = "empty"
NO_ASSISTANT_TURN = "no assistant turn"
NO_TRAINED_TOKEN = "no trained token"
OVER_MAX_TOKENS = "over max_tokens"


@dataclass(frozen=True)
class Recipe:
    """Everything that the samples of a source depend on beside its rows (job_config.Data and DataSource).

    name: of the source; "" takes each row's own, else its file's. max_tokens: of a sample; 0 keeps any length.
    overlong: truncate, split or skip; not asked with max_tokens = 0.
    """

    tokenizer_path: Path
    train_on: str = "assistant"
    max_tokens: int = 0
    overlong: str = "skip"
    format: str = "messages"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    name: str = ""
    max_row_bytes: int = 1 << 25


@dataclass(frozen=True)
class TokenizedRow:
    """outcome: whole, truncated, split or excluded. tokens: before any cut; 0 where the row was not tokenized.

    detail: what is wrong with a malformed row; what of a split one is left out.
    """

    outcome: str
    samples: list[Sample]
    source: str | None = None
    tokens: int = 0
    reason: str = ""
    detail: str = ""


class RowTokenizer:
    """Tokenizes rows by a recipe; never raises for a row. ValueError for a tokenizer folder that cannot be used."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._chat_tokenizer = ChatTokenizer(recipe.tokenizer_path, recipe.train_on)

    def tokenize(self, record: dict[str, Any] | ValueError) -> TokenizedRow:
        """The samples of a record; of an unreadable one (an error) the outcome malformed."""
        recipe = self.recipe
        try:
            if isinstance(record, ValueError):
                raise record
            conversation = parse_record(record, recipe.format, recipe.columns, recipe.roles)
            reason = _nothing_to_train(conversation, recipe.train_on)
            return _excluded(reason) if reason else self._encode(conversation)
        except RecursionError:
            return _excluded(MALFORMED, detail="nested too deeply")
        except ValueError as error:
            return _excluded(MALFORMED, detail=" ".join(str(error).split()))

    def _encode(self, conversation: Conversation) -> TokenizedRow:
        recipe, encode = self.recipe, self._chat_tokenizer.encode
        tokens, loss_mask = encode(conversation.messages, conversation.tools)
        length, outcome, reason, detail = len(tokens), WHOLE, "", ""
        samples = [(tokens, loss_mask)]
        if recipe.max_tokens and length > recipe.max_tokens:
            reason = OVER_MAX_TOKENS
            if recipe.overlong == "skip":
                return _excluded(reason, length)
            if recipe.overlong == "truncate":
                outcome, samples = TRUNCATED, [truncate(tokens, loss_mask, recipe.max_tokens)]
            else:
                outcome = SPLIT
                samples, left_out, left_out_tokens = split_conversation(conversation, encode, recipe.max_tokens)
                if not samples:
                    return _excluded(reason, length, "no exchange fits")
                detail = f"{left_out} exchanges of {left_out_tokens} tokens fit nowhere" if left_out else ""
        # The first token of a sample is predicted by nothing.
        trained = [sample for sample in samples if sample[1][1:].any()]
        if not trained:
            return _excluded(NO_TRAINED_TOKEN, length)
        return TokenizedRow(outcome, trained, conversation.source, length, reason, detail)


def _nothing_to_train(conversation: Conversation, train_on: str) -> str:
    messages = conversation.messages
    if not any(message.get("content") or message.get("tool_calls") for message in messages):
        return EMPTY
    if train_on != "all" and not any(message["role"] == "assistant" for message in messages):
        return NO_ASSISTANT_TURN
    return ""


def _excluded(reason: str, tokens: int = 0, detail: str = "") -> TokenizedRow:
    return TokenizedRow(EXCLUDED, [], tokens=tokens, reason=reason, detail=detail)
