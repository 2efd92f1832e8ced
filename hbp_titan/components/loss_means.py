"""Where the loss lies: mean losses per trained token by level, length band and source, over all ranks.

Owns the groups and the exact means over them: each trained token counts once, whatever rank, pack or iteration it was
in. Sums are float64; counts come from the plan, so that no rank asks another for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.data.batch import PackedBatch
from hbp_titan.packing import Plan
from hbp_titan.packing.bands import band_of


class NamedSources(Protocol):
    """What is needed of a token store. lengths: int64 [N]; sources: uint16 [N], index into source_names."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def sources(self) -> NDArray[np.uint16]: ...

    @property
    def source_names(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Mean:
    """loss: per trained token, in nats."""

    loss: float
    trained_tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For metrics.jsonl; a loss that is not finite is None."""
        return {"loss": finite(self.loss), "trained_tokens": self.trained_tokens}


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class LossMeans:
    """Groups that trained nothing are left out. by_level: by its index; by_length: by the upper border of the band."""

    whole: Mean
    by_level: dict[int, Mean]
    by_length: dict[int, Mean]
    by_source: dict[str, Mean]


class LossCollector:
    """`add` every iteration, `take` this rank's sums, reduce them over the ranks, and ask for their `means`."""

    def __init__(self, store: NamedSources, num_levels: int) -> None:
        self.source_names = store.source_names
        self.sources = store.sources
        self.num_levels = num_levels
        self.borders, bands = np.unique(band_of(store.lengths), return_inverse=True)
        self.bands = bands.astype(np.uint8)
        self._sums_G: Tensor | None = None

    def add(self, batch: PackedBatch, losses_S: Tensor) -> None:
        """Add an iteration; waits for nothing. losses_S: [S], what this rank has of each of batch.sample_ids."""
        ids = batch.sample_ids
        starts = np.cumsum([0, *self._sizes()[:-1]])
        groups = self._groups(np.full(len(ids), batch.level), ids)
        places = np.concatenate([group + start for group, start in zip(groups, starts, strict=True)])
        if self._sums_G is None:
            self._sums_G = torch.zeros(sum(self._sizes()), dtype=torch.float64, device=losses_S.device)
        index = torch.from_numpy(places).to(losses_S.device, non_blocking=True)
        self._sums_G.index_add_(0, index, losses_S.double().repeat(len(groups)))

    def take(self) -> Tensor:
        """Sums since the last call by level, then by band, then by source: float64 on the device."""
        sums_G, self._sums_G = self._sums_G, None
        assert sums_G is not None, "add comes first"
        return sums_G

    def by_level(self, sums: Sequence[float]) -> list[float]:
        """The first part of such sums."""
        return list(sums[: self.num_levels])

    def means(self, sums: Sequence[float], plan: Plan, first: int, last: int) -> LossMeans:
        """The means of iterations first to last - 1 of `plan`; sums: as from `take`, over all ranks."""
        ids = plan.samples_of(first, last)
        counts = plan.loss_tokens[ids]
        per_pack = plan.packs.counts[plan.pack_offsets[first] : plan.pack_offsets[last]]
        levels = np.repeat(plan.pack_levels[plan.pack_offsets[first] : plan.pack_offsets[last]], per_pack)
        parts = np.split(np.array(sums), np.cumsum(self._sizes())[:-1])
        means = []
        for group, size, part in zip(self._groups(levels, ids), self._sizes(), parts, strict=True):
            trained = np.bincount(group, counts, size).astype(np.int64)
            pairs = enumerate(zip(part.tolist(), trained.tolist(), strict=True))
            means.append({k: Mean(loss / count, count) for k, (loss, count) in pairs if count})
        by_level, by_band, by_source = means
        trained_tokens = int(counts.sum())
        return LossMeans(
            whole=Mean(float(parts[0].sum()) / max(trained_tokens, 1), trained_tokens),
            by_level=by_level,
            by_length={int(self.borders[k]): mean for k, mean in by_band.items()},
            by_source={self.source_names[k]: mean for k, mean in by_source.items()},
        )

    def _groups(self, levels: NDArray[np.int64], ids: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The level, band and source of each sample."""
        return [levels, self.bands[ids].astype(np.int64), self.sources[ids].astype(np.int64)]

    def _sizes(self) -> tuple[int, int, int]:
        return self.num_levels, len(self.borders), len(self.source_names)
