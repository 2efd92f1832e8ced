"""Coefficients of a level's time from measured iterations, with every residual.

Owns the fit and its honest report: a row that was held out is predicted by coefficients that never saw it, and a poor
fit is called one.

One machine's coefficients for all levels, fitted to measured iterations of a few: times of levels that never ran.

Owns the form across levels: a rank's share of a pack costs by its tokens (padding with them), its trained tokens, its
squared document lengths and its documents, each divided by the cp degree; an iteration costs a constant; and what cp
ranks exchange costs by the tokens of a shard. So the coefficients say nothing of styles or recomputation: fit and
predict levels that share those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.components.timing import FloatArray, LevelTimeModel
from hbp_titan.packing.level import Level
from hbp_titan.tuning.profile_file import nonnegative_least_squares

# A prediction that misses by more is not one to plan with.
LARGEST_RESIDUAL = 0.10
# From so many iterations of a level on, every second one is held out.
HOLD_OUT_FROM = 8


@dataclass(frozen=True)
class MeasuredIteration:
    """level: index. loads: of the packs that ran side by side, one for each dp rank, [dp, 4] as from pack_loads."""

    level: int
    loads: FloatArray
    seconds: float


@dataclass(frozen=True)
class Measured:
    """Measured iterations and the levels that they are of; step_seconds: of an optimizer step beside its iterations."""

    levels: tuple[Level, ...]
    iterations: tuple[MeasuredIteration, ...]
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """times: one a level. predicted: seconds of each measured iteration. held_out: bool, not used in the fit."""

    times: tuple[LevelTimeModel, ...]
    measured: FloatArray
    predicted: FloatArray
    held_out: np.ndarray

    @property
    def residuals(self) -> FloatArray:
        """(predicted - measured) / measured, [n]."""
        return self.predicted / self.measured - 1

    def verdict(self) -> str:
        """One line: the worst residual, and whether it is fit to plan with."""
        worst = float(np.abs(self.residuals).max())
        unseen = self.residuals[self.held_out]
        of_unseen = f"; of {len(unseen)} held out {np.abs(unseen).max():.1%}" if len(unseen) else "; none was held out"
        judgement = "good enough to plan with" if worst <= LARGEST_RESIDUAL else "POOR FIT: do not plan with it"
        return f"worst residual {worst:.1%}{of_unseen}; the limit is {LARGEST_RESIDUAL:.0%}: {judgement}"


def load_measured(path: Path) -> Measured:
    """Read measured iterations, or the file of a profile (selection/profile_file.py), whose packs ran one at a time.

    The form: {"levels": [{"max_tokens", "cp_degree", ...}], "step_seconds": s (optional), "iterations": [{"level": k,
    "loads": [[1, trained tokens, squared tokens, documents], one for each dp rank], "seconds": s}]}.
    Raises ValueError that names the file for anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "measurements" in values:
            values = _of_profile(values)
        levels = tuple(Level(**level) for level in values["levels"])
        rows = []
        for row in values["iterations"]:
            loads = np.array(row["loads"], float).reshape(-1, 4)
            rows.append(MeasuredIteration(int(row["level"]), loads, float(row["seconds"])))
        measured = Measured(levels, tuple(rows), float(values.get("step_seconds", 0.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not measured iterations ({error!r}): see --help for the form") from None
    for number, row in enumerate(measured.iterations):
        if not 0 <= row.level < len(levels) or row.seconds <= 0 or not len(row.loads):
            raise ValueError(f"{path}: iterations[{number}] has level {row.level} and {row.seconds} seconds")
    missing = set(range(len(levels))) - {row.level for row in measured.iterations}
    if missing or not levels:
        raise ValueError(f"{path}: no iteration of level {min(missing, default=0)} was measured")
    return measured


def _of_profile(values: dict[str, Any]) -> dict[str, Any]:
    """A profile's timed measurements in the form of load_measured: each its own level, each pack an iteration."""
    timed = [row for row in values["measurements"] if row["seconds"]]
    iterations = [
        {"level": k, "loads": [loads], "seconds": seconds}
        for k, row in enumerate(timed)
        for loads, seconds in zip(row["loads"], row["seconds"], strict=True)
    ]
    return {
        "levels": [row["level"] for row in timed],
        "iterations": iterations,
        "step_seconds": values["step_seconds"],
    }


def calibrate(measured: Measured) -> Calibration:
    """Fit one LevelTimeModel a level, in relative error, no coefficient below 0."""
    of_level: list[list[int]] = [[] for _ in measured.levels]
    for number, row in enumerate(measured.iterations):
        of_level[row.level].append(number)
    held_out = np.zeros(len(measured.iterations), bool)
    predicted = np.zeros(len(measured.iterations))
    times = []
    for numbers in of_level:
        fitted = numbers if len(numbers) < HOLD_OUT_FROM else numbers[::2]
        held_out[[n for n in numbers if n not in set(fitted)]] = True
        times.append(_fit([measured.iterations[n] for n in fitted]))
        for n in numbers:
            predicted[n] = times[-1].seconds(measured.iterations[n].loads).max()
    return Calibration(tuple(times), np.array([row.seconds for row in measured.iterations]), predicted, held_out)


def _fit(rows: Sequence[MeasuredIteration]) -> LevelTimeModel:
    """The slowest rank decides an iteration, and which it is depends on the coefficients: fit and choose in turn."""
    seconds = np.array([row.seconds for row in rows])
    slowest = [int(np.argmax(row.loads[:, 2])) for row in rows]
    for _ in range(20):
        loads = np.stack([row.loads[s] for row, s in zip(rows, slowest, strict=True)])
        time = LevelTimeModel(*relative_fit(loads, seconds).tolist())
        chosen = [int(np.argmax(time.seconds(row.loads))) for row in rows]
        if chosen == slowest:
            break
        slowest = chosen
    return time


def relative_fit(columns: FloatArray, target: FloatArray) -> FloatArray:
    """Coefficients x >= 0 [k] of the least squared relative error of columns [n, k] @ x to target [n], positive."""
    return nonnegative_least_squares(columns / target[:, None], np.ones(len(target)))


@dataclass(frozen=True)
class MachineTimes:
    """Seconds: constant of an iteration; the others for each token, trained token, squared token and document of a
    rank's share, and exchange for each token of a shard where cp_degree > 1."""

    constant: float
    per_token: float
    per_loss_token: float
    per_square: float
    per_document: float
    exchange: float

    def level_time(self, level: Level) -> LevelTimeModel:
        """What an iteration of `level` takes."""
        cp_degree = level.cp_degree
        per_token = self.per_token + (self.exchange if cp_degree > 1 else 0.0)
        return LevelTimeModel(
            base=self.constant + per_token * level.max_tokens / cp_degree,
            per_loss_token=self.per_loss_token / cp_degree,
            per_square=self.per_square / cp_degree,
            per_document=self.per_document / cp_degree,
        )


def fit_machine(levels: Sequence[Level], loads: Sequence[FloatArray], seconds: FloatArray) -> MachineTimes:
    """Least squares of the relative error, no coefficient below 0.

    levels, seconds: of each iteration, [n]. loads: of the packs of each, [ranks, 4] as from pack_loads. The slowest
    rank decides an iteration, and which one it is depends on the coefficients: fit and choose in turn.
    """
    columns = [_columns(level, packs) for level, packs in zip(levels, loads, strict=True)]
    slowest = [int(packs[:, 3].argmax()) for packs in columns]
    for _ in range(20):
        rows = np.stack([packs[s] for packs, s in zip(columns, slowest, strict=True)])
        found = nonnegative_least_squares(rows / seconds[:, None], np.ones(len(seconds)))
        chosen = [int((packs @ found).argmax()) for packs in columns]
        if chosen == slowest:
            break
        slowest = chosen
    return MachineTimes(*found.tolist())


def _columns(level: Level, loads: FloatArray) -> FloatArray:
    """What MachineTimes' coefficients are multiplied with, [ranks, 6]."""
    ones, tokens = np.ones(len(loads)), level.max_tokens / level.cp_degree
    exchanged = tokens if level.cp_degree > 1 else 0.0
    return np.column_stack([ones, tokens * ones, loads[:, 1:] / level.cp_degree, exchanged * ones])
