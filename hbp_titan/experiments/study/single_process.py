"""One process that emulates several ranks: it trains the packs of their plan one after another.

    python -m hbp_titan.experiments.study.single_process --ranks 4 --job.config_file X.toml --levels 512:1,2048:2

Owns the conversion of the ranks' plan to one of a single process. Its optimizer steps have the same packs in the same
order, so loss and gradient of each step are those of the ranks (scripts/verify_equivalence.py), and each token has the
same weight under every normalization. A study of losses then needs one CPU core or GPU instead of a cluster; times and
balance are those of one process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys

import numpy as np

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.errors import exit_on_user_error
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import check_levels
from hbp_titan.train import Trainer


def single_process_plan(plan: Plan) -> Plan:
    """Return the plan of one process that trains the packs of all ranks of `plan`, step by step."""
    # Without the empty packs, which ranks need only to take part in collectives.
    filled = np.flatnonzero(plan.packs.counts)
    return dataclasses.replace(
        plan,
        levels=_without_cp(plan.levels),
        world_size=1,
        packs=plan.packs.take(filled),
        pack_levels=plan.pack_levels[filled],
        step_offsets=np.searchsorted(filled, plan.pack_offsets[plan.step_offsets]),
    )


def _without_cp(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    return tuple(dataclasses.replace(level, cp_degree=1) for level in levels)


class SingleProcessPlans(EpochPlans):
    """The plans of several ranks, converted to one process."""

    def __init__(self, plans: EpochPlans, config: JobConfig) -> None:
        super().__init__(config, plans.store, 1, plans.cost)
        self.plans = plans

    def build(self, method: str, epoch: int) -> Plan:
        return single_process_plan(self.plans.build(method, epoch))


class SingleProcessTrainer(Trainer):
    """A Trainer on one rank whose plans are made for `ranks`; config.levels are the levels of those ranks."""

    def __init__(self, config: JobConfig, world: World, ranks: int) -> None:
        check_levels(config.levels, ranks)
        self.ranks, self.ranks_config = ranks, config
        single = copy.deepcopy(config)
        single.levels = list(_without_cp(tuple(config.levels)))
        # The comparison of methods is meaningless without ranks to balance.
        single.packing.print_comparison = False
        super().__init__(single, world)

    def _make_plans(self) -> None:
        super()._make_plans()
        # The cost model depends on the architecture alone; levels and world size are those of the ranks.
        plans = EpochPlans(self.ranks_config, self.store, self.ranks, self.plans.cost)
        self.plans = SingleProcessPlans(plans, self.config)
        self.oom_advice.plan = self.plans.plan_for(0)
        self.shapes = self.shapes.enlarged_for(self.plans.plan_for(0))


def main(argv: list[str]) -> None:
    """Train as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks that plans are made for")
    options, overrides = parser.parse_known_args(argv)
    config = exit_on_user_error(lambda: load_config(overrides))
    world = init_world(config.parallelism.init_timeout_seconds)
    trainer = exit_on_user_error(lambda: SingleProcessTrainer(config, world, options.ranks))
    trainer.train()
    close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
