"""Each level's heaviest pack once, before the first step.

Owns the order of these passes and their times. Trouble with memory shows here, in the first minute, and compilation
ends here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hbp_titan.data.loader import PlanDataset
from hbp_titan.distributed.world import all_reduce_values
from hbp_titan.levels.engine import Engine
from hbp_titan.packing.level import level_name


def first_passes(engine: Engine, batches: PlanDataset, validates: bool, at: Callable[[str], None]) -> list[float]:
    """Seconds of each level's first pass, the slowest rank's, 0 for a level without iterations; a collective.

    Leaves gradients that are to be thrown away. batches: of this rank; validates: whether levels are evaluated as well;
    at: is told what begins.
    """
    plan = batches.plan
    seconds = [0.0] * len(plan.levels)
    for level in reversed(range(len(plan.levels))):
        iteration = plan.heaviest_iteration(level)
        if iteration is not None:
            at(f"the first pass of level {level_name(plan.levels[level])}")
            started = time.perf_counter()
            engine.forward_backward(batches[iteration]).cpu()
            seconds[level] = time.perf_counter() - started
            if validates:
                engine.evaluate(batches[iteration])
    return all_reduce_values(seconds, "max", engine.device)
