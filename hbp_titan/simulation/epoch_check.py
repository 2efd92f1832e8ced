"""Predicted epochs beside measured ones: does a profile, which timed packs of its own, foretell whole trained epochs?

Owns the comparison and its verdict. The epochs are those of compare_methods, which trained other packs, by other
methods, on other sets of levels than any that the profile ran.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hbp_titan.levels.level_time import LevelTime
from hbp_titan.packing.level import Level, level_from_dict
from hbp_titan.selection.profile_file import Profile

LARGEST_RESIDUAL = 0.10


@dataclass(frozen=True)
class EpochCheck:
    """One run: measured seconds of its epoch (the median of its rounds, and each) and the predicted ones."""

    run: str
    rounds: tuple[float, ...]
    predicted: float

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
            outcome["levels"] = [level_from_dict(level) for level in outcome["levels"]]
            outcome["loads"] = np.array(outcome["loads"], float)
            outcome["level_of_iteration"] = np.array(outcome["level_of_iteration"], int)
            assert outcome["loads"].ndim == 3
            float(outcome["seconds"]), int(outcome["steps"]), str(outcome["run"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"{path}: not the outcomes of scripts/compare_methods.py --json ({error!r})") from None
    return outcomes


def check_epochs(outcomes: Sequence[dict[str, Any]], profile: Profile) -> list[EpochCheck]:
    """A prediction for each run, in the order in which they first ran.

    Raises ValueError where a run has a level that the profile did not time.
    """
    times = {candidate.level: candidate.time for candidate in profile.candidates if candidate.time is not None}
    checks = []
    for run in dict.fromkeys(outcome["run"] for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome["run"] == run]
        unknown = [level for level in _used(own[0]) if level not in times]
        if unknown:
            raise ValueError(f"{run}: the profile has no time of {unknown[0]}: profile it (--candidates)")
        checks.append(EpochCheck(run, tuple(o["seconds"] for o in own), predicted_seconds(own[0], times, profile)))
    return checks


def predicted_seconds(outcome: dict[str, Any], times: dict[Level, LevelTime], profile: Profile) -> float:
    """Seconds of an epoch: each iteration takes as long as its slowest rank, each optimizer step comes on top."""
    total = outcome["steps"] * profile.step_seconds
    for k in np.unique(outcome["level_of_iteration"]).tolist():
        loads_IRF = outcome["loads"][outcome["level_of_iteration"] == k]
        seconds = times[outcome["levels"][k]].seconds(loads_IRF.reshape(-1, loads_IRF.shape[-1]))
        total += float(seconds.reshape(loads_IRF.shape[:2]).max(axis=1).sum())
    return total


def _used(outcome: dict[str, Any]) -> list[Level]:
    return [outcome["levels"][k] for k in np.unique(outcome["level_of_iteration"]).tolist()]


def table(checks: Sequence[EpochCheck]) -> str:
    """A Markdown row a run, and the verdict: the worst residual, and whether the order is foretold."""
    lines = [
        "| run | measured, s (rounds) | predicted, s | residual | order: measured | predicted |",
        "|---|---|---|---|---|---|",
    ]
    measured, predicted = _places([c.measured for c in checks]), _places([c.predicted for c in checks])
    for check, real, foretold in zip(checks, measured, predicted, strict=True):
        rounds = " ".join(f"{seconds:.1f}" for seconds in check.rounds)
        lines.append(
            f"| {check.run} | {check.measured:.1f} ({rounds}) | {check.predicted:.1f} | {check.residual:+.1%} | "
            f"{real} | {foretold} |"
        )
    worst = max(abs(check.residual) for check in checks)
    judgement = "within" if worst <= LARGEST_RESIDUAL else "BEYOND"
    order = "the same order" if measured == predicted else "ANOTHER ORDER"
    lines.append(f"\nworst residual {worst:.1%}, {judgement} {LARGEST_RESIDUAL:.0%}; {order}")
    return "\n".join(lines)


def _places(values: Sequence[float]) -> list[int]:
    """Place of each value, 1 for the least."""
    return (np.argsort(np.argsort(values)) + 1).tolist()
