"""How a step's time was lived: what its iterations took, and how much of that ranks spent waiting.

Owns the definitions of time imbalance and idle share from what the ranks measured (levels/work_clock.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepTimes:
    """Seconds. wall, work: of each iteration, the mean of the ranks; slowest: the most work of any rank. They are empty
    where nothing was measured. data_wait: the longest wait of any rank for its batches. whole: of the step."""

    wall: Sequence[float]
    work: Sequence[float]
    slowest: Sequence[float]
    data_wait: float
    whole: float

    @property
    def measured(self) -> bool:
        """Whether the iterations were."""
        return len(self.wall) > 0

    @property
    def waiting(self) -> NDArray[np.float64]:
        """Seconds of each iteration that a rank waited for the slowest one, in the mean; 0 where nothing was measured.

        Ranks meet in every iteration, so all of them take as long as the one with the most work.
        """
        return np.array(self.wall) * (1 - np.array(self.work) / np.maximum(self.slowest, 1e-12))

    @property
    def imbalance(self) -> float | None:
        """Time imbalance as lived: share of the slowest ranks' work by which the mean rank had less; 0 is best."""
        return 1 - sum(self.work) / max(sum(self.slowest), 1e-12) if self.measured else None

    @property
    def idle_share(self) -> float | None:
        """Share of the ranks' time in which they waited, for a slower rank or for data."""
        return (float(self.waiting.sum()) + self.data_wait) / self.whole if self.measured else None

    def shares(self, of: NDArray[np.bool_]) -> tuple[float, float]:
        """(seconds, seconds of waiting) of the iterations `of`, bool [iterations]: their share of the whole step.

        What lies outside of iterations (data, clipping, update) is shared in proportion to their time, or to their
        number where nothing was measured.
        """
        if not self.measured:
            return self.whole * float(of.mean()), 0.0
        wall = np.array(self.wall)
        share = float(wall[of].sum() / wall.sum())
        return self.whole * share, float(self.waiting[of].sum()) + self.data_wait * share
