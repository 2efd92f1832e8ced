"""Samples longer than the largest level: refused, left out or cut, and listed in each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data.token_store import TokenStore, build_token_store, check_fits
from hbp_titan.data.tokenizer import train_tokenizer

TEXTS = ["What does the level hold?", "It holds packs of tokens.", "And the plan?", "The plan holds the levels."]


def _row(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **more}


ROWS = [
    _row(TEXTS[0], TEXTS[1], source="one"),
    _row(TEXTS[0]),
    _row(*TEXTS, source="two"),
    _row(TEXTS[2], TEXTS[3] * 40, source="one"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=300)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def _build(folder: Path, cache: str = "cache", **options: Any) -> TokenStore:
    options = {"num_proc": 1, "progress": False, **options}
    path = build_token_store([folder / "rows.jsonl"], folder / "tokenizer", folder / cache, **options)
    return TokenStore.open(path)


def test_longer_samples_are_left_out_and_listed_or_refused(folder: Path) -> None:
    whole = _build(folder)
    longest = int(whole.lengths.max())
    with pytest.raises(ValueError, match=rf"rows\.jsonl:4: a sample of {longest} tokens .* levels\.max_tokens = 64"):
        check_fits(whole, 64)
    check_fits(whole, longest)
    limited = _build(folder, max_tokens=64)
    assert len(limited) == 2
    assert [(row["line"], row["reason"]) for row in limited.excluded()] == [
        (2, "no assistant turn"),
        (4, "over max_tokens"),
    ]
    assert limited.fingerprint != whole.fingerprint


def test_longer_samples_are_cut_and_listed_unless_nothing_trained_is_left(folder: Path) -> None:
    whole = _build(folder)
    cut = _build(folder, max_tokens=64, overlong="truncate")
    assert cut.lengths.tolist() == np.minimum(whole.lengths, 64).tolist()
    for index in range(3):
        tokens, mask = whole.sample(index)
        assert cut.sample(index)[0].tolist() == tokens[:64].tolist()
        assert cut.loss_tokens[index] == mask[1:64].sum()
    assert [(row["line"], row["tokens"]) for row in cut.truncated()] == [
        (index_line, int(length)) for index_line, length in zip((1, 3, 4), whole.lengths, strict=True) if length > 64
    ]
    with pytest.raises(ValueError, match=r"no sample is left to train on \(3 no trained token, 1 no assistant turn\)"):
        _build(folder, max_tokens=8, overlong="truncate")
