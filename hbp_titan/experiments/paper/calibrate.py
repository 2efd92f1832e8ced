"""Time models fitted to measured micro-batches, and a check of predicted epochs against measured ones.

Owns two fits and their reports: `calibrate` fits each measured level by itself and holds out every second micro-batch;
`fit_machine` fits one machine's coefficients for all levels, so it predicts levels that never ran. There a rank's share
of a pack costs by its tokens (including padding), trained tokens, squared document lengths and documents, each divided
by the cp degree; a micro-batch has a constant cost; and cp ranks exchange by the tokens of a shard. These coefficients
do not depend on cp style and recomputation: fit and predict levels that share those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hbp_titan.components.timing import FloatArray, LevelTimeModel
from hbp_titan.packing.level import Level
from hbp_titan.tuning.profile_file import Profile, nonnegative_least_squares

MAX_RESIDUAL = 0.10
"""A model that misses by more is too inaccurate to plan with."""
HOLD_OUT_FROM = 8
"""Levels with at least this many measured micro-batches hold out every second one."""
MAX_REFITS = 20


@dataclass(frozen=True)
class MeasuredMicroBatch:
    """level: index. loads: of the packs that ran in parallel, one row per dp rank, [dp, 4] as from pack_loads."""

    level: int
    loads: FloatArray
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Measured micro-batches and their levels. step_seconds: time of an optimizer step outside its micro-batches."""

    levels: tuple[Level, ...]
    micro_batches: tuple[MeasuredMicroBatch, ...]
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """times: one per level. measured, predicted: seconds of each micro-batch. held_out: bool, not used in the fit."""

    times: tuple[LevelTimeModel, ...]
    measured: FloatArray
    predicted: FloatArray
    held_out: np.ndarray

    @property
    def residuals(self) -> FloatArray:
        """Return (predicted - measured) / measured, [n]."""
        return self.predicted / self.measured - 1

    def verdict(self) -> str:
        """Return one line: the largest residual, and whether the model is good enough to plan with."""
        worst = float(np.abs(self.residuals).max())
        unseen = self.residuals[self.held_out]
        of_unseen = f"; of {len(unseen)} held out {np.abs(unseen).max():.1%}" if len(unseen) else "; none was held out"
        judgement = "good enough to plan with" if worst <= MAX_RESIDUAL else "POOR FIT: do not plan with it"
        return f"largest residual {worst:.1%}{of_unseen}; the limit is {MAX_RESIDUAL:.0%}: {judgement}"


def load_measured(path: Path) -> Measured:
    """Read measured micro-batches, or a profile (tuning/profile_file.py), whose packs ran one at a time.

    Format: {"levels": [{"max_tokens", "cp_degree", ...}], "step_seconds": s (optional), "iterations": [{"level": k,
    "loads": [[1, trained tokens, squared tokens, documents], one row per dp rank], "seconds": s}]}.
    Raises ValueError, with the file's name, for anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "measurements" in values:
            values = _from_profile(values)
        levels = tuple(Level(**level) for level in values["levels"])
        rows = []
        for row in values["iterations"]:
            loads = np.array(row["loads"], float).reshape(-1, 4)
            rows.append(MeasuredMicroBatch(int(row["level"]), loads, float(row["seconds"])))
        measured = Measured(levels, tuple(rows), float(values.get("step_seconds", 0.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not measured micro-batches ({error!r}); see --help for the format") from None
    for number, row in enumerate(measured.micro_batches):
        if not 0 <= row.level < len(levels) or row.seconds <= 0 or not len(row.loads):
            raise ValueError(f"{path}: iterations[{number}] has level {row.level} and {row.seconds} seconds")
    missing = set(range(len(levels))) - {row.level for row in measured.micro_batches}
    if missing or not levels:
        raise ValueError(f"{path}: no micro-batch of level {min(missing, default=0)} was measured")
    return measured


def _from_profile(values: dict[str, Any]) -> dict[str, Any]:
    """Return a profile's measurements in the format of load_measured: each its own level, each pack a micro-batch."""
    timed = [row for row in values["measurements"] if row["seconds"]]
    micro_batches = [
        {"level": k, "loads": [loads], "seconds": seconds}
        for k, row in enumerate(timed)
        for loads, seconds in zip(row["loads"], row["seconds"], strict=True)
    ]
    levels = [row["level"] for row in timed]
    return {"levels": levels, "iterations": micro_batches, "step_seconds": values["step_seconds"]}


def calibrate(measured: Measured) -> Calibration:
    """Fit one LevelTimeModel per level."""
    held_out = np.zeros(len(measured.micro_batches), bool)
    predicted = np.zeros(len(measured.micro_batches))
    times = []
    for level in range(len(measured.levels)):
        own = [n for n, row in enumerate(measured.micro_batches) if row.level == level]
        # Every second one, not the last half: the machine may drift during the measurement.
        fitted = own if len(own) < HOLD_OUT_FROM else own[::2]
        held_out[[n for n in own if n not in set(fitted)]] = True
        rows = [measured.micro_batches[n] for n in fitted]
        seconds = np.array([row.seconds for row in rows])
        # By squared tokens, which dominate long packs; the fit corrects the guess.
        slowest = [int(np.argmax(row.loads[:, 2])) for row in rows]
        times.append(LevelTimeModel(*fit_slowest([row.loads for row in rows], seconds, slowest)))
        for n in own:
            predicted[n] = times[-1].seconds(measured.micro_batches[n].loads).max()
    return Calibration(tuple(times), np.array([row.seconds for row in measured.micro_batches]), predicted, held_out)


def fit_slowest(columns: Sequence[FloatArray], seconds: FloatArray, slowest: list[int]) -> list[float]:
    """Fit coefficients, none below 0, to the seconds of micro-batches by least squares of the relative error.

    columns: of the ranks of each micro-batch, [n][ranks, k]. slowest: first guess of the slowest rank of each.
    """
    # The slowest rank decides a micro-batch, and which one it is depends on the coefficients: fit and choose in turn.
    for _ in range(MAX_REFITS):
        rows = np.stack([ranks[s] for ranks, s in zip(columns, slowest, strict=True)])
        coefficients = relative_fit(rows, seconds)
        chosen = [int((ranks @ coefficients).argmax()) for ranks in columns]
        if chosen == slowest:
            break
        slowest = chosen
    return coefficients.tolist()


def relative_fit(columns: FloatArray, target: FloatArray) -> FloatArray:
    """Return x >= 0 [k] of the least squared relative error of columns [n, k] @ x to target [n], which is positive."""
    return nonnegative_least_squares(columns / target[:, None], np.ones(len(target)))


@dataclass(frozen=True)
class MachineTimes:
    """Seconds per micro-batch (constant), per token, trained token, squared token and document of a rank's share, and
    per token of a shard that is exchanged (where cp_degree > 1)."""

    constant: float
    per_token: float
    per_loss_token: float
    per_square: float
    per_document: float
    exchange: float

    def level_time(self, level: Level) -> LevelTimeModel:
        """Return the time model of a micro-batch of `level`."""
        cp_degree = level.cp_degree
        per_token = self.per_token + (self.exchange if cp_degree > 1 else 0.0)
        return LevelTimeModel(
            base=self.constant + per_token * level.max_tokens / cp_degree,
            per_loss_token=self.per_loss_token / cp_degree,
            per_square=self.per_square / cp_degree,
            per_document=self.per_document / cp_degree,
        )


def fit_machine(levels: Sequence[Level], loads: Sequence[FloatArray], seconds: FloatArray) -> MachineTimes:
    """Fit the coefficients of one machine.

    levels, seconds: of each micro-batch, [n]. loads: of the packs of each, [ranks, 4] as from pack_loads.
    """
    columns = []
    for level, packs in zip(levels, loads, strict=True):
        ones, tokens = np.ones(len(packs)), level.max_tokens / level.cp_degree
        exchanged = tokens if level.cp_degree > 1 else 0.0
        columns.append(np.column_stack([ones, tokens * ones, packs[:, 1:] / level.cp_degree, exchanged * ones]))
    return MachineTimes(*fit_slowest(columns, seconds, [int(ranks[:, 3].argmax()) for ranks in columns]))


@dataclass(frozen=True)
class EpochCheck:
    """Seconds of one run's epoch as measured in each round and as predicted. fitted: whether the fit used the run."""

    run: str
    rounds: tuple[float, ...]
    predicted: float
    fitted: bool = False

    @property
    def measured(self) -> float:
        """Return the median of the rounds."""
        return median(self.rounds)

    @property
    def residual(self) -> float:
        """Return (predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def load_outcomes(path: Path) -> list[dict[str, Any]]:
    """Read the outcomes that compare_methods --json wrote; ValueError for anything else."""
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
        raise ValueError(f"{path}: not written by scripts/compare_methods.py --json ({error!r})") from None
    return outcomes


def check_profile(outcomes: Sequence[dict[str, Any]], profile: Profile) -> list[EpochCheck]:
    """Predict each run from the times of a profile, in the order in which they first ran.

    Raises ValueError if a run has a level that the profile does not contain.
    """
    times = {candidate.level: candidate.time for candidate in profile.candidates if candidate.time is not None}
    for outcome in outcomes:
        # Levels without a micro-batch need no time.
        unknown = [outcome["levels"][k] for k in _used_levels(outcome) if outcome["levels"][k] not in times]
        if unknown:
            raise ValueError(f"{outcome['run']}: {unknown[0]} is not in the profile; profile it with --candidates")
    return _check(outcomes, times.__getitem__, profile.step_seconds)


def check_fit(outcomes: Sequence[dict[str, Any]], runs: Sequence[str]) -> list[EpochCheck]:
    """Predict each run from a fit to the micro-batches of `runs` alone; ValueError for a run without outcome."""
    names = {outcome["run"] for outcome in outcomes}
    missing = [run for run in runs if run not in names]
    if missing or not runs:
        raise ValueError(f"--fit {';'.join(runs)}: must be some of {'; '.join(sorted(names))}")
    used = [outcome for outcome in outcomes if outcome["run"] in runs]
    machine = fit_machine(
        [o["levels"][k] for o in used for k in o["level_of_iteration"]],
        [loads for o in used for loads in o["loads"]],
        np.concatenate([o["iteration_seconds"] for o in used]),
    )
    # What is left of the epoch: clipping, update, logging.
    step_seconds = median((o["seconds"] - float(o["iteration_seconds"].sum())) / o["steps"] for o in used)
    return _check(outcomes, machine.level_time, step_seconds, runs)


def _check(
    outcomes: Sequence[dict[str, Any]],
    time_of: Callable[[Level], LevelTimeModel],
    step_seconds: float,
    fitted: Sequence[str] = (),
) -> list[EpochCheck]:
    checks = []
    for run in dict.fromkeys(outcome["run"] for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome["run"] == run]
        seconds = predicted_seconds(own[0], time_of, step_seconds)
        checks.append(EpochCheck(run, tuple(o["seconds"] for o in own), seconds, run in fitted))
    return checks


def predicted_seconds(
    outcome: dict[str, Any], time_of: Callable[[Level], LevelTimeModel], step_seconds: float
) -> float:
    """Return the seconds of an epoch: the slowest rank of each micro-batch, plus `step_seconds` per optimizer step."""
    total = outcome["steps"] * step_seconds
    for k in _used_levels(outcome):
        loads_IRF = outcome["loads"][outcome["level_of_iteration"] == k]
        seconds = time_of(outcome["levels"][k]).seconds(loads_IRF.reshape(-1, loads_IRF.shape[-1]))
        total += float(seconds.reshape(loads_IRF.shape[:2]).max(axis=1).sum())
    return total


def _used_levels(outcome: dict[str, Any]) -> list[int]:
    return np.unique(outcome["level_of_iteration"]).tolist()


def check_table(checks: Sequence[EpochCheck]) -> str:
    """Return one Markdown row per run, and a verdict.

    The verdict has the largest residual of the runs that were not fitted, and how many pairs of runs are predicted in
    their order, of those whose rounds do not overlap.
    """
    lines = ["| run | measured, s (rounds) | predicted, s | residual | |", "|---|---|---|---|---|"]
    for check in checks:
        rounds = " ".join(f"{seconds:.1f}" for seconds in check.rounds)
        lines.append(
            f"| {check.run} | {check.measured:.1f} ({rounds}) | {check.predicted:.1f} | {check.residual:+.1%} | "
            f"{'fitted' if check.fitted else 'predicted'} |"
        )
    worst = max((abs(check.residual) for check in checks if not check.fitted), default=0.0)
    judgement = "within" if worst <= MAX_RESIDUAL else "ABOVE"
    # Runs whose rounds overlap have no measured order.
    pairs = [(a, b) for a in checks for b in checks if max(a.rounds) < min(b.rounds)]
    right = sum(a.predicted < b.predicted for a, b in pairs)
    order = f"{right} of {len(pairs)} pairs of runs whose rounds do not overlap are predicted in their order"
    return "\n".join([*lines, f"\nlargest residual {worst:.1%}, {judgement} {MAX_RESIDUAL:.0%}; {order}"])
