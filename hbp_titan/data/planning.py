"""The plan of each epoch that a configuration asks for on a token store.

Owns the way from TOML keys to the planner's arguments, and the count of optimizer steps over all epochs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.packing import CostModel, Level, Plan, build_plan
from hbp_titan.packing.cost import costs_per_level


class SampleLengths(Protocol):
    """What of a token store a plan depends on."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, [num_samples]."""

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Trained tokens of each sample, [num_samples]."""


class EpochPlans:
    """Makes the plan of an epoch when it is first asked for and keeps the latest two."""

    def __init__(self, config: JobConfig, store: SampleLengths, world_size: int, cost: CostModel) -> None:
        self.config = config
        self.store = store
        self.world_size = world_size
        self.cost = cost
        self.of = lru_cache(maxsize=2)(self._build)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of every plan."""
        return tuple(self.config.levels)

    @property
    def costs(self) -> tuple[CostModel, ...]:
        """The cost model of each level."""
        return costs_per_level(self.cost, len(self.config.levels))

    def build(self, method: str, epoch: int) -> Plan:
        """The plan of `epoch` by `method`; a pure function of configuration, data and world size."""
        packing = self.config.packing
        return build_plan(
            self.store.lengths,
            self.config.levels,
            self.world_size,
            method=method,
            seed=packing.seed,
            loss_tokens=self.store.loss_tokens,
            cost=self.cost,
            global_batch_tokens=self.config.training.global_batch_tokens,
            mix=packing.mix,
            curriculum_steps=packing.curriculum_steps,
            epoch=epoch,
        )

    def _build(self, epoch: int) -> Plan:
        return self.build(self.config.packing.method, epoch)

    def total_steps(self) -> int:
        """Optimizer steps of a run that is never stopped, or continues on the same ranks and levels."""
        return self.config.training.steps or self.steps_from(0)

    def steps_from(self, epoch: int) -> int:
        """Optimizer steps of `epoch` and all later epochs, each planned as a whole."""
        return sum(self.of(later).num_steps for later in range(epoch, self.config.training.epochs))
