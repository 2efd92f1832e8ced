"""Samples longer than the largest level: cut to fit, or split into several.

Owns what a cut keeps and where a split lies; that a sample is over-long, and is listed, others say.

    truncate to 8:  S a a a b b b b c c A A A    ->  S a . . . . . . . c c A A A    (. cut; A the last trained span)
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
    """pieces: token ids and loss mask of each; left_out: exchanges that alone are too long; left_out_tokens: theirs."""

    pieces: list[Sample]
    left_out: int
    left_out_tokens: int


def truncate(ids: NDArray[np.uint32], loss_mask: NDArray[np.bool_], max_tokens: int) -> Sample:
    """At most `max_tokens` of the sample ids [L], loss_mask [L], with as much of its last trained span as fits.

    1. A cut at the right that loses no trained token of that span is made.
    2. Otherwise what follows the span goes, and the middle of what comes before it (as LongBench truncates a prompt,
       https://github.com/THUDM/LongBench): the sample's head and the tokens right before the span stay.
    3. A span that does not fit keeps its beginning, and at most half of `max_tokens` of what comes before it.

    The first token after the seam is not trained: what it followed is gone.
    """
    if len(ids) <= max_tokens:
        return ids, loss_mask
    start, end = _last_span(loss_mask)
    if end <= max_tokens:
        return ids[:max_tokens], loss_mask[:max_tokens]
    context = max(max_tokens - (end - start), 0) if end - start <= max_tokens else min(start, max_tokens // 2)
    if context == start:
        return ids[:max_tokens], loss_mask[:max_tokens]
    head = context // 2
    tail = start - (context - head)
    kept = np.r_[0:head, tail : tail + max_tokens - head]
    ids, loss_mask = ids[kept], loss_mask[kept]
    loss_mask[head] = False
    return ids, loss_mask


def split_conversation(conversation: Conversation, encode: Encode, max_tokens: int) -> SplitConversation:
    """The conversation as several of at most `max_tokens`, each of whole exchanges and as long as possible.

    An exchange is a user's turn with what follows it up to the next one. Each piece begins with the conversation's
    leading system messages and has its tools, and is encoded as a conversation of its own: `encode(messages, tools)`
    gives ids and loss mask, or raises ValueError. A conversation should not get shorter by an exchange more.
    """
    system, exchanges = _exchanges(conversation.messages)
    pieces, left_out, left_out_tokens = [], 0, 0
    start = 0
    while start < len(exchanges):

        def sample(count: int, start: int = start) -> Sample:
            turns = [message for exchange in exchanges[start : start + count] for message in exchange]
            return encode([*system, *turns], conversation.tools)

        first = sample(1)
        if len(first[0]) > max_tokens:
            left_out, left_out_tokens = left_out + 1, left_out_tokens + len(first[0])
            start += 1
            continue
        count, piece = _longest(sample, first, len(exchanges) - start, max_tokens)
        pieces.append(piece)
        start += count
    return SplitConversation(pieces, left_out, left_out_tokens)


def _last_span(loss_mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and end of the last run of trained tokens; (0, 0) where there is none."""
    trained = np.flatnonzero(loss_mask)
    if not len(trained):
        return 0, 0
    end = int(trained[-1]) + 1
    untrained = np.flatnonzero(~loss_mask[:end])
    return (int(untrained[-1]) + 1 if len(untrained) else 0), end


def _exchanges(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """The leading system messages, and the exchanges after them.

    A border lies before a user message, and before a system message that introduces it, but not between two of them:
    a piece has an answer.
    """
    leading = next((index for index, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[dict[str, Any]]] = []
    for index, message in enumerate(messages[leading:], start=leading):
        asks = message["role"] in ("user", "system")
        if not exchanges or (asks and messages[index - 1]["role"] not in ("user", "system")):
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:leading], exchanges


def _longest(sample: Callable[[int], Sample], first: Sample, most: int, max_tokens: int) -> tuple[int, Sample]:
    """The largest count up to `most` whose sample fits, and that sample. first: the sample of 1, which fits.

    By doubling, then halving: as few samples as may be are made of much more than `max_tokens`.
    """
    count, best, too_many = 1, first, most + 1
    step = 1
    while too_many - count > 1:
        tried = min(count + step, (count + too_many) // 2) if too_many <= most else min(count + step, most)
        candidate = sample(tried)
        if len(candidate[0]) <= max_tokens:
            count, best, step = tried, candidate, step * 2
        else:
            too_many = tried
    return count, best
