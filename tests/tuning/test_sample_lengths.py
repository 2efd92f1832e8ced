"""Lengths of a user's data: which rows are read, and that they are the lengths of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.rows import RowIndex
from hbp_titan.errors import UserError
from hbp_titan.tuning.sample_lengths import DataLengths, choose_rows, read_lengths
from tests.tiny_run import write_tiny_run


def _index(sizes: list[int]) -> RowIndex:
    ends = np.cumsum(sizes)
    return RowIndex(Path("a"), Path("a"), ends - sizes, np.array(sizes), np.arange(1, len(sizes) + 1))


def test_largest_rows_are_read_next_to_random_ones() -> None:
    indexes = [_index([10] * 500), _index([10] * 300 + [900] + [10] * 199)]
    chosen, largest = choose_rows(indexes, 100, seed=0)
    assert (sum(map(len, chosen)), sum(map(len, largest))) == (100, 64)
    assert 900 in largest[1].sizes
    lines = [[set(part.lines.tolist()) for part in parts] for parts in (chosen, largest)]
    assert all(not own & other for own, other in zip(*lines, strict=True))
    # An eighth of the bytes for the largest.
    chosen, largest = choose_rows(indexes, 100, seed=0, most_bytes=400)
    assert (sum(map(len, chosen)), sum(map(len, largest))) == (40, 1)
    assert [len(part) for part in choose_rows(indexes, 1000, seed=0)[0]] == [500, 500]


def test_lengths_are_those_of_the_run_and_stand_for_all_rows(tmp_path: Path) -> None:
    config = load_config(write_tiny_run(tmp_path))
    store = open_stores(config, 10_000)[0]
    found = read_lengths(config, 1000, print)
    assert (found.rows, found.complete, found.excluded) == (60, True, {})
    np.testing.assert_array_equal(np.sort(found.lengths), np.sort(store.lengths))
    assert found.loss_tokens.sum() == store.loss_tokens.sum()
    few = read_lengths(config, 20, print)
    assert (few.rows, few.random_rows, few.complete) == (60, 0, True)  # the 64 largest are all
    assert few.lengths.max() == store.lengths.max()
    assert not list(Path(config.data.cache_folder).glob(".lengths-*"))


def test_epoch_counts_the_largest_rows_once() -> None:
    data = DataLengths(np.array([1, 2, 3, 99]), np.array([1, 1, 1, 9]), 3, 101, 3, 1, {})
    lengths, loss_tokens = data.epoch(seed=0)
    assert (len(lengths), (lengths == 99).sum(), loss_tokens.sum()) == (101, 1, 109)
    assert {int((lengths == length).sum()) for length in (1, 2, 3)} == {33, 34}
    assert len(data.epoch(seed=0, share=0.5)[0]) == 51


def test_malformed_row_is_named(tmp_path: Path) -> None:
    words = write_tiny_run(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as stream:
        stream.write('{"messages": 3}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:61"):
        read_lengths(load_config(words), 1000, print)
    found = read_lengths(load_config([*words, "--data.malformed=skip"]), 1000, print)
    assert (len(found.lengths), found.excluded) == (60, {"malformed": 1})
