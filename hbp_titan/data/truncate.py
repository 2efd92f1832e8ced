"""Samples longer than max_tokens: cut to fit, or split into several.

    truncate to 8:  S a a a b b b b c c A A A    ->  S a . . . . . . . c c A A A    (. cut; A the last trained span)

Owns what a cut keeps and where a split lies. data/build_source.py decides which policy applies and lists the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.formats import Conversation

Sample = tuple[NDArray[np.uint32], NDArray[np.bool_]]
Encode = Callable[[list[dict[str, Any]], "list[dict[str, Any]] | None"], Sample]


class SplitConversation(NamedTuple):
    """pieces: token ids and loss mask of each. dropped: exchanges that alone are too long; dropped_tokens: theirs."""

    pieces: list[Sample]
    dropped: int
    dropped_tokens: int


def truncate(ids: NDArray[np.uint32], loss_mask: NDArray[np.bool_], max_tokens: int) -> Sample:
    """Return at most `max_tokens` of the sample ids [L], loss_mask [L], with as much of its last trained span as fits.

    1. If a cut at the right loses no trained token of that span, cut there.
    2. Otherwise drop what follows the span, and the middle of what precedes it (as LongBench truncates a prompt,
       https://github.com/THUDM/LongBench): keep the sample's head and the tokens right before the span.
    3. If the span itself is too long, keep its beginning and at most `max_tokens` / 2 tokens before it.
    """
    if len(ids) <= max_tokens:
        return ids, loss_mask
    start, end = _last_span(loss_mask)
    if end <= max_tokens:
        return ids[:max_tokens], loss_mask[:max_tokens]
    # Tokens before the span that can stay.
    context = max(max_tokens - (end - start), 0) if end - start <= max_tokens else min(start, max_tokens // 2)
    if context == start:
        return ids[:max_tokens], loss_mask[:max_tokens]
    head = context // 2
    tail = start - (context - head)
    kept = np.r_[0:head, tail : tail + max_tokens - head]
    ids, loss_mask = ids[kept], loss_mask[kept]
    # The first token after the seam is not trained: its context is gone.
    loss_mask[head] = False
    return ids, loss_mask


def split_conversation(conversation: Conversation, encode: Encode, max_tokens: int) -> SplitConversation:
    """Split a conversation into pieces of at most `max_tokens`, each of whole exchanges and as long as possible.

    An exchange is a user turn and what follows it up to the next one. Each piece begins with the conversation's leading
    system messages, has its tools, and is encoded as a conversation of its own. `encode(messages, tools)` returns ids
    and loss mask or raises ValueError; one more exchange must not make a conversation shorter.
    """
    system, exchanges = _exchanges(conversation.messages)
    pieces, dropped, dropped_tokens = [], 0, 0
    start = 0
    while start < len(exchanges):

        def sample(count: int, start: int = start) -> Sample:
            turns = [message for exchange in exchanges[start : start + count] for message in exchange]
            return encode([*system, *turns], conversation.tools)

        # An exchange that does not fit alone is dropped, never cut: half an answer must not be trained.
        first = sample(1)
        if len(first[0]) > max_tokens:
            dropped, dropped_tokens = dropped + 1, dropped_tokens + len(first[0])
            start += 1
            continue
        count, piece = _longest(sample, first, len(exchanges) - start, max_tokens)
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


def _exchanges(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the leading system messages, and the exchanges after them.

    A boundary lies before a user message, or before a system message that introduces it, but not between two of these:
    every piece needs an answer.
    """
    leading = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[dict[str, Any]]] = []
    for index, message in enumerate(messages[leading:], start=leading):
        asks = message["role"] in ("user", "system")
        if not exchanges or (asks and messages[index - 1]["role"] not in ("user", "system")):
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:leading], exchanges


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
