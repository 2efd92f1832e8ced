"""How evenly tokens are spread over experts: counted over an optimizer step on all ranks.

Owns the counting and the figures of it in metrics.jsonl; what a forward counts is models/moe.py's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hbp_titan.models.decoder import Decoder


class ExpertLoad:
    """Adds up the copies that each expert of each layer got; for a model without experts every call does nothing.

    expert_parallel: ranks that share a layer's experts. table_interval: steps between whole tables, 0 for none.
    """

    def __init__(self, model: Decoder, expert_parallel: int, table_interval: int) -> None:
        self.model = model
        self.expert_parallel = expert_parallel
        self.table_interval = table_interval
        self.layers: list[int] = []
        self.counts_LE: Tensor | None = None

    def add(self) -> None:
        """Count the last forward of this rank, without waiting for the device."""
        counts = self.model.tokens_per_expert()
        if not counts:
            return
        self.layers = list(counts)
        counts_LE = torch.stack(list(counts.values())).long()
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE

    def take(self) -> Tensor | None:
        """What this rank added up since the last call, int64 [layers, experts] on its device; None without experts."""
        counts_LE, self.counts_LE = self.counts_LE, None
        return counts_LE

    def figures(self, counts: NDArray[np.int64], step: int) -> dict[str, Any]:
        """The figures of a step. counts: the sum over all ranks of what `take` returned, flat; empty without experts.

        expert_load: the most loaded expert as a multiple of its layer's mean, in the "worst" layer and in the "mean"
        of all; "idle", the experts of all layers without a token; "ranks", the most loaded rank as a multiple of the
        mean in the worst layer. tokens_per_expert: by layer, in every `table_interval`-th step. Padding counts: experts
        work on it as well.
        """
        if not len(counts):
            return {}
        table_LE = torch.from_numpy(counts).view(len(self.layers), -1)
        load = _over_mean(table_LE)
        figures = {
            "worst": load.max().item(),
            "mean": load.mean().item(),
            "idle": int((table_LE == 0).sum()),
            "ranks": _over_mean(table_LE.unflatten(1, (self.expert_parallel, -1)).sum(2)).max().item(),
        }
        record: dict[str, Any] = {"expert_load": figures}
        if self.table_interval and step % self.table_interval == 0:
            record["tokens_per_expert"] = dict(zip(self.layers, table_LE.tolist(), strict=True))
        return record


def _over_mean(counts_LN: Tensor) -> Tensor:
    return counts_LN.amax(1) / counts_LN.double().mean(1)
