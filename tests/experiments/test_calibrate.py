"""Fits of time models to measured micro-batches, and predicted epochs against measured ones, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.experiments.compare import Outcome, parse_runs
from hbp_titan.experiments.paper.calibrate import (
    Measured,
    MeasuredMicroBatch,
    calibrate,
    check_fit,
    check_profile,
    check_table,
    load_measured,
    load_outcomes,
    relative_fit,
)
from hbp_titan.packing import Level
from hbp_titan.tuning.profile_file import Profile
from hbp_titan.tuning.search import Candidate

TRUE = (LevelTimeModel(0.5, 1e-4, 2e-8, 1e-3), LevelTimeModel(2.0, 0.0, 3e-8, 0.0))


def measured(noise: float = 0.0, rows: int = 12) -> Measured:
    """Micro-batches of two ranks; the slowest one decides."""
    rng = np.random.default_rng(0)
    micro_batches = []
    for number in range(rows):
        loads = np.stack(
            [np.ones(2), rng.integers(100, 9000, 2), rng.integers(10**6, 10**8, 2), rng.integers(1, 90, 2)], axis=1
        ).astype(float)
        seconds = TRUE[number % 2].seconds(loads).max() * (1 + noise * rng.standard_normal())
        micro_batches.append(MeasuredMicroBatch(number % 2, loads, float(seconds)))
    return Measured((Level(1024), Level(8192, 2)), tuple(micro_batches))


def test_fit_finds_the_true_coefficients() -> None:
    result = calibrate(measured(rows=60))
    for found, true in zip(result.times, TRUE, strict=True):
        np.testing.assert_allclose(
            [found.base, found.per_loss_token, found.per_square, found.per_document],
            [true.base, true.per_loss_token, true.per_square, true.per_document],
            rtol=1e-6,
            atol=1e-12,
        )
    assert np.abs(result.residuals).max() < 1e-9
    # 30 rows per level: every second one is held out; of few rows none.
    assert result.held_out.sum() == 30
    assert "good enough" in result.verdict()
    assert "none was held out" in calibrate(measured(rows=12)).verdict()
    poor = calibrate(measured(noise=0.5, rows=60))
    assert "POOR FIT" in poor.verdict()
    assert f"{np.abs(poor.residuals).max():.1%}" in poor.verdict()


def test_coefficients_are_not_negative() -> None:
    # y = 3 - x: the best non-negative fit in relative error is a constant, sum(1/y) / sum(1/y^2).
    x, y = np.array([0.0, 1.0, 2.0]), np.array([3.0, 2.0, 1.0])
    fitted = relative_fit(np.stack([np.ones(3), x], axis=1), y)
    np.testing.assert_allclose(fitted, [(1 / y).sum() / (1 / y**2).sum(), 0.0])


def test_measured_file_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    values = {
        "levels": [{"max_tokens": 64, "cp_degree": 2}],
        "iterations": [{"level": 0, "seconds": 0.5, "loads": [[1, 60, 900, 3], [1, 50, 800, 2]]}],
    }
    path.write_text(json.dumps(values))
    read = load_measured(path)
    assert read.levels == (Level(64, 2),)
    assert read.micro_batches[0].loads.shape == (2, 4)
    assert read.step_seconds == 0.0
    # A profile: each pack is a micro-batch, and levels without a time are left out.
    row = {"level": {"max_tokens": 64}, "peak_bytes": 1, "loads": [[1, 60, 900, 3], [1, 50, 800, 2]], "seconds": [2, 3]}
    untimed = {"level": {"max_tokens": 32}, "peak_bytes": 1, "loads": [], "seconds": []}
    path.write_text(json.dumps({"measurements": [untimed, row], "step_seconds": 0.25}))
    read = load_measured(path)
    assert (read.levels, read.step_seconds) == ((Level(64),), 0.25)
    assert [(r.level, r.loads.tolist(), r.seconds) for r in read.micro_batches] == [
        (0, [[1, 60, 900, 3]], 2.0),
        (0, [[1, 50, 800, 2]], 3.0),
    ]
    for iterations, message in (
        ([], "level 0"),
        ([{"level": 1, "seconds": 1, "loads": [[1, 2, 3, 4]]}], r"iterations\[0\]"),
        ([{"level": 0, "loads": [[1, 2, 3]]}], "not measured"),
    ):
        path.write_text(json.dumps({**values, "iterations": iterations}))
        with pytest.raises(ValueError, match=message):
            load_measured(path)


RUNS = parse_runs("isf@8:1;hbp@4:1,8:1")
# Two ranks, two micro-batches: rank 1 is slower in the first, rank 0 in the second.
LOADS = np.array([[[1, 3, 10, 1], [1, 3, 16, 1]], [[1, 7, 64, 1], [1, 7, 32, 2]]], float)
PROFILE = Profile(
    key={},
    memory_limit=0,
    resident_bytes=0,
    step_seconds=0.5,
    measurements=[],
    candidates=[
        Candidate(Level(4), LevelTimeModel(base=1.0, per_square=0.1)),
        Candidate(Level(8), LevelTimeModel(base=2.0, per_square=0.1)),
        Candidate(Level(16), None),
    ],
)


def _write(folder: Path, seconds: dict[str, list[float]]) -> Path:
    levels = {"isf": np.array([0, 0]), "hbp": np.array([0, 1])}
    outcomes = [
        Outcome(run, s, 2, 20, np.ones(2), LOADS, levels[run.method], np.zeros(2), None, 1.0)
        for run in RUNS
        for s in seconds[run.method]
    ]
    (folder / "compared.json").write_text(json.dumps([outcome.as_dict() for outcome in outcomes]))
    return folder / "compared.json"


def test_predicted_epoch_is_its_slowest_ranks_and_steps(tmp_path: Path) -> None:
    path = _write(tmp_path, {"isf": [14.0, 12.0, 13.0], "hbp": [12.5]})
    isf, hbp = check_profile(load_outcomes(path), PROFILE)
    # Slowest ranks: 16 and 64 squared tokens; two steps of half a second.
    assert isf.predicted == pytest.approx((2 + 1.6) + (2 + 6.4) + 1)
    assert hbp.predicted == pytest.approx((1 + 1.6) + (2 + 6.4) + 1)
    assert isf.measured == 13.0
    assert isf.residual == pytest.approx(0.0)
    text = check_table([isf, hbp])
    assert "| isf@8:1 | 13.0 (14.0 12.0 13.0) | 13.0 | +0.0% | predicted |" in text
    assert "| hbp@4:1,8:1 | 12.5 (12.5) | 12.0 | -4.0% | predicted |" in text
    # A round of isf was faster than the only one of hbp: no order.
    assert "largest residual 4.0%, within 10%; 0 of 0 pairs" in text
    poor = check_table(check_profile(load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]})), PROFILE))
    assert "largest residual 30.0%, ABOVE 10%; 0 of 1 pairs" in poor


def test_unknown_level_and_wrong_file_raise(tmp_path: Path) -> None:
    outcomes = load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]}))
    outcomes[0]["levels"] = [Level(16)]
    with pytest.raises(ValueError, match="max_tokens=16"):
        check_profile(outcomes, PROFILE)
    for text in ("{}x", '[{"levels": 3}]', "[1]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json"):
            load_outcomes(tmp_path / "wrong.json")


def test_fit_to_some_runs_predicts_the_others(tmp_path: Path) -> None:
    # An invented machine: 0.1 s per micro-batch, 0.01 per token, 0.002 per trained and 0.001 per squared one, all / cp,
    # and 0.003 per exchanged token of a shard.
    generator = np.random.default_rng(0)

    def outcome(text: str) -> Outcome:
        (run,) = parse_runs(text)
        levels = generator.integers(0, len(run.levels), 12)
        loads = np.ones((12, 2, 4))
        loads[:, :, 1:] = generator.integers(1, 9, (12, 2, 3)) * [2, 10, 1]
        seconds = []
        for k, packs in zip(levels, loads, strict=True):
            level = run.levels[k]
            shard = level.max_tokens / level.cp_degree
            base = 0.1 + 0.01 * shard + (0.003 * shard if level.cp_degree > 1 else 0)
            seconds.append(base + (packs @ [0, 0.002, 0.001, 0]).max() / level.cp_degree)
        total = sum(seconds) + 4 * 0.25
        return Outcome(run, total, 4, 20, np.array(seconds), loads, levels, np.zeros(2), None, 1.0)

    names = ["isf@8:1", "hbp@4:1,8:2", "hbp@2:1,16:2"]
    (tmp_path / "compared.json").write_text(json.dumps([outcome(name).as_dict() for name in names]))
    outcomes = load_outcomes(tmp_path / "compared.json")
    checks = check_fit(outcomes, [outcomes[0]["run"], outcomes[1]["run"]])
    assert [check.fitted for check in checks] == [True, True, False]
    assert checks[2].residual == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="isf@9:1"):
        check_fit(outcomes, ["isf@9:1"])
