"""What an optimizer step measures, gathered on each rank and brought together over all of them.

Owns the two collectives of a step and its one wait for the device. Before the update a sum of what lies on the device:
squared gradient norm, losses, tokens per expert; the update depends on it, and the host does not wait for it. After the
update a gather of what the hosts measured, and one copy of both to the host.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_titan.components.loss_means import LossCollector, NamedSources
from hbp_titan.components.memory_use import MemoryUse
from hbp_titan.components.step_record import StepMeasurements
from hbp_titan.components.step_times import StepTimes
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.packing import Plan


class StepMeter:
    """`start`, then `add` every iteration, then `sum_over_ranks`, `read` and `measurements`, once a step.

    After `read`: grad_norm, before clipping; loss_sums by level over all ranks; counts, what sum_over_ranks was given.
    """

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

    def sum_over_ranks(self, square: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient's norm, and 1 where it or a loss is not finite, else 0: float32 scalars on the device.

        square: this rank's part of the squared norm, float64 scalar. counts: integers to be summed, of any shape.
        A collective; the host does not wait for it.
        """
        losses_G = self.losses.take()
        parts = [square.view(1), losses_G, *([] if counts is None else [counts.flatten().double()])]
        self._num_sums, self._summed = len(losses_G), torch.cat(parts)
        dist.all_reduce(self._summed)
        norm = self._summed[0].sqrt()
        levels = self._summed[1 : 1 + self.losses.num_levels]
        return norm.float(), (norm + levels.sum()).isfinite().logical_not().float()

    def read(self, seconds: Sequence[tuple[float, float]], flags: Sequence[float]) -> list[float]:
        """The largest that any rank has of each of `flags`; ends the step's time. A collective that waits.

        seconds: (wall, work) of each iteration, or none of any.
        """
        memory = self.memory.take()
        wall, work = [wall for wall, _ in seconds], [work for _, work in seconds]
        mine = [*flags, self.data_wait, self.memory.peak, *memory, *work, *wall]
        row = torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        rows = torch.empty(self.world.size * len(mine), dtype=torch.float64, device=self.world.device)
        _gather(rows, row)
        values = torch.cat([self._summed, rows]).cpu().numpy()
        whole = time.perf_counter() - self.started
        self.grad_norm = float(np.sqrt(values[0]))
        self._sums = values[1 : 1 + self._num_sums].tolist()
        self.loss_sums = self.losses.by_level(self._sums)
        self.counts = values[1 + self._num_sums : len(self._summed)].astype(np.int64)
        ranks = values[len(self._summed) :].reshape(self.world.size, -1)
        most, mean = ranks.max(axis=0).tolist(), ranks.mean(axis=0).tolist()
        self.data_wait, self._peak, *rest = most[len(flags) :]
        self._memory, slowest = rest[: len(memory)], rest[len(memory) : len(memory) + len(work)]
        work_mean, wall_mean = np.split(np.array(mean[len(flags) + 2 + len(memory) :]), 2)
        self._times = StepTimes(wall_mean.tolist(), work_mean.tolist(), slowest, self.data_wait, whole)
        return most[: len(flags)]

    def measurements(self, plan: Plan, first: int, last: int, lr: float) -> StepMeasurements:
        """Of the step that trained iterations first to last - 1 of `plan`, until the next `read`."""
        means = self.losses.means(self._sums, plan, first, last)
        return StepMeasurements(means, self.grad_norm, lr, self._times, self._memory, self._peak)


def _gather(rows: Tensor, row: Tensor) -> None:
    """Every rank's `row`, one after the other. torch 2.13 has a new name for it."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(rows, row)
