"""The plans of an epoch, and where a run is in it.

Owns the planner's arguments for a configuration, the files in plan/, and the state that a checkpoint keeps. A run that
resumes with its settings follows its plan bit for bit. If the number of ranks or the levels change within an epoch, the
remaining samples are replanned: an epoch is trained by one or more plan segments, later epochs by one plan each.

    plan/epoch-0.safetensors            the whole epoch; trained up to step 20
    plan/epoch-0-step-21.safetensors    the remainder, from step 21; trained up to step 33
    plan/epoch-0-step-34.safetensors    the remainder of that

Steps count from 1 over the whole run.
"""

from __future__ import annotations

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
from hbp_titan.packing.level import format_level, one_at_a_time
from hbp_titan.packing.plan import load_plan, save_plan


class SampleLengths(Protocol):
    """What a plan needs to know of a token store."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample, [num_samples]."""

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Trained tokens of each sample, [num_samples]."""


class EpochPlans:
    """The plan of each epoch, built when first asked for; the latest two are kept."""

    def __init__(
        self, config: JobConfig, store: SampleLengths, world_size: int, cost: CostModel | tuple[CostModel, ...]
    ) -> None:
        self.config = config
        self.store = store
        self.world_size = world_size
        self.cost = cost
        # Two: the current epoch's, and the next one's for the count of steps. Plans of a million samples are large.
        self.plan_for = lru_cache(maxsize=2)(self._build)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of every plan."""
        return tuple(self.config.levels)

    @property
    def costs(self) -> tuple[CostModel, ...]:
        """The cost model of each level."""
        return costs_per_level(self.cost, len(self.config.levels))

    def build(self, method: str, epoch: int) -> Plan:
        """Build the plan of `epoch` by `method`: a pure function of configuration, data and world size.

        Only the configured method has levels side by side; others, for comparison, train one level at a time.
        """
        packing = self.config.packing
        compared = packing.level_order == "parallel" and method != packing.method
        used = one_at_a_time(self.levels) if compared else range(len(self.levels))
        return build_plan(
            self.store.lengths,
            [self.levels[k] for k in used],
            self.world_size,
            method=method,
            seed=self.config.seed_of("packing"),
            loss_tokens=self.store.loss_tokens,
            cost=[self.costs[k] for k in used],
            global_batch_tokens=self.config.training.global_batch_tokens,
            level_order="alternate" if compared else packing.level_order,
            curriculum_steps=packing.curriculum_steps,
            epoch=epoch,
        )

    def _build(self, epoch: int) -> Plan:
        return self.build(self.config.packing.method, epoch)

    def total_steps(self) -> int:
        """Return the optimizer steps of a run that is never stopped, or resumes on the same ranks and levels."""
        return self.config.training.steps or self.steps_from(0)

    def steps_from(self, epoch: int) -> int:
        """Return the optimizer steps of `epoch` and all later epochs, each planned as a whole."""
        return sum(self.plan_for(later).num_steps for later in range(epoch, self.config.training.epochs))


@dataclass(frozen=True)
class PlanSegment:
    """The steps of an epoch that one plan trains; first_step: step of the run."""

    first_step: int
    plan: Plan

    @property
    def end(self) -> int:
        """The step after the plan's last one, if no later segment replaces it earlier."""
        return self.first_step + self.plan.num_steps

    def finished_micro_batches(self, steps_done: int) -> int:
        """Return how many micro-batches of the plan are trained after `steps_done` steps of the run."""
        return int(self.plan.step_offsets[min(max(steps_done - self.first_step + 1, 0), self.plan.num_steps)])


def plan_path(run_folder: Path, epoch: int, first_step: int | None = None) -> Path:
    """Return the file of an epoch's plan, or of its remainder from `first_step`."""
    name = f"epoch-{epoch}" if first_step is None else f"epoch-{epoch}-step-{first_step}"
    return run_folder / "plan" / f"{name}.safetensors"


def describe_segments(segments: Sequence[PlanSegment]) -> list[dict[str, Any]]:
    """Return what identifies the segments, as plain JSON values; their files hold the rest.

    The fingerprint matters: a segment of a later resumption may have the file name of one whose steps were lost in a
    kill, and replaces its file.
    """
    return [{"first_step": segment.first_step, "plan": segment.plan.fingerprint} for segment in segments]


def save_segment(run_folder: Path, segments: Sequence[PlanSegment], data: str) -> None:
    """Write the last of an epoch's segments, given in training order. data: the store's fingerprint."""
    last = segments[-1]
    first_step = last.first_step if len(segments) > 1 else None
    save_plan(last.plan, plan_path(run_folder, last.plan.epoch, first_step), inputs={"data": data})


def load_segments(run_folder: Path, epoch: int, described: Sequence[Mapping[str, Any]], data: str) -> list[PlanSegment]:
    """Load the segments of an epoch that `describe_segments` described, their arrays mapped into memory.

    data: fingerprint of the store. Fingerprints of plans are compared if `described` has them.
    Raises ValueError for a file that is missing, damaged, of other data or not the plan that was described.
    """
    segments = []
    for number, values in enumerate(described):
        path = plan_path(run_folder, epoch, values["first_step"] if number else None)
        try:
            plan = load_plan(path, expect={"data": data})
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; it holds the epoch's steps from {values['first_step']}") from None
        if values.get("plan", plan.fingerprint) != plan.fingerprint:
            raise ValueError(
                f"{path}: not the plan that was trained: its fingerprint is {plan.fingerprint[:16]}, "
                f"expected {values['plan'][:16]}"
            )
        segments.append(PlanSegment(values["first_step"], plan))
    return segments


def planned_samples(segments: Sequence[PlanSegment], steps_done: int | None = None) -> NDArray[np.int64]:
    """Return the samples that the segments of an epoch train, int64 [n]; each segment counts up to the next one.

    steps_done: if given, the last segment counts up to this step of the run only.
    """
    last = segments[-1]
    ends = [segment.finished_micro_batches(after.first_step - 1) for segment, after in itertools.pairwise(segments)]
    ends.append(last.plan.num_iterations if steps_done is None else last.finished_micro_batches(steps_done))
    return np.concatenate([segment.plan.samples_of(0, end) for segment, end in zip(segments, ends, strict=True)])


class EpochState:
    """How far a run is.

    step: optimizer steps done since the start of the run. segments: of the current epoch; the last is being trained.
    data: the store's fingerprint.
    """

    def __init__(self, plans: EpochPlans, run_folder: Path, data: str) -> None:
        self.plans = plans
        self.run_folder = run_folder
        self.data = data
        self.step = 0
        self.epoch = 0
        self.segments = [PlanSegment(1, plans.plan_for(0))]
        self._loaded: PlanSegment | None = None

    @property
    def plan(self) -> Plan:
        """The plan that is being trained."""
        return self.segments[-1].plan

    @property
    def step_in_plan(self) -> int:
        """Steps of `plan` that are done."""
        return self.step - self.segments[-1].first_step + 1

    @property
    def finished(self) -> bool:
        """Whether the epoch is trained to its end."""
        return self.step_in_plan == self.plan.num_steps

    def next_epoch(self) -> None:
        """Move to the start of the next epoch; must not be called at the end of the run."""
        training = self.plans.config.training
        # total_steps would not count the steps of an epoch that the configuration does not have.
        assert training.steps or self.epoch + 1 < training.epochs, f"epoch {self.epoch} is the last"
        self.epoch += 1
        self.segments = [PlanSegment(self.step + 1, self.plans.plan_for(self.epoch))]

    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run, done ones included; constant between two starts."""
        training = self.plans.config.training
        if training.steps:
            return training.steps
        if self.epoch >= training.epochs:  # training.epochs was larger when the checkpoint was written
            return self.segments[0].first_step - 1
        return self.segments[-1].end - 1 + self.plans.steps_from(self.epoch + 1)

    def save_plan(self) -> None:
        """Write the current plan into the run folder, unless it was loaded from there. Only one rank calls it."""
        # Other nodes have mapped the existing file: replacing it would invalidate their memory maps.
        if self.segments[-1] is not self._loaded:
            save_segment(self.run_folder, self.segments, self.data)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain JSON values."""
        return {"step": self.step, "epoch": self.epoch, "segments": describe_segments(self.segments)}

    def restore(self, saved: Mapping[str, Any]) -> str:
        """Move to a saved state; returns a line about changed ranks or levels, "" if there is no change.

        At the end of an epoch it stays there, with the plan that was trained. Raises ValueError if the plan files do
        not match, or a remaining sample is longer than the levels allow.
        """
        self.step, self.epoch = saved["step"], saved["epoch"]
        self.segments = load_segments(self.run_folder, self.epoch, saved["segments"], self.data)
        self._loaded = self.segments[-1]
        if not 0 <= self.step_in_plan <= self.plan.num_steps:
            raise ValueError(f"step {self.step} is not one of the {self.plan.num_steps} steps of its plan")
        before, now = self.plan, self.plans
        # A changed seed or method does not replan: resume_invariants refuses those.
        same = before.world_size == now.world_size and before.costs == now.costs
        if self.finished or (same and _plan_inputs(before.levels) == _plan_inputs(now.levels)):
            return ""
        return self._replan()

    def _replan(self) -> str:
        before, plans = self.plan, self.plans
        if self.step_in_plan == 0 and len(self.segments) == 1:
            self.segments = [PlanSegment(self.step + 1, plans.plan_for(self.epoch))]
        else:
            remainder = replan(
                before,
                int(before.step_offsets[self.step_in_plan]),
                world_size=plans.world_size,
                levels=plans.levels,
                cost=plans.costs,
            )
            # A segment without a trained step would have the same file name as the one that follows it.
            trained = self.segments if self.step_in_plan else self.segments[:-1]
            self.segments = [*trained, PlanSegment(self.step + 1, remainder)]
        return (
            f"with {_changes(before, self.plan)}: replanned the remaining {len(self.plan.packs.ids):,} samples of "
            f"epoch {self.epoch} into {self.plan.num_steps} steps"
        )


def _plan_inputs(levels: Sequence[Level]) -> list[tuple[int, int, str]]:
    """Return what plans and batches depend on; the other settings of a level decide about memory alone."""
    return [(level.max_tokens, level.cp_degree, level.cp_style) for level in levels]


def _changes(before: Plan, now: Plan) -> str:
    changes = []
    if now.world_size != before.world_size:
        changes.append(f"{now.world_size} rank{'s' if now.world_size > 1 else ''} instead of {before.world_size}")
    if now.levels != before.levels:
        # In full, as on the command line: any setting of a level may have changed.
        new, old = (",".join(map(format_level, levels)) for levels in (now.levels, before.levels))
        changes.append(f"levels {new} instead of {old}")
    return " and ".join(changes) or "another cost model"
