"""Series and figures that a report derives from the steps of a run.

Owns the definitions: how a curve is smoothed, what a level's row says, what the end of a run comes to. Shares are 0 to
1 here; metrics.jsonl has padding and MFU in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.report.step_log import Floats, StepLog

Bools = NDArray[np.bool_]
WINDOWS = 40
"""A smoothed curve's window is a 40th of the run, at least 3 steps."""


def window_of(steps: int) -> int:
    """Steps that a smoothed value of a curve of so many steps averages over."""
    return max(3, -(-steps // WINDOWS))


def smooth(values: Floats, weights: Floats, window: int) -> Floats:
    """Weighted mean of the last `window` finite values up to each, float64 [n]; NaN where a value is not finite.

    weights: float64 [n]; what is not finite or not above 0 counts as 0, a window of such as equal weights.
    """
    result = np.full(len(values), np.nan)
    at = np.flatnonzero(np.isfinite(values))
    if not len(at):
        return result
    weight = np.where(np.isfinite(weights[at]) & (weights[at] > 0), weights[at], 0.0)
    if not weight.all():
        weight = np.maximum(weight, weight.max() * 1e-9) if weight.any() else np.ones(len(at))
    sums = np.cumsum(np.append(0.0, weight * values[at]))
    totals = np.cumsum(np.append(0.0, weight))
    last = np.arange(1, len(at) + 1)
    first = np.maximum(last - window, 0)
    result[at] = (sums[last] - sums[first]) / (totals[last] - totals[first])
    return result


def mean(values: Floats, weights: Floats | None = None) -> float | None:
    """The weighted mean of the finite values, None where there is none."""
    weights = np.ones(len(values)) if weights is None else weights
    known = np.isfinite(values) & np.isfinite(weights)
    total = weights[known].sum()
    return float((values[known] * weights[known]).sum() / total) if total > 0 else None


def last(values: Floats) -> float | None:
    """The last finite value."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def applied(log: StepLog) -> Bools:
    """The steps that were not skipped, bool [n]."""
    return ~np.isin(log.steps, list(log.skipped)) if log.skipped else np.ones(len(log), bool)


def tokens_so_far(log: StepLog) -> Floats:
    """Real tokens up to each step, with it, float64 [n]."""
    return np.cumsum(np.nan_to_num(log.column("tokens")))


def seconds_so_far(log: StepLog) -> Floats:
    """Time of the steps up to each, with it, in seconds; validation, checkpoints and starts are not in it."""
    return np.cumsum(np.nan_to_num(log.column("step_seconds")))


def loss_at(log: StepLog, tokens: float) -> float | None:
    """The smoothed loss of the last step that ends within so many tokens; None where there is none."""
    loss = np.where(applied(log), log.column("loss"), np.nan)
    curve = smooth(loss, log.column("trained_tokens"), window_of(len(log)))
    return last(curve[tokens_so_far(log) <= tokens])


def combinations(log: StepLog) -> dict[str, Bools]:
    """The steps of each combination of levels by its name, in the order of the levels."""
    names = np.array(log.level_names)
    order = {index: rank for rank, index in enumerate(log.levels)}
    found = {}
    for name in dict.fromkeys(log.level_names):
        steps = names == name
        first = int(np.flatnonzero(steps)[0])
        mine = [rank for index, rank in order.items() if log.present("loss_by_level", index)[first]]
        found[name] = (len(mine), mine, steps)
    in_order = sorted(found.items(), key=lambda item: (item[1][0], item[1][1], item[0]))
    return {name or "unknown": steps for name, (_, _, steps) in in_order}


@dataclass(frozen=True)
class Totals:
    """Sums and means over some steps; None where the run did not record it.

    seconds: of the optimizer steps. padding: share of computed positions that held no token. mfu: share of the peak,
    weighted by time. data_wait, idle: shares of the time. memory_gib: the most.
    """

    steps: int
    iterations: int
    tokens: int
    trained_tokens: int
    seconds: float
    mfu: float | None
    padding: float | None
    data_wait: float | None
    idle: float | None
    memory_gib: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens of all ranks per second."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def totals(log: StepLog, chosen: Bools | None = None) -> Totals:
    """The totals of the chosen steps, bool [n]; of all by default."""
    chosen = np.ones(len(log), bool) if chosen is None else chosen

    def column(name: str) -> Floats:
        return log.column(name)[chosen]

    seconds, tokens = column("step_seconds"), column("tokens")
    mfu, memory = mean(column("mfu"), seconds), column("peak_memory_gib")
    computed = tokens / (1 - column("padding") / 100)
    known = np.isfinite(computed)
    waited = mean(column("data_wait_seconds") / seconds, seconds)
    return Totals(
        steps=int(chosen.sum()),
        iterations=int(np.nansum(column("iterations"))),
        tokens=int(np.nansum(tokens)),
        trained_tokens=int(np.nansum(column("trained_tokens"))),
        seconds=float(np.nansum(seconds)),
        mfu=None if mfu is None else mfu / 100,
        padding=float(1 - tokens[known].sum() / computed[known].sum()) if known.any() else None,
        data_wait=waited,
        idle=mean(column("idle_share"), seconds),
        memory_gib=float(np.nanmax(memory)) if np.isfinite(memory).any() else None,
    )


def edge_means(values: Floats, weights: Floats) -> tuple[float, float] | None:
    """Weighted means over the first and the last tenth (3 values at least) of the finite values; None without any."""
    at = np.flatnonzero(np.isfinite(values))
    if not len(at):
        return None
    size = min(len(at), max(3, len(at) // 10))
    means = [mean(values[part], weights[part]) or mean(values[part]) for part in (at[:size], at[-size:])]
    return (float(means[0] or 0.0), float(means[1] or 0.0))


def validation_series(log: StepLog, kind: str) -> dict[str, Floats]:
    """Loss of each group of the validation samples: kind is by_level, by_length or by_source; float64 [n] each."""
    found = {name: log.column("validation", kind, name, "loss") for name in log.names("validation", kind)}
    if kind == "by_level" and not found:
        # As older runs wrote it.
        keys = [name for name in log.names("validation") if name.startswith("loss ")]
        found = {key.removeprefix("loss "): log.column("validation", key) for key in keys}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def bands_in_order(names: list[str]) -> list[str]:
    """Names of length bands, "1024", "2048", ..., shortest first."""
    return sorted((name for name in names if name.isdecimal() and len(name) < 16), key=int)


def total_seconds_by_rank(log: StepLog) -> list[float]:
    """Seconds of work of each rank over the live checks of the newest number of ranks; empty where unknown."""
    if not log.work_by_rank:
        return []
    ranks = len(log.work_by_rank[-1][1])
    return np.sum([work for _, work in log.work_by_rank if len(work) == ranks], axis=0).tolist()


def end_figures(log: StepLog) -> Mapping[str, float | None]:
    """What a run comes to, by the names that a comparison shows."""
    total, steps = totals(log), applied(log)
    loss, trained = np.where(steps, log.column("loss"), np.nan), log.column("trained_tokens")
    edges = edge_means(loss, trained)
    return {
        "steps": float(total.steps),
        "tokens": float(total.tokens),
        "seconds": total.seconds,
        "loss": edges[1] if edges else None,
        "validation loss": last(log.column("validation", "loss")),
        "tokens per second": total.tokens_per_second,
        "MFU": total.mfu,
        "padding": total.padding,
        "idle": total.idle,
        "data wait": total.data_wait,
        "time imbalance": mean(log.column("time_imbalance"), log.column("step_seconds")),
        "memory": total.memory_gib,
        "skipped": float(len(log.skipped)),
    }
