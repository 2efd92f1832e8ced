"""Validation during training: the mean loss per token of held-out samples, exact for every world size.

Owns the passes over the plan of the held-out samples. They are packed like training data, so memory and kernels are
those of the levels; each token counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hbp_titan.components.step_stats import LossCollector, NamedSources
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import PackLoader
from hbp_titan.distributed.world import World
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name


class Validator:
    """Evaluates every sample of a plan once. store: that of the plan; loader: makes the loader of its batches.

    latest: what `run` returned last, None before.
    """

    def __init__(self, plan: Plan, store: NamedSources, loader: Callable[[], PackLoader], world: World) -> None:
        self.plan = plan
        self.loader = loader
        self.collector = LossCollector(store, len(plan.levels))
        self.world = world
        self.latest: dict[str, Any] | None = None

    def run(
        self, losses_of: Callable[[PackedBatch], Tensor], at: Callable[[str, str], None] = lambda where, level: None
    ) -> dict[str, Any]:
        """Mean loss per trained token: whole, by level, length band and source; every rank calls it and gets the same.

        losses_of: a batch (on the CPU) -> the sum of this rank's token losses of each of its samples, [S].
        at: called before each micro-batch with its place in the pass and its level, and before the final reduction.
        """
        plan = self.plan
        for iteration, batch in enumerate(self.loader()):
            level = level_name(plan.levels[batch.level])
            at(f"micro-batch {iteration} of {plan.num_iterations}, level {level}", level)
            self.collector.add(batch, losses_of(batch))
        at("the sum of losses", "sum")
        sums_G = self.collector.pop()
        dist.all_reduce(sums_G)
        means = self.collector.means(sums_G.tolist(), plan, 0, plan.num_iterations)
        self.latest = {
            **means.whole.as_dict(),
            "by_level": {level_name(plan.levels[k]): mean.as_dict() for k, mean in means.by_level.items()},
            "by_length": {str(border): mean.as_dict() for border, mean in means.by_length.items()},
            "by_source": {name: mean.as_dict() for name, mean in means.by_source.items()},
        }
        return self.latest
