"""LevelTime: the seconds of an iteration from what the packs of a plan hold, and the epoch that follows from them.

Owns the form of the time model that measurement, estimate, selection and simulation share. A level's batch has a
static shape, so padding costs what tokens cost: the linear layers, the collectives and the launches are one constant a
level. What differs between packs of a level is attention (squared document lengths), the loss head (trained tokens)
and, on a CPU, the number of documents. Data-parallel ranks wait for the slowest (paper section 2.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing import Plan

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LevelTime:
    """Seconds of one iteration on one data-parallel rank (all of its cp ranks together work on one pack).

    base: whatever the pack holds. per_loss_token: for each trained token. per_square: for each squared token of a
    document, summed over documents. per_document: for each document.
    """

    base: float
    per_loss_token: float = 0.0
    per_square: float = 0.0
    per_document: float = 0.0

    def seconds(self, loads: FloatArray) -> FloatArray:
        """Seconds of packs; loads: as from pack_loads, [n, 4] -> float64 [n]."""
        return loads @ np.array(dataclasses.astuple(self))


def pack_loads(plan: Plan) -> FloatArray:
    """What a LevelTime is multiplied with: 1, trained tokens, squared tokens and documents of each pack, [packs, 4]."""
    documents = np.diff(plan.packs.offsets)
    columns = [np.ones(len(documents)), plan.packs.sums(plan.loss_tokens), plan.pack_sum_sq, documents]
    return np.stack(columns, axis=1).astype(np.float64)


@dataclass(frozen=True)
class EpochTime:
    """Predicted seconds of each iteration of a plan: slowest and mean data-parallel rank, [iterations]; of all steps.

    steps: what the optimizer steps take beside their iterations.
    """

    slowest: FloatArray
    mean: FloatArray
    steps: float

    @property
    def seconds(self) -> float:
        """The whole epoch."""
        return float(self.slowest.sum()) + self.steps

    @property
    def idle(self) -> float:
        """Share of the iterations' rank time that is spent waiting for the slowest rank."""
        return 1.0 - float(self.mean.sum() / self.slowest.sum())


def predict_epoch(plan: Plan, times: Sequence[LevelTime], step_seconds: float = 0.0) -> EpochTime:
    """Predict an epoch; times: one a level, step_seconds: clipping, optimizer and bookkeeping of one step."""
    assert len(times) == len(plan.levels)
    loads, levels = pack_loads(plan), plan.pack_levels
    seconds = np.zeros(len(loads))
    for k, time in enumerate(times):
        seconds[levels == k] = time.seconds(loads[levels == k])
    starts = plan.pack_offsets[:-1]
    counts = np.diff(plan.pack_offsets)
    return EpochTime(
        slowest=np.maximum.reduceat(seconds, starts),
        mean=np.add.reduceat(seconds, starts) / counts,
        steps=step_seconds * plan.num_steps,
    )
