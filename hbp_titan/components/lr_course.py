"""LRCourse: the learning rate of every step of a run, also of one whose number of steps changes on the way.

Owns the place of a step on the schedule. The schedule (components/optimizer.py) is made once, for the number of steps
that the run has at its start, and each step is one of its steps. Where the number changes, because other ranks or
levels cut the rest of the data differently or because the run is to be longer, it goes on from the place that it has
reached, and the steps that are left share what is left of the schedule evenly: the rate does not jump, and the last
step has the last rate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from hbp_titan.components.optimizer import lr_factor
from hbp_titan.job_config import LRScheduler


@dataclass(frozen=True)
class LRCourse:
    """scheduled: steps of the schedule. From step `first` (steps done), at the place `place` of it, to step `total`."""

    scheduled: int
    total: int
    first: int = 0
    place: float = 0.0

    def place_after(self, steps_done: int) -> float:
        """Steps of the schedule that are behind the run when it has done `steps_done` steps."""
        if self.total <= self.first:
            return self.place
        return self.place + (steps_done - self.first) * ((self.scheduled - self.place) / (self.total - self.first))

    def going_on(self, steps_done: int, total: int) -> LRCourse:
        """The course after `steps_done` steps of a run that now has `total` in all; itself where it had before."""
        if total == self.total:
            return self
        return dataclasses.replace(self, total=total, first=steps_done, place=self.place_after(steps_done))

    def factor(self, config: LRScheduler, steps_done: int) -> float:
        """The factor on the peak learning rate for the step after `steps_done`."""
        of_step = lr_factor(config, self.scheduled)
        at = self.place_after(steps_done + 1) - 1
        low = math.floor(at)
        # Between two steps of the schedule along the line that joins them.
        return of_step(low) if at == low else of_step(low) + (at - low) * (of_step(low + 1) - of_step(low))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next update of every parameter have the rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
