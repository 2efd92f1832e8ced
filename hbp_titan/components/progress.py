"""Progress: how far a run is, beside tensors, and how it goes on from there.

Owns what state.json says of it: position in the data (data/position.py), course of the learning rate (lr_course.py) and
the settings that have to stay (continuation.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hbp_titan.components.continuation import check_lasting, lasting_settings
from hbp_titan.components.lr_course import LRCourse
from hbp_titan.config import JobConfig
from hbp_titan.data.consumed import FOLDER, attempt_folders
from hbp_titan.data.planning import EpochPlans
from hbp_titan.data.position import Position
from hbp_titan.models.decoder import ModelArgs


class Progress:
    """A run at its start, until `restore`. resumed: a line that tells of that, "" before. data: the fingerprint."""

    def __init__(self, config: JobConfig, args: ModelArgs, plans: EpochPlans, data: str) -> None:
        self.config = config
        self.position = Position(plans, config.dump_folder, data)
        total_steps = self.position.total_steps()
        self.course = LRCourse(total_steps, total_steps)
        self.lasting = lasting_settings(config, args, data)
        self.resumed = ""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.course.total

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.config.optimizer.lr * self.course.factor(self.config.lr_scheduler, self.position.step)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {**self.position.state(), "lr_course": dataclasses.asdict(self.course), "lasting": self.lasting}

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise ValueError where the checkpoint at `path` is of a run with other settings."""
        check_lasting(state.get("lasting", {}), self.lasting, path)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` said; ValueError where the run folder does not hold what was trained up to there."""
        mend = "restore that, or name another --job.dump_folder"
        try:
            changed = self.position.restore(state)
        except ValueError as error:
            raise ValueError(f"cannot resume: {error}; {mend}") from None
        step, consumed = self.position.step, self.config.dump_folder / FOLDER
        if not attempt_folders(consumed):
            raise ValueError(f"cannot resume: {consumed} does not say what steps 1 to {step} trained; {mend}")
        self.course = LRCourse(**state["lr_course"]).going_on(step, self.position.total_steps())
        self.resumed = f"resumed from step {step}" + (f", {changed}" if changed else "")
