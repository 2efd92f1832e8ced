"""Measured epochs beside predicted ones, by hand; and that what compare_methods writes is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.compare import Outcome, parse_runs
from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.level_time import LevelTime
from hbp_titan.packing import Level
from hbp_titan.selection.profile_file import Profile
from hbp_titan.simulation.epoch_check import check_epochs, load_outcomes, table

RUNS = parse_runs("isf@8:1;hbp@4:1,8:1")
# Two ranks; two iterations: at the first level, rank 1 has more to do, at the second rank 0.
LOADS = np.array([[[1, 3, 10, 1], [1, 3, 16, 1]], [[1, 7, 64, 1], [1, 7, 32, 2]]], float)
PROFILE = Profile(
    key={},
    memory_limit=0,
    resident_bytes=0,
    step_seconds=0.5,
    measurements=[],
    candidates=[
        Candidate(Level(4), LevelTime(base=1.0, per_square=0.1)),
        Candidate(Level(8), LevelTime(base=2.0, per_square=0.1)),
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


def test_an_epoch_is_its_slowest_ranks_and_its_steps(tmp_path: Path) -> None:
    path = _write(tmp_path, {"isf": [14.0, 12.0, 13.0], "hbp": [12.5]})
    isf, hbp = check_epochs(load_outcomes(path), PROFILE)
    # Slowest ranks: 16 and 64 squared tokens; two steps of half a second.
    assert isf.predicted == pytest.approx((2 + 1.6) + (2 + 6.4) + 1)
    assert hbp.predicted == pytest.approx((1 + 1.6) + (2 + 6.4) + 1)
    assert isf.measured == 13.0
    assert isf.residual == pytest.approx(0.0)
    text = table([isf, hbp])
    assert "| isf@8:1 | 13.0 (14.0 12.0 13.0) | 13.0 | +0.0% | 2 | 2 |" in text
    assert "| hbp@4:1,8:1 | 12.5 (12.5) | 12.0 | -4.0% | 1 | 1 |" in text
    assert text.endswith("worst residual 4.0%, within 10%; the same order")


def test_a_poor_prediction_and_a_wrong_order_are_said(tmp_path: Path) -> None:
    text = table(check_epochs(load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]})), PROFILE))
    assert text.endswith("worst residual 30.0%, BEYOND 10%; ANOTHER ORDER")


def test_a_level_without_a_time_and_a_wrong_file_are_named(tmp_path: Path) -> None:
    outcomes = load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]}))
    outcomes[0]["levels"] = [Level(16)]
    with pytest.raises(ValueError, match=r"isf@8:1: the profile has no time of Level\(max_tokens=16"):
        check_epochs(outcomes, PROFILE)
    for text in ("{}x", '[{"levels": 3}]', "[1]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong.json: not the outcomes of scripts/compare_methods.py --json"):
            load_outcomes(tmp_path / "wrong.json")
