"""One process that trains what several ranks would: the packs of their plan, one after another.

    python -m hbp_titan.experiments.study.in_turn --ranks 4 --job.config_file X.toml --levels 512:1,2048:2

Owns the way from the plan of so many ranks to that of one process: its optimizer steps hold the same packs in the same
order, so objective and gradient of each step are those of the ranks (scripts/verify_equivalence.py), and every
normalizer gives each token the same weight. What a study of losses needs of a cluster then fits one CPU core or GPU.
Times, and all that is measured of balance, are those of one process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys

import numpy as np

from hbp_titan.config import JobConfig, load_config
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import World, close_world, init_world
from hbp_titan.errors import exit_on_user_error
from hbp_titan.packing import CostModel, Level, Plan
from hbp_titan.packing.level import check_levels
from hbp_titan.train import Trainer


def in_turn(plan: Plan) -> Plan:
    """The plan of one process that trains, step by step, the packs that the ranks of `plan` have side by side.

    Empty packs, with which a rank only keeps the others company, are left out.
    """
    filled = np.flatnonzero(plan.packs.counts)
    return dataclasses.replace(
        plan,
        levels=_of_one(plan.levels),
        world_size=1,
        packs=plan.packs.take(filled),
        level_of_iteration=plan.pack_levels[filled],
        step_offsets=np.searchsorted(filled, plan.pack_offsets[plan.step_offsets]),
    )


def _of_one(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    return tuple(dataclasses.replace(level, cp_degree=1) for level in levels)


class PlansInTurn(EpochPlans):
    """The plans of `planned`, each for one process."""

    def __init__(self, planned: EpochPlans, config: JobConfig) -> None:
        super().__init__(config, planned.store, 1, planned.cost)
        self.planned = planned

    def build(self, method: str, epoch: int) -> Plan:
        """The plan of `epoch` by `method`, made for the ranks of `planned`."""
        return in_turn(self.planned.build(method, epoch))


class SingleProcessTrainer(Trainer):
    """A Trainer of a world of one rank whose plans are made for `ranks`. config.levels: of those ranks."""

    def __init__(self, config: JobConfig, world: World, ranks: int) -> None:
        check_levels(config.levels, ranks)
        alone = copy.deepcopy(config)
        alone.levels = list(_of_one(tuple(config.levels)))
        # The table of methods would be one of plans without ranks to balance.
        alone.packing.print_comparison = False

        def plans(one: JobConfig, store: TokenStore, _: int, cost: CostModel) -> EpochPlans:
            return PlansInTurn(EpochPlans(config, store, ranks, cost), one)

        super().__init__(alone, world, plans=plans)


def main(argv: list[str]) -> None:
    """Train as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, required=True, help="that plans are made for")
    options, overrides = parser.parse_known_args(argv)
    config = exit_on_user_error(lambda: load_config(overrides))
    world = init_world(config.parallelism.init_timeout_seconds)
    trainer = exit_on_user_error(lambda: SingleProcessTrainer(config, world, options.ranks))
    trainer.train()
    close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
