"""The methods that are compared, planned on the same data and replayed on the same machine.

Owns the list: every method of packing/build.py, and the ones that are no plan of ours (FlexSP, HBP without balance).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from hbp_titan.packing import METHODS, CostModel, Level, Plan, build_plan
from hbp_titan.packing.arrays import IntArray, shuffled
from hbp_titan.simulation.flexsp import FlexSPPlan, plan_flexsp, replay_concurrent
from hbp_titan.simulation.simulate import Replay, replay
from hbp_titan.simulation.time_parts import TimeModel

EXTRA_METHODS = {
    "flexsp": "FlexSP-style, its own form: groups of differing degree side by side, not padded",
    "flexsp_iterations": "the same groups as iterations of one level each, as our runtime trains",
    "hbp_unbalanced": "hbp_paper, its packs put side by side at random",
}
DEFAULT_METHODS = (
    *("isf", "nopack", "random", "sorted", "flat_sorted"),
    *("flexsp", "flexsp_iterations", "hbp_unbalanced", "hbp_paper", "hbp"),
)


def check_methods(names: Sequence[str]) -> None:
    """ValueError that names the nearest method for one that there is not."""
    known = [*METHODS, *EXTRA_METHODS]
    for name in names:
        if name not in known:
            close = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, known, n=1))
            raise ValueError(f"method {name!r} is none of {', '.join(known)}{close}")


def replay_methods(
    lengths: IntArray, levels: Sequence[Level], model: TimeModel, names: Sequence[str], seed: int = 0
) -> dict[str, Replay]:
    """Each method's epoch over the same samples, by name in the given order."""
    check_methods(names)
    costs = [level_cost(model, level) for level in levels]
    replays: dict[str, Replay] = {}
    flexsp: FlexSPPlan | None = None
    for name in names:
        if name.startswith("flexsp"):
            flexsp = flexsp or plan_flexsp(lengths, flexsp_levels(levels[-1]), model, seed)
            replays[name] = replay_concurrent(flexsp, model) if name == "flexsp" else replay(flexsp.as_plan(), model)
            continue
        method = "hbp_paper" if name == "hbp_unbalanced" else name
        plan = build_plan(lengths, levels, model.world_size, method, seed, cost=costs)
        replays[name] = replay(without_balance(plan) if name == "hbp_unbalanced" else plan, model)
    return replays


def level_cost(model: TimeModel, level: Level) -> CostModel:
    """What balances the packs of a level: their seconds, less what all packs have in common.

    A pack is padded to the level's length, so its tokens count through the loss head alone. The tiles that a document
    wastes (time_parts.py) do not count: packs of a level differ by little in them.
    """
    time = model.level_time(level)
    return CostModel(time.per_loss_token, time.per_square)


def flexsp_levels(largest: Level) -> list[Level]:
    """A level for each degree 1, 2, 4 up to that of `largest`, of as many tokens a rank and the same checkpointing."""
    per_rank = largest.max_tokens // largest.cp_degree
    degrees = {2**i for i in range(largest.cp_degree.bit_length())} | {largest.cp_degree}
    return [
        dataclasses.replace(largest, max_tokens=per_rank * degree, cp_degree=degree)
        for degree in sorted(degrees)
        if largest.cp_degree % degree == 0
    ]


def without_balance(plan: Plan) -> Plan:
    """The same packs, put side by side at random within each level (the paper's row without balance batching)."""
    order = np.arange(plan.packs.num_rows)
    for level in range(len(plan.levels)):
        mine = np.flatnonzero(plan.pack_levels == level)
        order[mine] = mine[shuffled(len(mine), plan.seed, level)]
    return dataclasses.replace(plan, packs=plan.packs.take(order))
