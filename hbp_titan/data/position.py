"""Position: where a run is, and how it goes on from there on other ranks or levels.

Owns the step, the epoch and the parts of the epoch (data/epoch_parts.py), what of them a checkpoint keeps, and the
count of steps that are left. A run that goes on as it was follows its plan bit for bit. With another number of ranks
or other levels the samples that are left of the epoch are planned anew (packing/remainder.py); later epochs are planned
for the new ranks as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbp_titan.data.epoch_parts import Part, describe_parts, load_parts, save_part
from hbp_titan.data.planning import EpochPlans
from hbp_titan.packing import Level, Plan, remainder
from hbp_titan.packing.level import format_level


class Position:
    """step: optimizer steps done since the start of the run. parts: of the current epoch; the last is trained."""

    def __init__(self, plans: EpochPlans, run_folder: Path, data: str) -> None:
        self.plans = plans
        self.run_folder = run_folder
        self.data = data
        self.step = 0
        self.epoch = 0
        self.parts = [Part(1, plans.of(0))]
        self._loaded: Part | None = None

    @property
    def plan(self) -> Plan:
        """What is trained now."""
        return self.parts[-1].plan

    @property
    def step_in_plan(self) -> int:
        """Steps of `plan` that are done."""
        return self.step - self.parts[-1].first_step + 1

    @property
    def finished(self) -> bool:
        """Whether the epoch is trained to its end."""
        return self.step_in_plan == self.plan.num_steps

    def next_epoch(self) -> None:
        """Move to the start of the next epoch, planned as a whole; not at the end of the run."""
        training = self.plans.config.training
        # A step of an epoch that the configuration does not have would be one that total_steps does not count.
        assert training.steps or self.epoch + 1 < training.epochs, f"epoch {self.epoch} is the last"
        self.epoch += 1
        self.parts = [Part(self.step + 1, self.plans.of(self.epoch))]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, those that are done included; the same at every step of an attempt."""
        training = self.plans.config.training
        if training.steps:
            return training.steps
        if self.epoch >= training.epochs:  # training.epochs was larger when the checkpoint was written
            return self.parts[0].first_step - 1
        return self.parts[-1].end - 1 + self.plans.steps_from(self.epoch + 1)

    def save_plan(self) -> None:
        """Write the plan that is trained now into the run folder, unless it came from there. One rank calls it."""
        # Other nodes have mapped what is there: a file that takes its place would pull it away from them.
        if self.parts[-1] is not self._loaded:
            save_part(self.run_folder, self.parts, self.data)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {"step": self.step, "epoch": self.epoch, "parts": describe_parts(self.parts)}

    def restore(self, saved: Mapping[str, Any]) -> str:
        """Go to where `state` said; returns a line that tells of a change of ranks or levels, "" where none was.

        At the end of an epoch it stays there, under the plan that was trained. Raises ValueError where the plan files
        do not fit, or a sample that is left is longer than the levels allow.
        """
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.parts = load_parts(self.run_folder, self.epoch, saved["parts"], self.data)
        self._loaded = self.parts[-1]
        if not 0 <= self.step_in_plan <= self.plan.num_steps:
            raise ValueError(f"step {self.step} is none of the {self.plan.num_steps} steps of its plan")
        before, now = self.plan, self.plans
        same = before.world_size == now.world_size and before.costs == now.costs
        # Where a level keeps its parameters changes no pack: the plan goes on.
        if self.finished or (same and _planned(before.levels) == _planned(now.levels)):
            return ""
        return self._plan_anew()

    def _plan_anew(self) -> str:
        before, plans = self.plan, self.plans
        if self.step_in_plan == 0 and len(self.parts) == 1:
            self.parts = [Part(self.step + 1, plans.of(self.epoch))]
        else:
            rest = remainder(
                before,
                int(before.step_offsets[self.step_in_plan]),
                world_size=plans.world_size,
                levels=plans.levels,
                cost=plans.costs,
            )
            # A part of which no step was trained would have the same name as the one that follows.
            trained = self.parts if self.step_in_plan else self.parts[:-1]
            self.parts = [*trained, Part(self.step + 1, rest)]
        left, steps = len(self.plan.packs.ids), self.plan.num_steps
        return (
            f"with {_changes(before, self.plan)}: the {left:,} samples left of epoch {self.epoch} are planned anew, in "
            f"{steps} steps"
        )


def _planned(levels: Sequence[Level]) -> list[Level]:
    """The levels without what no plan depends on."""
    return [dataclasses.replace(level, reshard_after_forward=None) for level in levels]


def _changes(before: Plan, now: Plan) -> str:
    changes = []
    if now.world_size != before.world_size:
        changes.append(f"{now.world_size} rank{'s' if now.world_size > 1 else ''} instead of {before.world_size}")
    if now.levels != before.levels:
        changes.append(f"levels {_form(now.levels)} instead of {_form(before.levels)}")
    return " and ".join(changes) or "another cost model"


def _form(levels: Sequence[Level]) -> str:
    """As on the command line, with everything that a level has: the change may be in any of it."""
    return ",".join(format_level(level) for level in levels)
