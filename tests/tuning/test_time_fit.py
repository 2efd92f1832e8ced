"""The fit of a level's time: optimal among nonnegative coefficients, and sober where columns say the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.tuning.profile_file import fit_level_time, nonnegative_least_squares
from tests.properties import examples


@examples(200)
@given(st.integers(0, 10**6), st.integers(4, 9))
def test_the_solution_meets_the_conditions_that_only_the_optimum_meets(seed: int, rows: int) -> None:
    # Karush-Kuhn-Tucker: the problem is convex, so they suffice.
    generator = np.random.default_rng(seed)
    columns, values = generator.normal(size=(rows, 4)), generator.normal(size=rows)
    x = nonnegative_least_squares(columns, values)
    gradient = columns.T @ (columns @ x - values)
    assert (x >= 0).all()
    assert (gradient >= -1e-9).all()
    np.testing.assert_allclose(gradient[x > 0], 0, atol=1e-9)


def test_nothing_is_below_every_column_that_only_hurts() -> None:
    assert nonnegative_least_squares(np.array([[1.0], [1.0]]), np.array([-1.0, -2.0])).tolist() == [0.0]


def test_the_coefficients_of_a_made_up_level_are_recovered() -> None:
    # 1, trained tokens, squared tokens, documents
    loads = np.array(
        [[1, 100, 5000, 7], [1, 900, 90000, 3], [1, 400, 640000, 1], [1, 800, 20000, 60], [1, 50, 9000, 2]]
    )
    truth = LevelTimeModel(base=0.2, per_loss_token=1e-4, per_square=2e-7, per_document=3e-3)
    found, error = fit_level_time(loads, truth.seconds(loads))
    np.testing.assert_allclose(
        [found.base, found.per_loss_token, found.per_square, found.per_document], [0.2, 1e-4, 2e-7, 3e-3], rtol=1e-6
    )
    assert error < 1e-9


def test_packs_that_hold_the_same_leave_the_base_alone() -> None:
    found, error = fit_level_time(np.tile([1.0, 500, 10000, 4], (4, 1)), np.array([0.9, 1.1, 0.9, 1.1]))
    assert found == LevelTimeModel(base=pytest.approx(1.0))
    assert error == pytest.approx(0.1)


def test_collinear_columns_share_no_wild_values() -> None:
    # Trained tokens and documents rise together.
    loads = np.array([[1, 10 * k, 100, k] for k in (1.0, 2, 3, 4, 5)])
    found, _ = fit_level_time(loads, np.array([1.1, 1.2, 1.3, 1.4, 1.5]))
    assert found.base == pytest.approx(1.0)
    assert found.seconds(loads) == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])
    assert min(found.per_loss_token, found.per_document) == 0.0


def test_an_iteration_never_gets_faster_by_holding_more() -> None:
    loads = np.array([[1, 10, 100, 1], [1, 20, 100, 1], [1, 30, 100, 1.0]])
    found, _ = fit_level_time(loads, np.array([3.0, 2.0, 1.0]))
    assert found == LevelTimeModel(base=pytest.approx(2.0))
