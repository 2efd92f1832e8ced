"""Over-long samples cut and split: by literals a reader can check, and against a search over every way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.chat_tokenizer import Encoded
from hbp_titan.data.formats import Conversation
from hbp_titan.data.truncate import SplitConversation, split_conversation, truncate
from tests.properties import examples


def sample(mask: list[bool], ids: list[int] | None = None) -> Encoded:
    """A sample in which each run of trained tokens is a turn, and each run of others the question before it."""
    trained = np.array(mask, dtype=np.bool_)
    edges = np.flatnonzero(np.diff(np.r_[False, trained, False]))
    questions = np.flatnonzero(np.diff(np.r_[False, ~trained, False]))[::2]
    tokens = np.array(ids if ids is not None else range(len(mask)), dtype=np.uint32)
    return Encoded(tokens, trained, edges.reshape(-1, 2), questions, (), ())


def cut(text: str, mask: str, max_tokens: int) -> tuple[str, str]:
    """`truncate` of a sample of one token per letter; the mask's "1" are trained."""
    whole = sample([letter == "1" for letter in mask], [ord(letter) for letter in text])
    kept, trained = truncate(whole, max_tokens)
    assert kept.dtype == np.uint32
    assert trained.dtype == np.bool_
    return "".join(map(chr, kept)), "".join("01"[int(bit)] for bit in trained)


@pytest.mark.parametrize(
    ("text", "mask", "max_tokens", "expected"),
    [
        ("abcdef", "000111", 6, ("abcdef", "000111")),
        # Only what nobody trains is lost at the right.
        ("abcdefgh", "00011000", 6, ("abcdef", "000110")),
        ("abcdefgh", "00000000", 3, ("abc", "000")),
        # Five places for "abcdefgh": two for its head, three for its end.
        ("abcdefghIJKx", "000000001110", 8, ("abfghIJK", "00000111")),
        # An earlier answer that is cut into, whose question is cut into, and whose question is whole.
        ("abcdefghIJK", "00111110111", 8, ("abfghIJK", "00000111")),
        ("aBcdEfGHI", "010010111", 7, ("aBEfGHI", "0100111")),
        ("abcdEfGHI", "000010111", 8, ("abdEfGHI", "00000111")),
        ("aBcDeFGHI", "010101111", 8, ("aBDeFGHI", "01001111")),
        # No room for anything but the answer.
        ("abcdEFGH", "00001111", 4, ("EFGH", "0111")),
        # The answer alone does not fit: half of the places for what comes before it.
        ("abcdefEFGHIJ", "000000111111", 4, ("afEF", "0011")),
        ("abEFGHIJ", "00111111", 5, ("abEFG", "00111")),
        ("ABCDEFGH", "11111111", 3, ("ABC", "111")),
    ],
)
def test_a_cut_keeps_the_last_turn_where_it_can(
    text: str, mask: str, max_tokens: int, expected: tuple[str, str]
) -> None:
    assert cut(text, mask, max_tokens) == expected


@given(mask=st.lists(st.booleans(), min_size=1, max_size=30), max_tokens=st.integers(1, 32))
@examples(300)
def test_a_cut_keeps_a_head_and_a_later_part_and_trains_whole_answers_to_whole_questions(
    mask: list[bool], max_tokens: int
) -> None:
    size = len(mask)
    whole = sample(mask)
    ids, trained = truncate(whole, max_tokens)
    kept = ids.tolist()
    # Every way to keep a head and one later part in min(size, max_tokens) places.
    ways = [
        [*range(head), *range(tail, tail + min(size, max_tokens) - head)]
        for head in range(min(size, max_tokens) + 1)
        for tail in range(head, size - min(size, max_tokens) + head + 1)
    ]
    assert kept in ways
    seams = {place for place in range(1, len(kept)) if kept[place] != kept[place - 1] + 1} or {0}
    turns = whole.turns.tolist()
    for number, (start, end) in enumerate(turns):
        places = [place for place, index in enumerate(kept) if start <= index < end]
        question = range(turns[number - 1][1] if number else 0, start)
        if number == len(turns) - 1:
            # The last one is kept by rule, but for a token whose context is gone.
            assert all(trained[place] for place in places if place not in seams)
            fits = any(set(range(start, end)) <= set(way) for way in ways)
            assert len(places) == end - start if fits else max_tokens - len(places) <= max_tokens // 2
        else:
            complete = len(places) == end - start and set(question) <= set(kept) and len(question) > 0
            expected = complete or (number == 0 and start == 0 and len(places) == end)
            assert [bool(trained[place]) for place in places] == [
                expected and place not in seams - {0} for place in places
            ]
    assert not any(trained[place] for place, index in enumerate(kept) if not mask[index])


def message(role: str, size: int) -> dict[str, Any]:
    return {"role": role, "content": role[0] * size}


def letters(conversation: Conversation) -> Encoded:
    """One token per letter, trained for the assistant; one more token per tool."""
    text = "".join(item["content"] for item in conversation.messages) + "t" * len(conversation.tools or [])
    return sample([letter == "a" for letter in text], [ord(letter) for letter in text])


def split(roles: str, max_tokens: int, tools: list[dict[str, Any]] | None = None) -> tuple[list[str], int, int]:
    """The pieces of a conversation whose messages are one letter each, as text."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    conversation = Conversation([message(names[role], 1) for role in roles], tools, None)
    result = split_conversation(conversation, letters, max_tokens)
    return ["".join(map(chr, ids)) for ids, _ in result.pieces], result.dropped, result.dropped_tokens


@pytest.mark.parametrize(
    ("roles", "max_tokens", "expected"),
    [
        ("uauaua", 4, (["uaua", "ua"], 0, 0)),
        ("suauaua", 5, (["suaua", "sua"], 0, 0)),
        # A tool's turn and a second answer stay with their question.
        ("uatauataua", 7, (["uata", "uataua"], 0, 0)),
        # Two questions in a row have one answer; so has a question that a system message introduces.
        ("uuasua", 3, (["uua", "sua"], 0, 0)),
        ("auaua", 3, (["aua", "ua"], 0, 0)),
        # s, then ua, uatat and sua: the second is dropped, of 6 tokens with the leading system message.
        ("suauatatsua", 4, (["sua", "ssua"], 1, 6)),
    ],
)
def test_a_conversation_is_split_before_users_turns(
    roles: str, max_tokens: int, expected: tuple[list[str], int, int]
) -> None:
    assert split(roles, max_tokens) == expected


def test_each_piece_has_the_tools() -> None:
    assert split("uaua", 4, [{"name": "f"}]) == (["uat", "uat"], 0, 0)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    system=st.integers(0, 3),
    max_tokens=st.integers(1, 25),
)
@examples(100)
def test_pieces_are_the_longest_that_fit_as_a_search_one_by_one_finds_them(
    sizes: list[int], system: int, max_tokens: int
) -> None:
    leading = [message("system", system)] if system else []
    turns = [turn for size in sizes for turn in (message("user", 1), message("assistant", size))]
    result = split_conversation(Conversation([*leading, *turns], None, None), letters, max_tokens)
    expected, dropped, place = [], [], 0
    while place < len(sizes):
        counts = [
            count
            for count in range(1, len(sizes) - place + 1)
            if system + sum(sizes[place : place + count]) + count <= max_tokens
        ]
        if counts:
            expected.append(system + sum(sizes[place : place + counts[-1]]) + counts[-1])
        else:
            dropped.append(system + sizes[place] + 1)
        place += counts[-1] if counts else 1
    assert [len(ids) for ids, _ in result.pieces] == expected
    assert result == SplitConversation(result.pieces, len(dropped), sum(dropped))
    # Nothing is lost or repeated.
    assert sum(int(mask.sum()) for _, mask in result.pieces) == sum(sizes) - sum(dropped) + (system + 1) * len(dropped)


def test_a_conversation_of_many_turns_is_split_in_few_encodings() -> None:
    encoded: list[int] = []

    def counting(conversation: Conversation) -> Encoded:
        encoded.append(len(conversation.messages))
        return letters(conversation)

    turns = [message(role, 5) for _ in range(1000) for role in ("user", "assistant")]
    result = split_conversation(Conversation(turns, None, None), counting, 1000)
    assert [len(ids) for ids, _ in result.pieces] == [1000] * 10
    assert len(encoded) <= 150
    # None much longer than a piece of 200 messages.
    assert max(encoded) <= 400
