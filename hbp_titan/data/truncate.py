"""Samples longer than max_tokens: cut to fit, or split into several.

    truncate to 8:  S a a a b b b b c c A A A    ->  S a . . . . . . . c c A A A    (. cut; A the last trained turn)

Owns what a cut keeps and where a split lies. data/build_source.py decides which policy applies and lists the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.chat_tokenizer import Encoded
from hbp_titan.data.formats import Conversation

Sample = tuple[NDArray[np.uint32], NDArray[np.bool_]]
Encode = Callable[[Conversation], Encoded]


class SplitConversation(NamedTuple):
    """pieces: token ids and loss mask of each. dropped: exchanges that alone are too long; dropped_tokens: theirs."""

    pieces: list[Sample]
    dropped: int
    dropped_tokens: int


def truncate(sample: Encoded, max_tokens: int) -> Sample:
    """Return at most `max_tokens` of the sample, with as much of its last trained turn as fits.

    1. If a cut at the right loses no trained token of that turn, cut there.
    2. Otherwise drop what follows the turn, and the middle of what precedes it (as LongBench truncates a prompt,
       https://github.com/THUDM/LongBench): keep the sample's head and the tokens right before the turn.
    3. If the turn itself is too long, keep its beginning and at most `max_tokens` / 2 tokens before it.
    Of the other turns, those that are cut into are not trained, nor those whose question was cut into or away.
    """
    ids, loss_mask = sample.ids, sample.loss_mask
    if len(ids) <= max_tokens:
        return ids, loss_mask
    start, end = sample.turns[-1].tolist() if len(sample.turns) else _last_span(loss_mask)
    if end <= max_tokens:
        return ids[:max_tokens], loss_mask[:max_tokens]
    # Tokens before the turn that can stay.
    context = max(max_tokens - (end - start), 0) if end - start <= max_tokens else min(start, max_tokens // 2)
    if context == start:
        return ids[:max_tokens], loss_mask[:max_tokens]
    head = context // 2
    tail = start - (context - head)
    kept = np.r_[0:head, tail : tail + max_tokens - head]
    loss_mask = loss_mask.copy()
    for turn_start, turn_end in sample.turns[:-1].tolist():
        question = max((place for place in sample.questions.tolist() if place <= turn_start), default=-1)
        if turn_end > head and min(turn_start, question) < tail:
            loss_mask[turn_start:turn_end] = False
    ids, loss_mask = ids[kept], loss_mask[kept]
    # The first token after the seam is not trained: its context is gone.
    loss_mask[head] = False
    return ids, loss_mask


def split_conversation(conversation: Conversation, encode: Encode, max_tokens: int) -> SplitConversation:
    """Split a conversation into pieces of at most `max_tokens`, each of whole exchanges and as long as possible.

    An exchange is a user turn and what follows it up to the next one. Each piece begins with the conversation's leading
    system messages, has its tools, and is encoded as a conversation of its own; one more exchange must not make a
    conversation shorter.
    """
    system, parts = exchanges(conversation.messages)
    pieces, dropped, dropped_tokens = [], 0, 0
    start = 0
    while start < len(parts):

        def sample(count: int, start: int = start) -> Sample:
            turns = [message for part in parts[start : start + count] for message in part]
            encoded = encode(dataclasses.replace(conversation, messages=[*system, *turns]))
            return encoded.ids, encoded.loss_mask

        # An exchange that does not fit alone is dropped, never cut: half an answer must not be trained.
        first = sample(1)
        if len(first[0]) > max_tokens:
            dropped, dropped_tokens = dropped + 1, dropped_tokens + len(first[0])
            start += 1
            continue
        count, piece = _longest(sample, first, len(parts) - start, max_tokens)
        pieces.append(piece)
        start += count
    return SplitConversation(pieces, dropped, dropped_tokens)


def _last_span(loss_mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return start and end of the last run of trained tokens; (0, 0) if there is none."""
    trained = np.flatnonzero(loss_mask)
    if not len(trained):
        return 0, 0
    end = int(trained[-1]) + 1
    untrained = np.flatnonzero(~loss_mask[:end])
    return (int(untrained[-1]) + 1 if len(untrained) else 0), end


def exchanges(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the leading system messages, and the exchanges after them.

    A boundary lies before a user message, or before a system message that introduces it, but not between two of these:
    every piece needs an answer.
    """
    leading = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    found: list[list[dict[str, Any]]] = []
    for index, message in enumerate(messages[leading:], start=leading):
        asks = message["role"] in ("user", "system")
        if not found or (asks and messages[index - 1]["role"] not in ("user", "system")):
            found.append([])
        found[-1].append(message)
    return messages[:leading], found


def _longest(sample: Callable[[int], Sample], first: Sample, limit: int, max_tokens: int) -> tuple[int, Sample]:
    """Return the largest count up to `limit` whose sample fits, and that sample. first: the sample of 1, which fits."""
    # By doubling, then halving: a binary search from `limit` would encode samples of many times max_tokens.
    count, best, too_many = 1, first, limit + 1
    step = 1
    while too_many - count > 1:
        tried = min(count + step, (count + too_many) // 2) if too_many <= limit else min(count + step, limit)
        candidate = sample(tried)
        if len(candidate[0]) <= max_tokens:
            count, best, step = tried, candidate, step * 2
        else:
            too_many = tried
    return count, best
