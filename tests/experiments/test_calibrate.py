"""The fit finds the coefficients that made the measurements, reports every row, and calls a poor fit poor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.experiments.paper.calibrate import Measured, MeasuredIteration, calibrate, load_measured, relative_fit
from hbp_titan.packing import Level

TRUE = (LevelTimeModel(0.5, 1e-4, 2e-8, 1e-3), LevelTimeModel(2.0, 0.0, 3e-8, 0.0))


def measured(noise: float = 0.0, rows: int = 12) -> Measured:
    """Iterations of two ranks, the slowest of which decides."""
    rng = np.random.default_rng(0)
    iterations = []
    for number in range(rows):
        loads = np.stack(
            [np.ones(2), rng.integers(100, 9000, 2), rng.integers(10**6, 10**8, 2), rng.integers(1, 90, 2)], axis=1
        ).astype(float)
        seconds = TRUE[number % 2].seconds(loads).max() * (1 + noise * rng.standard_normal())
        iterations.append(MeasuredIteration(number % 2, loads, float(seconds)))
    return Measured((Level(1024), Level(8192, 2)), tuple(iterations))


def test_the_coefficients_that_made_the_seconds_are_found() -> None:
    result = calibrate(measured(rows=60))
    for found, true in zip(result.times, TRUE, strict=True):
        np.testing.assert_allclose(
            [found.base, found.per_loss_token, found.per_square, found.per_document],
            [true.base, true.per_loss_token, true.per_square, true.per_document],
            rtol=1e-6,
            atol=1e-12,
        )
    assert np.abs(result.residuals).max() < 1e-9
    # 30 rows a level: every second one was predicted, not fitted.
    assert result.held_out.sum() == 30
    assert "good enough" in result.verdict()


def test_with_few_rows_none_is_held_out_and_the_verdict_says_so() -> None:
    assert "none was held out" in calibrate(measured(rows=12)).verdict()


def test_a_poor_fit_is_called_one() -> None:
    result = calibrate(measured(noise=0.5, rows=60))
    assert np.abs(result.residuals).max() > 0.1
    assert "POOR FIT" in result.verdict()
    assert f"{np.abs(result.residuals).max():.1%}" in result.verdict()


def test_a_coefficient_below_zero_is_left_out() -> None:
    # y = 3 - x: the best non-negative fit in relative error is a constant, sum(1/y) / sum(1/y^2).
    x, y = np.array([0.0, 1.0, 2.0]), np.array([3.0, 2.0, 1.0])
    fitted = relative_fit(np.stack([np.ones(3), x], axis=1), y)
    np.testing.assert_allclose(fitted, [(1 / y).sum() / (1 / y**2).sum(), 0.0])


def test_the_file_form_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    values = {
        "levels": [{"max_tokens": 64, "cp_degree": 2}],
        "iterations": [{"level": 0, "seconds": 0.5, "loads": [[1, 60, 900, 3], [1, 50, 800, 2]]}],
    }
    path.write_text(json.dumps(values))
    read = load_measured(path)
    assert read.levels == (Level(64, 2),)
    assert read.iterations[0].loads.shape == (2, 4)
    assert read.step_seconds == 0.0
    path.write_text(json.dumps({**values, "iterations": []}))
    with pytest.raises(ValueError, match="no iteration of level 0"):
        load_measured(path)
    path.write_text(json.dumps({**values, "iterations": [{"level": 1, "seconds": 1, "loads": [[1, 2, 3, 4]]}]}))
    with pytest.raises(ValueError, match=r"iterations\[0\] has level 1"):
        load_measured(path)
    path.write_text(json.dumps({**values, "iterations": [{"level": 0, "loads": [[1, 2, 3]]}]}))
    with pytest.raises(ValueError, match=r"m\.json: not measured iterations"):
        load_measured(path)


def test_the_file_of_a_profile_is_read_as_one_pack_an_iteration(tmp_path: Path) -> None:
    row = {"level": {"max_tokens": 64}, "peak_bytes": 1, "loads": [[1, 60, 900, 3], [1, 50, 800, 2]], "seconds": [2, 3]}
    untimed = {"level": {"max_tokens": 32}, "peak_bytes": 1, "loads": [], "seconds": []}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"measurements": [untimed, row], "step_seconds": 0.25}))
    read = load_measured(path)
    assert read.levels == (Level(64),)
    assert [(r.level, r.loads.tolist(), r.seconds) for r in read.iterations] == [
        (0, [[1, 60, 900, 3]], 2.0),
        (0, [[1, 50, 800, 2]], 3.0),
    ]
    assert read.step_seconds == 0.25
