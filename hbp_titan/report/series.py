"""Series and numbers that a report derives from the steps of a run.

Owns their definitions: smoothing, totals per level, final numbers of a run. Shares are 0 to 1 here; metrics.jsonl has
padding and MFU in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.report.run import Floats, StepLog

Bools = NDArray[np.bool_]
WINDOWS = 20
"""The smoothing window is a 20th of the run, at least 5 steps."""


def window_of(steps: int) -> int:
    """Return the smoothing window of a curve of `steps` steps."""
    return max(5, -(-steps // WINDOWS))


def smooth(values: Floats, weights: Floats, window: int) -> Floats:
    """Return the weighted mean of the last `window` finite values up to each, float64 [n]; NaN stays NaN.

    weights: float64 [n]; not finite or negative ones count as 0, and a window of only such as equal weights.
    """
    result = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return result
    weight = np.where(np.isfinite(weights[known]) & (weights[known] > 0), weights[known], 0.0)
    if not weight.all():
        # Tiny instead of 0: a window of zeros would divide by zero.
        weight = np.maximum(weight, weight.max() * 1e-9) if weight.any() else np.ones(len(known))
    # Differences of cumulative sums: linear time for any window.
    sums = np.cumsum(np.append(0.0, weight * values[known]))
    totals = np.cumsum(np.append(0.0, weight))
    last = np.arange(1, len(known) + 1)
    first = np.maximum(last - window, 0)
    result[known] = (sums[last] - sums[first]) / (totals[last] - totals[first])
    return result


def mean(values: Floats, weights: Floats | None = None) -> float | None:
    """Return the weighted mean of the finite values, None if there is none."""
    weights = np.ones(len(values)) if weights is None else weights
    known = np.isfinite(values) & np.isfinite(weights)
    total = weights[known].sum()
    return float((values[known] * weights[known]).sum() / total) if total > 0 else None


def any_finite(values: Floats) -> bool:
    """Return whether any value is finite."""
    return bool(np.isfinite(values).any())


def last(values: Floats) -> float | None:
    """Return the last finite value."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def applied(log: StepLog) -> Bools:
    """Return which steps were not skipped, bool [n]."""
    return ~np.isin(log.steps, list(log.skipped)) if log.skipped else np.ones(len(log), bool)


def tokens_so_far(log: StepLog) -> Floats:
    """Return the real tokens up to and including each step, float64 [n]."""
    return np.cumsum(np.nan_to_num(log.column("tokens")))


def seconds_so_far(log: StepLog) -> Floats:
    """Return the seconds up to and including each step, without validation, checkpoints and start-up."""
    return np.cumsum(np.nan_to_num(log.column("step_seconds")))


def loss_at(log: StepLog, tokens: float) -> float | None:
    """Return the smoothed loss of the last step that ends within `tokens` tokens, None if there is none."""
    # The loss of a skipped step may be the spike for which it was skipped.
    loss = np.where(applied(log), log.column("loss"), np.nan)
    curve = smooth(loss, log.column("trained_tokens"), window_of(len(log)))
    return last(curve[tokens_so_far(log) <= tokens])


def combinations(log: StepLog) -> dict[str, Bools]:
    """Return the steps of each combination of levels, bool [n]: single levels first, then mixed steps."""
    names = np.array(log.level_names)
    rank = {name: index for index, name in enumerate(log.levels)}
    found = sorted(set(log.level_names), key=lambda name: (name not in rank, rank.get(name, 0), name))
    return {name or "unknown": names == name for name in found}


@dataclass(frozen=True)
class LevelSteps:
    """Values of one level in each step, float64 [n] each, NaN in steps without it.

    positions: tokens and padding. seconds, waiting: the level's part of the step's time, and of the waiting in it.
    mfu: percent. memory: GiB, maximum over the ranks.
    """

    micro_batches: Floats
    tokens: Floats
    positions: Floats
    seconds: Floats
    waiting: Floats
    mfu: Floats
    memory: Floats


def level_steps(log: StepLog) -> dict[str, LevelSteps]:
    """Return the values of each level as recorded under per_level in metrics.jsonl."""
    return {
        name: LevelSteps(
            micro_batches=log.column("per_level", name, "micro_batches"),
            tokens=log.column("per_level", name, "tokens"),
            positions=log.column("per_level", name, "positions"),
            seconds=log.column("per_level", name, "seconds"),
            waiting=log.column("per_level", name, "waiting_seconds"),
            mfu=log.column("per_level", name, "mfu"),
            memory=log.column("memory_by_level", name),
        )
        for name in log.levels
    }


@dataclass(frozen=True)
class Totals:
    """Sums and means over steps; None for what the run did not record.

    padding: share of computed positions without a token. mfu: share of the peak, weighted by time. idle: share of the
    time. memory_gib: maximum.
    """

    steps: int
    micro_batches: int
    tokens: int
    seconds: float
    mfu: float | None
    padding: float | None
    idle: float | None
    memory_gib: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Return the real tokens of all ranks per second."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def totals(of: LevelSteps) -> Totals:
    """Return the totals of a level over all steps."""
    mfu = mean(of.mfu, of.seconds)
    padding = mean(1 - of.tokens / of.positions, of.positions)
    return Totals(
        steps=int(np.isfinite(of.micro_batches).sum()),
        micro_batches=int(np.nansum(of.micro_batches)),
        tokens=int(np.nansum(of.tokens)),
        seconds=float(np.nansum(of.seconds)),
        mfu=None if mfu is None else mfu / 100,
        padding=padding,
        idle=mean(of.waiting / of.seconds, of.seconds),
        memory_gib=float(np.nanmax(of.memory)) if np.isfinite(of.memory).any() else None,
    )


def whole_steps(log: StepLog, chosen: Bools | None = None) -> LevelSteps:
    """Return the values of whole steps, of all levels together. chosen: steps to include, bool [n] [all]."""
    chosen = np.ones(len(log), bool) if chosen is None else chosen
    tokens, seconds = (np.where(chosen, log.column(name), np.nan) for name in ("tokens", "step_seconds"))
    return LevelSteps(
        np.where(chosen, log.column("micro_batches"), np.nan), tokens, tokens / (1 - log.column("padding") / 100),
        seconds, log.column("idle_share") * seconds, log.column("mfu"), log.column("peak_memory_gib"),
    )  # fmt: skip


def edge_means(values: Floats, weights: Floats) -> tuple[float, float] | None:
    """Return the weighted means of the first and last tenth (at least 3) of the finite values, None if none."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return None
    size = min(len(known), max(3, len(known) // 10))
    # Weights that are all 0 fall back to a plain mean.
    means = [mean(values[part], weights[part]) or mean(values[part]) for part in (known[:size], known[-size:])]
    return (float(means[0] or 0.0), float(means[1] or 0.0))


def held_out_loss(log: StepLog, *group: str) -> Floats:
    """Return the held-out loss before step 1 and after each step, float64 [1 + n]; NaN where it was not evaluated.

    group: nothing for all samples, or by_level, by_length or by_source and a name.
    """
    before = last(log.column("validation_at_start", *group, "loss"))
    return np.append(np.nan if before is None else before, log.column("validation", *group, "loss"))


def validation_series(log: StepLog, kind: str) -> dict[str, Floats]:
    """Return `held_out_loss` of each group. kind: by_level, by_length or by_source."""
    found = {name: held_out_loss(log, kind, name) for name in log.names("validation", kind)}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def bands_in_order(names: list[str]) -> list[str]:
    """Return the names of length bands, "1024", "2048", ..., shortest first."""
    # A name of 16 digits or more is not a length, and its int() may take long.
    return sorted((name for name in names if name.isdecimal() and len(name) < 16), key=int)


def total_seconds_by_rank(log: StepLog) -> list[float]:
    """Return each rank's seconds of work, summed over the timing checks with the newest number of ranks."""
    if not log.work_by_rank:
        return []
    # Work on different numbers of ranks cannot be added up.
    ranks = len(log.work_by_rank[-1][1])
    return np.sum([work for _, work in log.work_by_rank if len(work) == ranks], axis=0).tolist()


def end_figures(log: StepLog) -> Mapping[str, float | None]:
    """Return the final numbers of a run by their names in a comparison."""
    total, steps = totals(whole_steps(log)), applied(log)
    seconds = log.column("step_seconds")
    loss, trained = np.where(steps, log.column("loss"), np.nan), log.column("trained_tokens")
    edges = edge_means(loss, trained)
    return {
        "steps": float(len(log)),
        "tokens": float(total.tokens),
        "seconds": total.seconds,
        "loss": edges[1] if edges else None,
        "validation loss": last(log.column("validation", "loss")),
        "tokens per second": total.tokens_per_second,
        "MFU": total.mfu,
        "padding": total.padding,
        "idle": total.idle,
        "data wait": mean(log.column("data_wait_seconds") / seconds, seconds),
        "time imbalance": mean(log.column("time_imbalance"), seconds),
        "memory": total.memory_gib,
        "skipped": float(len(log.skipped)),
    }
