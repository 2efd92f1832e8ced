"""Documents of the recall task: keys get values far before the questions about them.

    <w4><k7=v2><w0><w0><k3=v9><w6><k7=v5><w1> <k3?> v9 <k7?> v5

Owns the words, a tokenizer in which each is one token, the documents and the reading of answers back from tokens. Every
document has the same keys, with new values: only the document itself has the answer, and the documents that
share its pack have wrong ones. Without the document one of VALUES is right by chance. Some keys are written twice; the
later value is the answer, so a model must know which of two tokens is the nearer one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from hbp_titan.data.tokenizer import TURN_END, TURN_START, train_tokenizer

KEYS, VALUES, FILLERS = 8, 16, 8
WORDS = (
    *(f"<k{key}=v{value}>" for key in range(KEYS) for value in range(VALUES)),
    *(f"<k{key}?>" for key in range(KEYS)),
    *(f"<v{value}>" for value in range(VALUES)),
    *(f"<w{filler}>" for filler in range(FILLERS)),
)
"""In the order of their token ids: writes, questions, values, fillers."""
QUESTION_TOKENS = 4
"""Turn start, question, value, turn end."""
MIN_TOKENS = 16
TEMPLATE = (
    "{%- for message in messages %}{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '" + TURN_END + "' }}{%- endgeneration %}"
    "{%- else %}{{- '" + TURN_START + "' + message['content'] }}{%- endif %}{%- endfor %}"
)
"""Chat template without headers: the answer is the token after the question."""


def add_words(folder: Path) -> int:
    """Give the tokenizer in `folder` the WORDS, one token each, and the TEMPLATE; return its number of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = TEMPLATE
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer of bytes, turn tokens and WORDS; return its number of tokens."""
    # Bytes only: the task has no other text.
    train_tokenizer([], folder, vocab_size=256)
    return add_words(folder)


def first_word_id(folder: Path) -> int:
    """Return the id of WORDS[0]; the others follow. ValueError if the tokenizer does not have them so."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    first: int | None = tokenizer.token_to_id(WORDS[0])
    if first is None or [tokenizer.token_to_id(word) for word in WORDS] != list(range(first, first + len(WORDS))):
        raise ValueError(f"{folder}: the tokenizer lacks words of the recall task; make the folder with add_words")
    return first


def document(generator: np.random.Generator, tokens: int, questions: int, rewritten: float) -> dict[str, Any]:
    """Return a row with `messages` of exactly `tokens` tokens under TEMPLATE.

    questions: at most; each is about another key. rewritten: share of the keys that had another value before. The
    distance of a value from the questions is uniform for half of the keys and log-uniform for the others, so that short
    and long ones occur in every document.
    """
    assert tokens >= MIN_TOKENS, f"a document of {tokens} tokens has no place for a question"
    # Half of the document at most are questions.
    count = min(questions, KEYS, tokens // (2 * QUESTION_TOKENS))
    size = tokens - QUESTION_TOKENS * count
    words = [f"<w{filler}>" for filler in generator.integers(FILLERS, size=size)]
    free = np.ones(size, dtype=np.bool_)
    keys = generator.permutation(KEYS)[:count]
    answers = generator.integers(VALUES, size=count)
    places = []
    for key, value in zip(keys, answers, strict=True):
        if generator.random() < 0.5:
            place = size - int(np.exp(generator.uniform(0, np.log(size + 1))))
        else:
            place = int(generator.integers(size))
        places.append(_nearest_free(free, place))
        words[places[-1]] = f"<k{key}=v{value}>"
    for key, value, place in zip(keys, answers, places, strict=True):
        # A third of the document apart: the order of neighbors is another task than recall over a distance.
        earlier = np.flatnonzero(free[: max(0, place - size // 3)])
        if len(earlier) and generator.random() < rewritten:
            old = int(generator.choice(earlier))
            free[old] = False
            words[old] = f"<k{key}=v{(value + 1 + generator.integers(VALUES - 1)) % VALUES}>"
    messages = []
    for number, index in enumerate(generator.permutation(count)):
        asked = f"<k{keys[index]}?>"
        messages.append({"role": "user", "content": asked if number else "".join(words) + asked})
        messages.append({"role": "assistant", "content": f"<v{answers[index]}>"})
    return {"messages": messages, "source": "recall"}


def _nearest_free(free: NDArray[np.bool_], place: int) -> int:
    """Return the free place nearest to `place` and take it."""
    places = np.flatnonzero(free)
    found = int(places[np.abs(places - place).argmin()])
    free[found] = False
    return found


def write_documents(
    path: Path, lengths: Sequence[int] | NDArray[np.int64], seed: int, questions: int = KEYS, rewritten: float = 0.5
) -> None:
    """Write one document of each length as JSON lines; the same arguments give the same bytes."""
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (document(generator, int(tokens), questions, rewritten) for tokens in lengths)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Answer(NamedTuple):
    """A question in a tokenized document.

    place: index of the question token, at which the value is predicted. written: index of the write that holds the
    value. rewritten: whether the key had another value before.
    """

    place: int
    written: int
    rewritten: bool


def answers_in(tokens: NDArray[Any], first_word: int) -> list[Answer]:
    """Return the questions of a document, [] of any other text; AssertionError if a value is not the last one written.

    tokens: int [L]; first_word: `first_word_id`.
    """
    words = tokens.astype(np.int64) - first_word
    writes = np.flatnonzero((words >= 0) & (words < KEYS * VALUES))
    questions = np.flatnonzero((words >= KEYS * VALUES) & (words < KEYS * (VALUES + 1)))
    keys_written, found = words[writes] // VALUES, []
    for place in questions.tolist():
        own = writes[keys_written == words[place] - KEYS * VALUES]
        own = own[own < place]
        assert words[place + 1] - KEYS * (VALUES + 1) == words[own[-1]] % VALUES, "the answer is not in the document"
        found.append(Answer(place, int(own[-1]), len(own) > 1))
    return found


def mixed_lengths(
    generator: np.random.Generator, bounds: Sequence[int], counts: Iterable[int], shortest: int = MIN_TOKENS
) -> NDArray[np.int64]:
    """Return counts[k] log-uniform lengths above bounds[k - 1] (`shortest` for k = 0) and at most bounds[k]."""
    lows = [shortest, *(bound + 1 for bound in bounds[:-1])]
    parts = [
        np.exp(generator.uniform(np.log(low), np.log(high + 1), size=count)).astype(np.int64).clip(low, high)
        for low, high, count in zip(lows, bounds, counts, strict=True)
    ]
    return generator.permutation(np.concatenate(parts))
