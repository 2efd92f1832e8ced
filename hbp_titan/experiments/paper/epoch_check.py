"""Predicted epochs beside measured ones: does what was timed before foretell whole trained epochs?

Owns the comparison and its verdict. The epochs are those of compare_methods. They are foretold either from a profile,
which timed packs of its own, or from the iterations of some of these epochs, for methods and levels that are not among
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hbp_titan.components.timing import LevelTimeModel
from hbp_titan.experiments.paper.calibrate import fit_machine
from hbp_titan.packing.level import Level
from hbp_titan.tuning.profile_file import Profile

LARGEST_RESIDUAL = 0.10


@dataclass(frozen=True)
class EpochCheck:
    """One run: seconds of its epoch as measured in each round and as predicted; whether the prediction saw them."""

    run: str
    rounds: tuple[float, ...]
    predicted: float
    fitted: bool = False

    @property
    def measured(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)

    @property
    def residual(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def load_outcomes(path: Path) -> list[dict[str, Any]]:
    """The outcomes that compare_methods --json wrote; ValueError for anything else."""
    try:
        outcomes = json.loads(path.read_text(encoding="utf-8"))
        for outcome in outcomes:
            outcome["levels"] = [Level(**level) for level in outcome["levels"]]
            outcome["loads"] = np.array(outcome["loads"], float)
            outcome["iteration_seconds"] = np.array(outcome["iteration_seconds"], float)
            outcome["level_of_iteration"] = np.array(outcome["level_of_iteration"], int)
            assert outcome["loads"].ndim == 3
            float(outcome["seconds"]), int(outcome["steps"]), str(outcome["run"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{path}: not the outcomes of scripts/compare_methods.py --json ({error!r})") from None
    return outcomes


def profiled(outcomes: Sequence[dict[str, Any]], profile: Profile) -> list[EpochCheck]:
    """A prediction for each run from a profile's times, in the order in which they first ran.

    Raises ValueError where a run has a level that the profile did not time.
    """
    times = {candidate.level: candidate.time for candidate in profile.candidates if candidate.time is not None}
    for outcome in outcomes:
        unknown = [outcome["levels"][k] for k in _used(outcome) if outcome["levels"][k] not in times]
        if unknown:
            raise ValueError(f"{outcome['run']}: the profile has no time of {unknown[0]}: profile it (--candidates)")
    return _checks(outcomes, times.__getitem__, profile.step_seconds)


def fitted(outcomes: Sequence[dict[str, Any]], runs: Sequence[str]) -> list[EpochCheck]:
    """A prediction for each run from the iterations of `runs` alone (machine_fit.py).

    Raises ValueError for a run that is not among the outcomes.
    """
    names = {outcome["run"] for outcome in outcomes}
    missing = [run for run in runs if run not in names]
    if missing or not runs:
        raise ValueError(f"--fit {';'.join(runs)}: {missing or 'nothing'} is not among {'; '.join(sorted(names))}")
    seen = [outcome for outcome in outcomes if outcome["run"] in runs]
    machine = fit_machine(
        [o["levels"][k] for o in seen for k in o["level_of_iteration"]],
        [loads for o in seen for loads in o["loads"]],
        np.concatenate([o["iteration_seconds"] for o in seen]),
    )
    step_seconds = median((o["seconds"] - float(o["iteration_seconds"].sum())) / o["steps"] for o in seen)
    return _checks(outcomes, machine.level_time, step_seconds, runs)


def _checks(
    outcomes: Sequence[dict[str, Any]],
    time_of: Callable[[Level], LevelTimeModel],
    step_seconds: float,
    seen: Sequence[str] = (),
) -> list[EpochCheck]:
    checks = []
    for run in dict.fromkeys(outcome["run"] for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome["run"] == run]
        seconds = predicted_seconds(own[0], time_of, step_seconds)
        checks.append(EpochCheck(run, tuple(o["seconds"] for o in own), seconds, run in seen))
    return checks


def predicted_seconds(
    outcome: dict[str, Any], time_of: Callable[[Level], LevelTimeModel], step_seconds: float
) -> float:
    """Seconds of an epoch: each iteration takes as long as its slowest rank, each optimizer step comes on top."""
    total = outcome["steps"] * step_seconds
    for k in _used(outcome):
        loads_IRF = outcome["loads"][outcome["level_of_iteration"] == k]
        seconds = time_of(outcome["levels"][k]).seconds(loads_IRF.reshape(-1, loads_IRF.shape[-1]))
        total += float(seconds.reshape(loads_IRF.shape[:2]).max(axis=1).sum())
    return total


def _used(outcome: dict[str, Any]) -> list[int]:
    """Indices of the levels that have iterations."""
    return np.unique(outcome["level_of_iteration"]).tolist()


def table(checks: Sequence[EpochCheck]) -> str:
    """A Markdown row a run, and the verdict: the worst residual of what was not fitted, and how many pairs of runs,
    of those whose rounds do not overlap, are foretold in their order."""
    lines = ["| run | measured, s (rounds) | predicted, s | residual | |", "|---|---|---|---|---|"]
    for check in checks:
        rounds = " ".join(f"{seconds:.1f}" for seconds in check.rounds)
        lines.append(
            f"| {check.run} | {check.measured:.1f} ({rounds}) | {check.predicted:.1f} | {check.residual:+.1%} | "
            f"{'fitted' if check.fitted else 'foretold'} |"
        )
    worst = max((abs(check.residual) for check in checks if not check.fitted), default=0.0)
    judgement = "within" if worst <= LARGEST_RESIDUAL else "BEYOND"
    pairs = [(a, b) for a in checks for b in checks if max(a.rounds) < min(b.rounds)]
    right = sum(a.predicted < b.predicted for a, b in pairs)
    order = f"{right} of {len(pairs)} pairs of runs whose rounds do not overlap are foretold in their order"
    return "\n".join([*lines, f"\nworst residual {worst:.1%}, {judgement} {LARGEST_RESIDUAL:.0%}; {order}"])
