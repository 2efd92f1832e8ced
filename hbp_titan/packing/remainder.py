"""Elastic remainder: what is left of an epoch, planned anew for another world size or other levels.

Owns the promise that a run which stops and goes on elsewhere trains each sample of the epoch exactly once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hbp_titan.packing.build import check_fit, place
from hbp_titan.packing.cost import CostModel, costs_per_level
from hbp_titan.packing.level import Level, check_levels
from hbp_titan.packing.plan import Plan


def remainder(
    plan: Plan,
    finished_iterations: int,
    *,
    world_size: int | None = None,
    levels: Sequence[Level] | None = None,
    cost: CostModel | Sequence[CostModel] | None = None,
    global_batch_tokens: int | None = None,
) -> Plan:
    """The plan of the samples that iterations finished_iterations, finished_iterations + 1, ... of `plan` hold.

    After s optimizer steps finished_iterations is plan.step_offsets[s]. What is not given stays as in `plan`;
    sample ids, lengths and loss tokens stay those of the whole data set, so remainders can follow one another.
    Curriculum steps that are left come first again.

    Raises ValueError where nothing is left, a remaining sample is longer than the new levels allow, the levels do
    not suit the world size, or the number of levels changes and `plan` has a cost model for each of its own.
    """
    if not 0 <= finished_iterations < plan.num_iterations:
        raise ValueError(
            f"{finished_iterations} finished iterations leave nothing of a plan with {plan.num_iterations}: "
            "start the next epoch"
        )
    levels = plan.levels if levels is None else tuple(levels)
    world_size = plan.world_size if world_size is None else world_size
    check_levels(levels, world_size)
    if cost is None:
        cost = plan.costs[0] if len(set(plan.costs)) == 1 else plan.costs
    # Packs lie in training order.
    left = np.sort(plan.packs.ids[plan.packs.offsets[plan.pack_offsets[finished_iterations]] :])
    check_fit(plan.lengths[left], left, levels[-1])
    curriculum_steps = plan.curriculum_steps
    if 0 < curriculum_steps < 1:
        curriculum_steps *= plan.num_steps
    finished_steps = int(plan.step_of_iteration[finished_iterations])
    unplaced = dataclasses.replace(
        plan,
        levels=levels,
        world_size=world_size,
        costs=costs_per_level(cost, len(levels)),
        curriculum_steps=max(0.0, float(round(curriculum_steps) - finished_steps)),
        global_batch_tokens=plan.global_batch_tokens if global_batch_tokens is None else global_batch_tokens,
    )
    return place(unplaced, left)
