"""Validation during training: the mean loss per token of held-out samples, exact for every world size.

Held-out samples are packed like training data, so memory and kernels are those of the levels; each token counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from hbp_titan.components.step_stats import LossSums, NamedSources
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import PackLoader
from hbp_titan.distributed.world import World
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name


class Validator:
    """Evaluates each sample of a plan once. loader: makes the loader of its batches; latest: last result of `run`."""

    def __init__(self, plan: Plan, store: NamedSources, loader: Callable[[], PackLoader], world: World) -> None:
        self.plan = plan
        self.loader = loader
        self.losses = LossSums(store, len(plan.levels))
        self.world = world
        self.latest: dict[str, Any] | None = None

    def run(
        self, phase: str, losses_of: Callable[[PackedBatch], Tensor], heartbeat: Callable[..., None]
    ) -> dict[str, Any]:
        """Return the mean loss per trained token: whole, by level, length band and source. A collective.

        phase: when it runs, as in "after step 7". losses_of: a batch (on the CPU) -> this rank's sum of token losses
        of each of its samples, [S]. heartbeat: called with what begins, and with the kind of it if it is not data.
        """
        plan, phase = self.plan, f"validation {phase}"
        heartbeat(f"{phase}, data")
        for micro_batch, batch in enumerate(self.loader()):
            level = level_name(plan.levels[batch.level])
            where = f"{phase}, micro-batch {micro_batch} of {plan.num_iterations}, level {level}"
            heartbeat(where, kind=f"validation {level}")
            self.losses.add(batch, losses_of(batch))
        heartbeat(f"{phase}, sum of losses", kind="validation sum")
        # Once at the end: sums are on the device, and no micro-batch has to wait for another rank's.
        sums_G = self.losses.pop()
        dist.all_reduce(sums_G)
        means = self.losses.means(sums_G.tolist(), plan, 0, plan.num_iterations)
        self.latest = {
            **means.whole.as_dict(),
            "by_level": {level_name(plan.levels[k]): mean.as_dict() for k, mean in means.by_level.items()},
            "by_length": {str(end): mean.as_dict() for end, mean in means.by_length.items()},
            "by_source": {name: mean.as_dict() for name, mean in means.by_source.items()},
        }
        return self.latest
