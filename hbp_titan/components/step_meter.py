"""What an optimizer step measures, gathered on each rank and brought together over all of them.

Owns the two reductions of a step, in which whatever the ranks have to tell each other travels: sums before the update,
maxima after it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from hbp_titan.components.loss_means import LossCollector, NamedSources
from hbp_titan.components.memory_use import MemoryUse
from hbp_titan.components.step_record import StepMeasurements
from hbp_titan.components.step_times import StepTimes
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.packing import Plan


class StepMeter:
    """`start`, then `add` every iteration, then `sum_over_ranks`, `max_over_ranks` and `measurements`, once a step."""

    def __init__(self, world: World, store: NamedSources, num_levels: int) -> None:
        self.world = world
        self.losses = LossCollector(store, num_levels)
        self.memory = MemoryUse(world.device, num_levels)
        self.start()

    def start(self) -> None:
        """A step begins."""
        self.started = time.perf_counter()
        self.data_wait = 0.0

    def add(self, batch: PackedBatch, losses_S: Tensor, data_wait: float) -> None:
        """An iteration has been launched. losses_S: of its samples; data_wait: seconds until its batch was there."""
        self.memory.add(batch.level)
        self.losses.add(batch, losses_S)
        self.data_wait += data_wait

    def sum_over_ranks(self, seconds: Sequence[tuple[float, float]]) -> list[float]:
        """Loss sums by level over all ranks; a collective. seconds: (wall, work) of each iteration, or none of any."""
        self._work = [work for _, work in seconds]
        mine = self.losses.take()
        values = [*mine, *(wall for wall, _ in seconds), *self._work]
        summed = all_reduce_values(values, "sum", self.world.device)
        self._sums, rest = summed[: len(mine)], [value / self.world.size for value in summed[len(mine) :]]
        self._wall_mean, self._work_mean = rest[: len(seconds)], rest[len(seconds) :]
        return self.losses.by_level(self._sums)

    def max_over_ranks(self, told: Sequence[float]) -> list[float]:
        """The most that any rank says of each of `told`; ends the step's time. A collective."""
        memory = self.memory.take()
        figures = [self.data_wait, self.memory.peak, *memory, *self._work]
        most = all_reduce_values([*told, *figures], "max", self.world.device)
        self.data_wait, self._peak, *rest = most[len(told) :]
        self._memory, slowest = rest[: len(memory)], rest[len(memory) :]
        whole = time.perf_counter() - self.started
        self._times = StepTimes(self._wall_mean, self._work_mean, slowest, self.data_wait, whole)
        return most[: len(told)]

    def measurements(self, plan: Plan, first: int, last: int, grad_norm: float, lr: float) -> StepMeasurements:
        """Of the step that trained iterations first to last - 1 of `plan`."""
        means = self.losses.means(self._sums, plan, first, last)
        return StepMeasurements(means, grad_norm, lr, self._times, self._memory, self._peak)
