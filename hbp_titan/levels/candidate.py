"""Candidate: a level that could be chosen, with what it costs.

Owns the form in which measurement (profile) and estimate hand levels to selection.
"""

from __future__ import annotations

from dataclasses import dataclass

from hbp_titan.levels.level_time import LevelTime
from hbp_titan.packing import Level


@dataclass(frozen=True)
class Candidate:
    """A complete level: length, cp degree and style, checkpoint policy and depth.

    time: of one iteration, None where memory does not suffice. peak_bytes: the most that a rank holds during an
    iteration (parameters, gradients and optimizer state with it), None where it was not found out.
    """

    level: Level
    time: LevelTime | None
    peak_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether memory suffices."""
        return self.time is not None
