"""Time imbalance, idle share and the shares of levels, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hbp_titan.components.step_stats import StepTimes


def test_waiting_is_what_the_mean_rank_has_less_to_do_than_the_slowest() -> None:
    # Two ranks: 1 s and 3 s of work in an iteration of 3 s, then 2 s and 2 s in one of 4 s (half of it communication).
    times = StepTimes(wall=[3.0, 4.0], work=[2.0, 2.0], slowest=[3.0, 2.0], data_wait=1.0, whole=10.0)
    assert times.waiting.tolist() == pytest.approx([1.0, 0.0])
    assert times.imbalance == pytest.approx(1 - 4 / 5)
    assert times.idle_share == pytest.approx((1 + 1) / 10)
    # Iterations take 3/7 and 4/7 of the step, and of the wait for data.
    assert times.shares(np.array([True, False])) == pytest.approx((10 * 3 / 7, 1 + 3 / 7))
    assert times.shares(np.array([False, True])) == pytest.approx((10 * 4 / 7, 4 / 7))


def test_nothing_measured_is_said_and_time_is_shared_by_number() -> None:
    times = StepTimes([], [], [], data_wait=1.0, whole=9.0)
    assert (times.imbalance, times.idle_share) == (None, None)
    assert times.shares(np.array([True, False, False])) == (3.0, 0.0)
