"""One machine's coefficients for all levels, fitted to measured iterations of a few: times of levels that never ran.

Owns the form across levels: a rank's share of a pack costs by its tokens (padding with them), its trained tokens, its
squared document lengths and its documents, each divided by the cp degree; an iteration costs a constant; and what cp
ranks exchange costs by the tokens of a shard. So the coefficients say nothing of styles or recomputation: fit and
predict levels that share those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.levels.level_time import FloatArray, LevelTime
from hbp_titan.packing import Level
from hbp_titan.selection.time_fit import nonnegative_least_squares


@dataclass(frozen=True)
class MachineTimes:
    """Seconds: constant of an iteration; the others for each token, trained token, squared token and document of a
    rank's share, and exchange for each token of a shard where cp_degree > 1."""

    constant: float
    per_token: float
    per_loss_token: float
    per_square: float
    per_document: float
    exchange: float

    def level_time(self, level: Level) -> LevelTime:
        """What an iteration of `level` takes."""
        cp_degree = level.cp_degree
        per_token = self.per_token + (self.exchange if cp_degree > 1 else 0.0)
        return LevelTime(
            base=self.constant + per_token * level.max_tokens / cp_degree,
            per_loss_token=self.per_loss_token / cp_degree,
            per_square=self.per_square / cp_degree,
            per_document=self.per_document / cp_degree,
        )


def fit_machine(levels: Sequence[Level], loads: Sequence[FloatArray], seconds: FloatArray) -> MachineTimes:
    """Least squares of the relative error, no coefficient below 0.

    levels, seconds: of each iteration, [n]. loads: of the packs of each, [ranks, 4] as from pack_loads. The slowest
    rank decides an iteration, and which one it is depends on the coefficients: fit and choose in turn.
    """
    columns = [_columns(level, packs) for level, packs in zip(levels, loads, strict=True)]
    slowest = [int(packs[:, 3].argmax()) for packs in columns]
    for _ in range(20):
        rows = np.stack([packs[s] for packs, s in zip(columns, slowest, strict=True)])
        found = nonnegative_least_squares(rows / seconds[:, None], np.ones(len(seconds)))
        chosen = [int((packs @ found).argmax()) for packs in columns]
        if chosen == slowest:
            break
        slowest = chosen
    return MachineTimes(*found.tolist())


def _columns(level: Level, loads: FloatArray) -> FloatArray:
    """What MachineTimes' coefficients are multiplied with, [ranks, 6]."""
    ones, tokens = np.ones(len(loads)), level.max_tokens / level.cp_degree
    exchanged = tokens if level.cp_degree > 1 else 0.0
    return np.column_stack([ones, tokens * ones, loads[:, 1:] / level.cp_degree, exchanged * ones])
