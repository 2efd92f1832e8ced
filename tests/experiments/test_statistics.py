"""Mean, spread and Student's t against tables of it."""

from __future__ import annotations

import math

import pytest

from hbp_titan.experiments.study.quality import mean_and_deviation, paired_difference, t_probability, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "t"),
    # From the printed table of Student's t.
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.995, 3, 5.841), (0.975, 30, 2.042), (0.9, 9, 1.383)],
)
def test_quantiles_are_those_of_the_table(probability: float, degrees: int, t: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(t, abs=5e-4)
    assert t_probability(t, degrees) == pytest.approx(2 * probability - 1, abs=1e-4)


def test_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert math.isnan(mean_and_deviation([1.0])[1])


def test_a_paired_difference_is_free_of_what_seeds_share() -> None:
    # Differences 1, 2 and 3: mean 2, standard error 1 / sqrt(3), t of two degrees 4.303.
    difference = paired_difference([11.0, 102.0, 1003.0], [10.0, 100.0, 1000.0])
    assert difference.mean == pytest.approx(2)
    assert difference.low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    assert difference.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    # t = 2 * sqrt(3) = 3.4641 with two degrees: p = 1 - t / sqrt(2 + t^2) = 0.0742.
    assert difference.p == pytest.approx(1 - 3.4641 / math.sqrt(14), abs=1e-4)


def test_equal_runs_do_not_differ() -> None:
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p == 0
