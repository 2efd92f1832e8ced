"""Measured epochs beside predicted ones, by hand; and that what compare_methods writes is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.experiments.compare import Outcome, parse_runs
from hbp_titan.experiments.paper.epoch_check import fitted, load_outcomes, profiled, table
from hbp_titan.packing import Level
from hbp_titan.tuning.profile_file import Profile
from hbp_titan.tuning.search import Candidate

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


def test_an_epoch_is_its_slowest_ranks_and_its_steps(tmp_path: Path) -> None:
    path = _write(tmp_path, {"isf": [14.0, 12.0, 13.0], "hbp": [12.5]})
    isf, hbp = profiled(load_outcomes(path), PROFILE)
    # Slowest ranks: 16 and 64 squared tokens; two steps of half a second.
    assert isf.predicted == pytest.approx((2 + 1.6) + (2 + 6.4) + 1)
    assert hbp.predicted == pytest.approx((1 + 1.6) + (2 + 6.4) + 1)
    assert isf.measured == 13.0
    assert isf.residual == pytest.approx(0.0)
    text = table([isf, hbp])
    assert "| isf@8:1 | 13.0 (14.0 12.0 13.0) | 13.0 | +0.0% | foretold |" in text
    assert "| hbp@4:1,8:1 | 12.5 (12.5) | 12.0 | -4.0% | foretold |" in text
    # A round of isf was faster than hbp's only one: they have no order.
    assert text.endswith(
        "worst residual 4.0%, within 10%; 0 of 0 pairs of runs whose rounds do not overlap are foretold in their order"
    )


def test_a_poor_prediction_and_a_wrong_order_are_said(tmp_path: Path) -> None:
    text = table(profiled(load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]})), PROFILE))
    assert "worst residual 30.0%, BEYOND 10%; 0 of 1 pairs" in text


def test_a_level_without_a_time_and_a_wrong_file_are_named(tmp_path: Path) -> None:
    outcomes = load_outcomes(_write(tmp_path, {"isf": [10.0], "hbp": [12.0]}))
    outcomes[0]["levels"] = [Level(16)]
    with pytest.raises(ValueError, match=r"isf@8:1: the profile has no time of Level\(max_tokens=16"):
        profiled(outcomes, PROFILE)
    for text in ("{}x", '[{"levels": 3}]', "[1]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong.json: not the outcomes of scripts/compare_methods.py --json"):
            load_outcomes(tmp_path / "wrong.json")


def test_runs_that_were_not_fitted_are_foretold_from_those_that_were(tmp_path: Path) -> None:
    # A made-up machine: 0.1 s an iteration, 0.01 a token, 0.002 a trained one, 0.001 a squared one, all / cp, and
    # 0.003 a token of a shard for exchange.
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
    seen = [outcomes[0]["run"], outcomes[1]["run"]]
    checks = fitted(outcomes, seen)
    assert [check.fitted for check in checks] == [True, True, False]
    assert checks[2].residual == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="'isf@9:1'"):
        fitted(outcomes, ["isf@9:1"])
