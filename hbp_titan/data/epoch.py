"""The plan of each epoch that a configuration asks for on a token store.

Owns the way from TOML keys to the planner's arguments, and the count of optimizer steps over all epochs.

EpochState: where a run is, and how it goes on from there on other ranks or levels.

Owns the step, the epoch and the parts of the epoch (data/epoch_parts.py), what of them a checkpoint keeps, and the
count of steps that are left. A run that goes on as it was follows its plan bit for bit. With another number of ranks
or other levels the samples that are left of the epoch are planned anew (packing/remainder.py); later epochs are planned
for the new ranks as a whole.

Parts of an epoch: the plans that it is trained by, one after the other, and their files in the run folder.

Owns the names and the links of the files in plan/. An epoch starts with a plan of all its samples. Where the run goes
on with other ranks or levels in its middle, what is left is planned anew, and that remainder is the next part:

    plan/epoch-0.safetensors            the whole epoch; trained up to step 20
    plan/epoch-0-step-21.safetensors    the rest, from step 21 on; trained up to step 33
    plan/epoch-0-step-34.safetensors    the rest of that

Steps count from 1 over the whole run. A part of a later resumption may have the same name as one whose steps were lost
with a kill, and takes its place: what counts is named by fingerprint, in the checkpoint and in the consumed record.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.packing import CostModel, Level, Plan, build_plan, replan
from hbp_titan.packing.cost import costs_per_level
from hbp_titan.packing.level import format_level
from hbp_titan.packing.plan import load_plan, save_plan


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
            level_order=packing.level_order,
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


@dataclass(frozen=True)
class PlanSegment:
    """A stretch of an epoch. first_step: of the run, the first one trained by `plan`."""

    first_step: int
    plan: Plan

    @property
    def end(self) -> int:
        """The step after its last one, where nothing cuts it short."""
        return self.first_step + self.plan.num_steps

    def finished_iterations(self, steps_done: int) -> int:
        """How many of its iterations are trained when the run has done `steps_done` steps."""
        return int(self.plan.step_offsets[min(max(steps_done - self.first_step + 1, 0), self.plan.num_steps)])


def plan_path(run_folder: Path, epoch: int, first_step: int | None = None) -> Path:
    """Where a run keeps the plan of an epoch, or its remainder from `first_step` on."""
    name = f"epoch-{epoch}" if first_step is None else f"epoch-{epoch}-step-{first_step}"
    return run_folder / "plan" / f"{name}.safetensors"


def describe_segments(parts: Sequence[PlanSegment]) -> list[dict[str, Any]]:
    """The parts as plain JSON values; their files hold the rest."""
    return [{"first_step": part.first_step, "plan": part.plan.fingerprint} for part in parts]


def save_segment(run_folder: Path, parts: Sequence[PlanSegment], data: str) -> None:
    """Write the last of an epoch's parts, in training order. data: the store's fingerprint."""
    part = parts[-1]
    first_step = part.first_step if len(parts) > 1 else None
    save_plan(part.plan, plan_path(run_folder, part.plan.epoch, first_step), inputs={"data": data})


def load_segments(run_folder: Path, epoch: int, described: Sequence[Mapping[str, Any]], data: str) -> list[PlanSegment]:
    """The parts of an epoch that `describe_segments` named, their arrays mapped into memory.

    data: the fingerprint that their store must have; fingerprints of plans are compared where `described` has them.
    Raises ValueError for a file that is missing, damaged, of other data or not the one that is meant.
    """
    parts = []
    for number, values in enumerate(described):
        path = plan_path(run_folder, epoch, values["first_step"] if number else None)
        try:
            plan = load_plan(path, expect={"data": data})
        except FileNotFoundError:
            raise ValueError(
                f"{path} is missing: the plan of the epoch's steps from {values['first_step']} on"
            ) from None
        if values.get("plan", plan.fingerprint) != plan.fingerprint:
            raise ValueError(
                f"{path} is not the plan that was trained: it has the fingerprint {plan.fingerprint[:16]}, "
                f"not {values['plan'][:16]}"
            )
        parts.append(PlanSegment(values["first_step"], plan))
    return parts


def planned_samples(parts: Sequence[PlanSegment], steps_done: int | None = None) -> NDArray[np.int64]:
    """The samples of an epoch as its parts have them, int64 [n]: of each what comes before the next, all of the last.

    steps_done: of the last part, what is trained up to this step alone.
    """
    last = parts[-1]
    ends = [part.finished_iterations(after.first_step - 1) for part, after in itertools.pairwise(parts)]
    ends.append(last.plan.num_iterations if steps_done is None else last.finished_iterations(steps_done))
    return np.concatenate([part.plan.samples_of(0, end) for part, end in zip(parts, ends, strict=True)])


class EpochState:
    """step: optimizer steps done since the start of the run. parts: of the current epoch; the last is trained."""

    def __init__(self, plans: EpochPlans, run_folder: Path, data: str) -> None:
        self.plans = plans
        self.run_folder = run_folder
        self.data = data
        self.step = 0
        self.epoch = 0
        self.parts = [PlanSegment(1, plans.of(0))]
        self._loaded: PlanSegment | None = None

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
        self.parts = [PlanSegment(self.step + 1, self.plans.of(self.epoch))]

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
            save_segment(self.run_folder, self.parts, self.data)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {"step": self.step, "epoch": self.epoch, "parts": describe_segments(self.parts)}

    def restore(self, saved: Mapping[str, Any]) -> str:
        """Go to where `state` said; returns a line that tells of a change of ranks or levels, "" where none was.

        At the end of an epoch it stays there, under the plan that was trained. Raises ValueError where the plan files
        do not fit, or a sample that is left is longer than the levels allow.
        """
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.parts = load_segments(self.run_folder, self.epoch, saved["parts"], self.data)
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
            self.parts = [PlanSegment(self.step + 1, plans.of(self.epoch))]
        else:
            rest = replan(
                before,
                int(before.step_offsets[self.step_in_plan]),
                world_size=plans.world_size,
                levels=plans.levels,
                cost=plans.costs,
            )
            # A part of which no step was trained would have the same name as the one that follows.
            trained = self.parts if self.step_in_plan else self.parts[:-1]
            self.parts = [*trained, PlanSegment(self.step + 1, rest)]
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
