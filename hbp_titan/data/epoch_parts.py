"""Parts of an epoch: the plans that it is trained by, one after the other, and their files in the run folder.

Owns the names and the links of the files in plan/. An epoch starts with a plan of all its samples. Where the run goes
on with other ranks or levels in its middle, what is left is planned anew, and that remainder is the next part:

    plan/epoch-0.safetensors            the whole epoch; trained up to step 20
    plan/epoch-0-step-21.safetensors    the rest, from step 21 on; trained up to step 33
    plan/epoch-0-step-34.safetensors    the rest of that

Steps count from 1 over the whole run. A part of a later resumption may have the same name as one whose steps were lost
with a kill, and takes its place: what counts is named by fingerprint, in the checkpoint and in the consumed record.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing import Plan
from hbp_titan.packing.plan_file import load_plan, save_plan


@dataclass(frozen=True)
class Part:
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


def describe_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The parts as plain JSON values; their files hold the rest."""
    return [{"first_step": part.first_step, "plan": part.plan.fingerprint} for part in parts]


def save_part(run_folder: Path, parts: Sequence[Part], data: str) -> None:
    """Write the last of an epoch's parts, in training order. data: the store's fingerprint."""
    part = parts[-1]
    first_step = part.first_step if len(parts) > 1 else None
    save_plan(part.plan, plan_path(run_folder, part.plan.epoch, first_step), inputs={"data": data})


def load_parts(run_folder: Path, epoch: int, described: Sequence[Mapping[str, Any]], data: str) -> list[Part]:
    """The parts of an epoch that `describe_parts` named, their arrays mapped into memory.

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
        parts.append(Part(values["first_step"], plan))
    return parts


def planned_samples(parts: Sequence[Part], steps_done: int | None = None) -> NDArray[np.int64]:
    """The samples of an epoch as its parts have them, int64 [n]: of each what comes before the next, all of the last.

    steps_done: of the last part, what is trained up to this step alone.
    """
    last = parts[-1]
    ends = [part.finished_iterations(after.first_step - 1) for part, after in itertools.pairwise(parts)]
    ends.append(last.plan.num_iterations if steps_done is None else last.finished_iterations(steps_done))
    return np.concatenate([part.plan.samples_of(0, end) for part, end in zip(parts, ends, strict=True)])
