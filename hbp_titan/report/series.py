"""Series and figures that a report derives from the steps of a run.

Owns the definitions: how a curve is smoothed, what a level's row says, what the end of a run comes to. Shares are 0 to
1 here; metrics.jsonl has padding and MFU in percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.report.run import Floats, StepLog

Bools = NDArray[np.bool_]
WINDOWS = 20
"""A smoothed curve's window is a 20th of the run, at least 5 steps."""


def window_of(steps: int) -> int:
    """Steps that a smoothed value of a curve of so many steps averages over."""
    return max(5, -(-steps // WINDOWS))


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
    """The steps of each combination of levels by its name, bool [n]: each level alone, then what mixes them."""
    names = np.array(log.level_names)
    rank = {name: at for at, name in enumerate(log.levels)}
    found = sorted(set(log.level_names), key=lambda name: (name not in rank, rank.get(name, 0), name))
    return {name or "unknown": names == name for name in found}


@dataclass(frozen=True)
class LevelSteps:
    """What a level, or steps that mix levels, did in each step; float64 [n] each, NaN in steps of others.

    positions: tokens with the padding. seconds, waiting: its share of the step's time, and of the ranks' waiting in
    it. mfu: percent. memory: GiB, the most of any rank.
    """

    micro_batches: Floats
    tokens: Floats
    positions: Floats
    seconds: Floats
    waiting: Floats
    mfu: Floats
    memory: Floats


def level_steps(log: StepLog) -> dict[str, LevelSteps]:
    """By level as metrics.jsonl parts them. Older runs do not part steps that mix levels: these come as their own."""
    tokens, seconds = log.column("tokens"), log.column("step_seconds")
    whole = {
        "micro_batches": log.column("micro_batches"),
        "tokens": tokens,
        "positions": tokens / (1 - log.column("padding") / 100),
        "seconds": seconds,
        "waiting_seconds": log.column("idle_share") * seconds,
        "mfu": log.column("mfu"),
    }
    parted = log.present("per_level")
    alone = combinations(log)
    nowhere = np.zeros(len(log), bool)
    found = {}
    for name in dict.fromkeys([*log.levels, *alone]):
        unparted = alone.get(name, nowhere) & ~parted
        own = {key: np.where(unparted, of, log.column("per_level", name, key)) for key, of in whole.items()}
        memory = log.column("memory_by_level", name)
        if np.isfinite(own["micro_batches"]).any() or name in log.levels:
            own["waiting"] = own.pop("waiting_seconds")
            found[name] = LevelSteps(**own, memory=memory)
    return found


@dataclass(frozen=True)
class Totals:
    """Sums and means over some steps; None where the run did not record it.

    seconds: of the optimizer steps. padding: share of computed positions that held no token. mfu: share of the peak,
    weighted by time. idle: share of the time. memory_gib: the most.
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
        """Real tokens of all ranks per second."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def totals(of: LevelSteps) -> Totals:
    """The totals of a level over all steps."""
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
    """The steps as wholes, whatever their levels; those chosen, bool [n], or all."""
    chosen = np.ones(len(log), bool) if chosen is None else chosen
    tokens, seconds = (np.where(chosen, log.column(name), np.nan) for name in ("tokens", "step_seconds"))
    return LevelSteps(
        np.where(chosen, log.column("micro_batches"), np.nan), tokens, tokens / (1 - log.column("padding") / 100),
        seconds, log.column("idle_share") * seconds, log.column("mfu"), log.column("peak_memory_gib"),
    )  # fmt: skip


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
