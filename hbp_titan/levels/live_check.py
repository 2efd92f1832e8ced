"""LiveCheck: the measured time of iterations against the plan's model, per level and rank, while training runs.

Owns what is compared, when it is said that the two part, and the advice. Every rank measures (work_clock.py); all ranks
gather at the same steps and see the same report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hbp_titan.distributed.world import World
from hbp_titan.levels.level_time import FloatArray, LevelTime, pack_loads
from hbp_titan.levels.work_clock import WorkClock
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Plan

PARTED = 0.2
"""How far time, waiting or a rank's speed may be from the plan's model before a warning."""


@dataclass(frozen=True)
class LevelCheck:
    """One level since the last report.

    ratio: measured / modelled seconds of its iterations, the median. waiting: share of the ranks' time spent waiting
    for the slowest of the iteration, as measured; planned: by the model.
    """

    iterations: int
    ratio: float
    waiting: float
    planned: float


@dataclass(frozen=True)
class Report:
    """levels: by index, those that ran. slowest: (rank, its work per modelled work / that of the median rank). work:
    seconds of work of each rank."""

    levels: dict[int, LevelCheck]
    slowest: tuple[int, float]
    work: tuple[float, ...]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For metrics.jsonl; names: one a level."""
        checks = {names[k]: vars(check) for k, check in self.levels.items()}
        rank, ratio = self.slowest
        return {"levels": checks, "slowest_rank": rank, "slowest_ratio": ratio, "work_by_rank": list(self.work)}

    def line(self, names: Sequence[str]) -> str:
        """For the console."""
        parts = [
            f"{names[k]} {check.ratio:.2f}x the modelled time, waiting {check.waiting:.1%} (plan {check.planned:.1%})"
            for k, check in self.levels.items()
        ]
        rank, ratio = self.slowest
        return f"live check  {'; '.join(parts)}; slowest rank {rank}, {ratio:.2f}x the median's time for its work"

    def warnings(self, names: Sequence[str]) -> list[str]:
        """One line for each thing that parts from the model by more than PARTED, with what to do about it."""
        lines = []
        for k, check in self.levels.items():
            if abs(check.ratio - 1) > PARTED:
                lines.append(
                    f"level {names[k]} takes {check.ratio:.2f}x its modelled time: the levels were chosen for another "
                    "speed; look for other work on the machine, or choose anew with scripts/select_levels.py"
                )
            if check.waiting - check.planned > PARTED:
                lines.append(
                    f"level {names[k]}: ranks wait {check.waiting:.0%} of the time, the plan has {check.planned:.0%}: "
                    'the cost model does not fit this machine; measure it ([packing] levels = "auto")'
                )
        rank, ratio = self.slowest
        if ratio > 1 + PARTED:
            lines.append(
                f"rank {rank} needs {ratio:.2f}x the median rank's time for its work and holds up the others: check "
                "its node for other work, heat or a lower clock"
            )
        return [f"warning: {line}" for line in lines]


class LiveCheck:
    """`iteration` goes around each forward and backward, `report` after each optimizer step.

    times: measured, one a level; None takes the plan's cost models, which know no unit: the first report of each level
    then sets it, and later ones tell drift. interval: steps between reports; 0 measures nothing.
    """

    def __init__(self, model: Decoder, world: World, times: Sequence[LevelTime] | None, interval: int) -> None:
        self.world = world
        self.times = times
        self.interval = interval
        self.clock = WorkClock(model, world.device)
        self._units: dict[int, float] = {}
        self._indices: list[int] = []
        self._seconds: list[tuple[float, float]] = []

    @contextmanager
    def iteration(self, index: int) -> Iterator[None]:
        """Measure iteration `index` of the plan."""
        if not self.interval:
            yield
            return
        with self.clock.iteration():
            yield
        self._indices.append(index)

    def take(self) -> list[tuple[float, float]]:
        """(wall, work) in seconds of this rank's iterations since the last call; none where interval is 0.

        On a GPU it waits for the last of them to end.
        """
        seconds = self.clock.read() if self.interval else []
        self._seconds += seconds
        return seconds

    def report(self, plan: Plan, steps_done: int) -> Report | None:
        """What the iterations since the last report showed, after every interval and at the end of the epoch.

        steps_done: optimizer steps of `plan` so far. A collective: every rank calls it after each step and its `take`.
        """
        if not self.interval or (steps_done % self.interval and steps_done < plan.num_steps):
            return None
        mine = torch.tensor(self._seconds, dtype=torch.float64, device=self.world.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(gathered, mine)
        wall_RI, work_RI = torch.stack(gathered).cpu().numpy().transpose(2, 0, 1)
        indices = np.array(self._indices)
        self._indices, self._seconds = [], []
        model_RI = self._modelled(plan, indices)
        levels = plan.level_of_iteration[indices]
        for k in np.unique(levels).tolist():
            if self.times is None and k not in self._units:
                of = levels == k
                self._units[k] = float(np.median(wall_RI[:, of].max(0) / model_RI[:, of].max(0)))
        units = np.array([self._units.get(k, 1.0) for k in levels.tolist()])
        return compare(levels, wall_RI, work_RI, model_RI * units)

    def _modelled(self, plan: Plan, indices: np.ndarray) -> FloatArray:
        """Modelled time of each rank in each iteration, [ranks, iterations]; cp ranks are adjacent."""
        loads = pack_loads(plan)
        columns = []
        for index in indices.tolist():
            of = slice(*plan.pack_offsets[index : index + 2])
            k = int(plan.level_of_iteration[index])
            level = plan.levels[k]
            if self.times is None:
                # Padding is computed like tokens.
                tokens = np.full(of.stop - of.start, level.max_tokens)
                seconds = plan.costs[k].cost(tokens, plan.pack_sum_sq[of])
            else:
                seconds = self.times[k].seconds(loads[of])
            columns.append(np.repeat(seconds, level.cp_degree))
        return np.stack(columns, axis=1)


def compare(levels: np.ndarray, wall_RI: FloatArray, work_RI: FloatArray, model_RI: FloatArray) -> Report:
    """The report of iterations I on ranks R; levels: of each iteration, [I]; all seconds [R, I]."""
    checks = {}
    paces = np.ones_like(work_RI)
    for k in np.unique(levels).tolist():
        of = levels == k
        wall, work, model = wall_RI[:, of], work_RI[:, of], model_RI[:, of]
        checks[k] = LevelCheck(
            iterations=int(of.sum()),
            ratio=float(np.median(wall.max(0) / model.max(0))),
            waiting=1 - float(work.mean(0).sum() / work.max(0).sum()),
            planned=1 - float(model.mean(0).sum() / model.max(0).sum()),
        )
        # Work has a unit of its own: what counts is a rank's beside the others'.
        paces[:, of] = work / model / np.median(work / model)
    pace_R = (paces * model_RI).sum(1) / model_RI.sum(1)
    slowest = int(pace_R.argmax())
    return Report(checks, (slowest, float(pace_R[slowest] / np.median(pace_R))), tuple(work_RI.sum(1).tolist()))
