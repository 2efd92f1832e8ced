"""Repeats, weights, shares and duplicates: counts that a reader can check, and brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.build_set import draw, epoch_counts, first_of_each, share_out


@pytest.mark.parametrize(
    ("counts", "repeats", "weights", "expected"),
    [
        ([100, 10], [1, 1], [0, 0], [100, 10]),
        ([100, 10], [1, 3], [0, 0], [100, 30]),
        ([100, 10], [0.25, 1.5], [0, 0], [25, 15]),
        # 10 samples of the second are a half: the first gives as many.
        ([100, 10], [1, 1], [1, 1], [10, 10]),
        # May be trained four times: 40 are a half.
        ([100, 10], [1, 4], [0.5, 0.5], [40, 40]),
        ([100, 10], [1, 1], [9, 1], [90, 10]),
        # 100 are a twentieth of 2000, the second has only 10.
        ([100, 10], [1, 1], [1, 19], [1, 10]),
        # A source without weight comes on top.
        ([100, 10, 7], [1, 1, 1], [1, 1, 0], [10, 10, 7]),
        ([0, 10], [1, 1], [1, 1], [0, 0]),
    ],
)
def test_an_epoch_takes_of_each_source_what_repeats_and_weights_say(
    counts: list[int], repeats: list[float], weights: list[float], expected: list[int]
) -> None:
    assert epoch_counts(counts, repeats, weights) == expected


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.1, 4), st.floats(0.01, 10)), min_size=1, max_size=6))
def test_weights_are_kept_and_one_source_is_used_up(sources: list[tuple[int, float, float]]) -> None:
    counts, repeats, weights = ([source[k] for source in sources] for k in range(3))
    taken = epoch_counts(counts, repeats, weights)
    assert all(got <= count * repeat + 0.5 for got, count, repeat in zip(taken, counts, repeats, strict=True))
    assert any(abs(got - count * repeat) <= 0.5 for got, count, repeat in zip(taken, counts, repeats, strict=True))
    per_weight = max(weights)
    exact = min(count * repeat / weight for count, repeat, weight in sources)
    assert all(abs(got - exact * weight) <= 0.5 + 1e-9 * per_weight for got, weight in zip(taken, weights, strict=True))


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 3))
def test_each_sample_is_drawn_as_often_as_any_other_but_for_one(count: int, drawn: int, seed: int) -> None:
    samples = np.arange(100, 100 + count)
    taken = Counter(draw(samples, drawn, (seed,)).tolist())
    assert taken.total() == drawn
    times = [taken[sample] for sample in samples.tolist()]
    assert max(times) - min(times) <= 1
    assert sum(times) == drawn


def test_other_seeds_draw_other_samples_and_the_same_seed_the_same() -> None:
    samples = np.arange(1000)
    first, again, other = (draw(samples, 100, seed).tolist() for seed in ((0, 0), (0, 0), (0, 1)))
    assert first == again != other
    assert first == sorted(first)


@given(st.integers(0, 300), st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_a_share_of_all_sources_is_in_proportion(total: int, counts: list[int]) -> None:
    shares = share_out(total, counts)
    assert sum(shares) == min(total, sum(counts))
    assert all(share <= count for share, count in zip(shares, counts, strict=True))
    if sum(counts) > total:
        assert all(abs(s - total * c / sum(counts)) < 1 for s, c in zip(shares, counts, strict=True))


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=1, max_size=4))
def test_only_the_first_of_equal_samples_is_kept(sources: list[list[int]]) -> None:
    digests = [np.array([bytes([value] * 15) + b"\0" for value in source], dtype="V16") for source in sources]
    kept = first_of_each(digests)
    seen: set[int] = set()
    for source, flags in zip(sources, kept, strict=True):
        assert len(source) == len(flags)
        for value, flag in zip(source, flags.tolist(), strict=True):
            assert flag == (value not in seen)
            seen.add(value)
