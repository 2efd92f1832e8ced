"""What a choice of levels is judged by, and how it is shown: the user's whole epoch, packed, filled and balanced.

Owns the workload (data and plan settings of an epoch), the form of a selection, and the rivals that every selection is
shown beside: flat packing at the best single setting, as ISF packs it and sorted by cost. select.py makes the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.data.store.token_store import TokenStore
from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.level_time import EpochTime, FloatArray, LevelTime, pack_loads, predict_epoch
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.packing.level import level_name

IntArray = NDArray[np.int64]

RIVALS = {"isf": "ISF", "flat_sorted": "flat + sort"}


@dataclass(frozen=True)
class Workload:
    """The epoch that levels are chosen for: its samples, and everything but the levels that its plan depends on.

    lengths, loss_tokens: int64 [num_samples]. cost: what the run balances packs by. step_seconds: of an optimizer step
    beside its iterations. longest: tokens that the largest level must hold where held-out data has a longer sample.
    """

    lengths: IntArray
    loss_tokens: IntArray
    world_size: int
    cost: CostModel
    method: str = "hbp"
    seed: int = 0
    global_batch_tokens: int = 0
    mix: str = "alternate"
    curriculum_steps: float = 0.0
    step_seconds: float = 0.0
    longest: int = 0

    @classmethod
    def of(
        cls, config: JobConfig, world_size: int, cost: CostModel, stores: Sequence[TokenStore], step_seconds: float = 0
    ) -> Workload:
        """The first epoch of a run of `config`. stores: the training data and, if any, the held-out data."""
        return cls(
            stores[0].lengths,
            stores[0].loss_tokens,
            world_size,
            cost,
            config.packing.method,
            config.packing.seed,
            config.training.global_batch_tokens,
            config.packing.mix,
            config.packing.curriculum_steps,
            step_seconds,
            max(int(store.lengths.max()) for store in stores),
        )

    @property
    def most_tokens(self) -> int:
        """Tokens that the largest level must hold."""
        return max(self.longest, int(self.lengths.max()))

    def plan(self, levels: Sequence[Level], method: str | None = None) -> Plan:
        """The plan of the epoch at these levels, by another method where one is named."""
        return build_plan(
            self.lengths,
            levels,
            self.world_size,
            method=method or self.method,
            seed=self.seed,
            loss_tokens=self.loss_tokens,
            cost=self.cost,
            global_batch_tokens=self.global_batch_tokens,
            mix=self.mix,
            curriculum_steps=self.curriculum_steps,
        )

    def sampled(self, num_samples: int) -> Workload:
        """A share of about `num_samples` with the same distribution of lengths; what has to be held stays."""
        stride = -(-len(self.lengths) // num_samples)
        kept = np.sort(np.argsort(self.lengths, kind="stable")[stride // 2 :: stride])
        return dataclasses.replace(
            self, lengths=self.lengths[kept], loss_tokens=self.loss_tokens[kept], longest=self.most_tokens
        )


@dataclass(frozen=True)
class Selection:
    """Levels with the time of an iteration of each, and the epoch that follows. notes: what was decided on the way."""

    levels: tuple[Level, ...]
    times: tuple[LevelTime, ...]
    predicted: EpochTime
    notes: tuple[str, ...] = ()


def selected(candidates: Sequence[Candidate], plan: Plan, workload: Workload, notes: Sequence[str] = ()) -> Selection:
    """The selection of one candidate a level of `plan`."""
    times = tuple(candidate.time for candidate in candidates if candidate.time is not None)
    levels = tuple(candidate.level for candidate in candidates)
    return Selection(levels, times, predict_epoch(plan, times, workload.step_seconds), tuple(notes))


def level_seconds(plan: Plan, level: int, candidates: Sequence[Candidate]) -> FloatArray:
    """Seconds that all iterations of `level` take at each candidate of the same cp degree, float64 [candidates]."""
    of_level = plan.pack_levels == level
    starts = np.arange(0, np.count_nonzero(of_level), plan.dp_degrees[level])
    return slowest_sums(pack_loads(plan)[of_level], starts, candidates)


def slowest_sums(loads: FloatArray, starts: IntArray, candidates: Sequence[Candidate]) -> FloatArray:
    """Sum over iterations, which begin at packs `starts`, of their slowest pack at each candidate, [candidates].

    loads: float64 [packs, 4] in the order in which the packs run.
    """
    if not len(starts):
        return np.zeros(len(candidates))
    weights = np.array([dataclasses.astuple(candidate.time) for candidate in candidates if candidate.time])
    return np.maximum.reduceat(loads @ weights.T, starts, axis=0).sum(axis=0)


def holding(candidates: Sequence[Candidate], tokens: int) -> int:
    """The shortest length that fits memory and holds `tokens` tokens; ValueError where there is none."""
    lengths = [c.level.max_tokens for c in candidates if c.fits and c.level.max_tokens >= tokens]
    if lengths:
        return min(lengths)
    tried = sorted({c.level.max_tokens for c in candidates if c.level.max_tokens >= tokens})
    if tried:
        raise ValueError(
            f"no setting of max_tokens={tried[0]} or more, which the longest sample of {tokens} tokens needs, fits in "
            "memory: use more ranks or a higher cp_degree, or leave such samples out (data.overlong)"
        )
    raise ValueError(f"no candidate holds the longest sample, of {tokens} tokens: add a larger max_tokens")


def rivals(candidates: Sequence[Candidate], workload: Workload) -> dict[str, Selection]:
    """Each method of RIVALS at its best setting of the shortest length that holds every sample."""
    length = holding(candidates, workload.most_tokens)
    fitting = [c for c in candidates if c.fits and c.level.max_tokens == length]
    best: dict[str, Selection] = {}
    for cp_degree in sorted({c.level.cp_degree for c in fitting}):
        same_cp = [c for c in fitting if c.level.cp_degree == cp_degree]
        for method in RIVALS:
            plan = workload.plan([Level(length, cp_degree)], method)
            fastest = same_cp[int(level_seconds(plan, 0, same_cp).argmin())]
            found = selected([fastest], plan, workload)
            if method not in best or found.predicted.seconds < best[method].predicted.seconds:
                best[method] = found
    return best


def describe(selections: dict[str, Selection], beside: dict[str, Selection]) -> str:
    """A table of selections and their rivals: levels, predicted hours, rank time lost in waiting, gain."""
    rows = {**selections, **{RIVALS[name]: rival for name, rival in beside.items()}}
    names = {RIVALS[name]: beside[name].predicted.seconds for name in beside}
    lines = [f"{'levels':<12}{'epoch':>12}{'waiting':>9}" + "".join(f"{'x ' + name:>14}" for name in names)]
    for name, row in rows.items():
        seconds = row.predicted.seconds
        gains = "".join(f"{rival / seconds:>14.2f}" for rival in names.values())
        lines.append(f"{name:<12}{duration(seconds):>12}{row.predicted.idle:>9.2%}{gains}")
        lines += [f"  {describe_level(level)}" for level in row.levels]
        lines += [f"  ({note})" for note in row.notes]
    return "\n".join(lines)


def describe_level(level: Level) -> str:
    """A level with everything that was chosen for it, in a few words."""
    words = [level_name(level)]
    if level.cp_degree > 1:
        words.append(level.cp_style)
    if level.ac_policy != "none":
        words.append(f"{level.ac_policy} on {'all' if level.ac_layers is None else level.ac_layers} layers")
    if level.reshard_after_forward is not None:
        words.append(f"reshard_after_forward {str(level.reshard_after_forward).lower()}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Seconds in the largest unit that leaves at least 2 of it."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds:.3g} s"
