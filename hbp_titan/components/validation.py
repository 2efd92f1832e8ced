"""Validation during training: the mean loss per token of held-out samples, exact for every world size.

Owns the plan of the held-out samples and the sums over it. They are packed like training data, so memory and kernels
are those of the levels; each token counts once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbp_titan.components.summary import level_name
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import PlanDataset
from hbp_titan.distributed.world import World, all_reduce_values


class Validator:
    """Evaluates every sample of a plan once."""

    def __init__(self, batches: PlanDataset, world: World) -> None:
        self.plan = batches.plan
        self.batches = batches
        self.world = world

    def run(self, loss_sum_of: Callable[[PackedBatch], Tensor]) -> dict[str, float]:
        """Mean loss per loss token, whole and by level; every rank calls it and gets the same.

        loss_sum_of: a batch (on the CPU) -> the sum of this rank's token losses.
        """
        levels = self.plan.levels
        losses = torch.zeros(len(levels), dtype=torch.float64)
        for iteration in range(self.plan.num_iterations):
            batch = self.batches[iteration]
            losses[batch.level] += loss_sum_of(batch).item()
        losses = torch.tensor(all_reduce_values(losses.tolist(), "sum", self.world.device))
        counts = [0] * len(levels)
        for iteration in range(self.plan.num_iterations):
            ids = self.plan.samples_of(iteration, iteration + 1)
            counts[self.plan.level_of_iteration[iteration]] += int(self.plan.loss_tokens[ids].sum())
        means = {"loss": float(losses.sum()) / max(sum(counts), 1)}
        for level, loss, count in zip(levels, losses.tolist(), counts, strict=True):
            if count:
                means[f"loss {level_name(level)}"] = loss / count
        return means
