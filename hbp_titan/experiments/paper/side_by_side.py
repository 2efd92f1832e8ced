"""Study: what levels side by side cost against levels one at a time, simulated on the mixture of the paper.

    python -m hbp_titan.experiments.paper.side_by_side

Both forms get the fastest memory plan that fits for each level. What decides is how fast keys and values travel between
nodes, so each machine is shown with the table's efficiency of these exchanges and with a higher one.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

import numpy as np

from hbp_titan.config import JobConfig
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import build_plan, parse_levels
from hbp_titan.packing.level import level_name
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.parallel_levels import Proposal, fastest_that_fit, level_cost, propose
from hbp_titan.tuning.search import Workload
from hbp_titan.tuning.simulate import Replay, replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import time_model

# (flavor, machine, ranks, levels one at a time, efficiency of exchanges or None for the table's).
SCENARIOS: tuple[tuple[str, str, int, str, float | None], ...] = (
    ("llama3_1_8b", "h100-80gb", 64, "16384:1,131072:8", None),
    ("llama3_1_8b", "h100-80gb", 512, "16384:1,131072:8", None),
    ("llama3_1_8b", "h100-80gb", 512, "16384:1,131072:8", 0.75),
    ("llama3_1_8b", "h200-141gb", 512, "32768:1,131072:4", None),
    ("llama3_1_70b", "h100-80gb", 512, "16384:2,131072:16:hybrid", None),
)


@dataclass(frozen=True)
class Compared:
    """One scenario: the epoch with levels one at a time, and the proposal side by side.

    largest_step: real tokens of the largest micro-batch one at a time, the least that a step of its level has.
    """

    name: str
    one_at_a_time: Replay
    largest_step: int
    side_by_side: Proposal

    def row(self) -> str:
        """Return the row under HEADER."""
        one, both = self.one_at_a_time, self.side_by_side.replay
        tokens = self.side_by_side.plan.step_tokens
        shares = " ".join(
            f"{a.share(part):>6.1%}{b.share(part):>6.1%}"
            for part in ("idle", "sp", "recompute")
            for a, b in [(one, both)]
        )
        return (
            f"{self.name:<36}{both.seconds / one.seconds - 1:>+7.1%} {shares}{self.largest_step / 1e6:>9.2f}M"
            f"{tokens.mean() / 1e6:>7.2f}M +-{tokens.std() / tokens.mean():>5.1%}"
        )


HEADER = (
    f"{'':<36}{'time':>7} {'idle':>12} {'cp':>12} {'recomputed':>12}{'largest step':>10}{'mixed steps':>14}\n"
    "(of each pair: one at a time, side by side)"
)


def compare(
    flavor: str, machine: str, ranks: int, levels: str, efficiency: float | None, num_samples: int, seed: int = 0
) -> Compared:
    """Simulate one scenario on a mixture like Tulu3 with LongCite."""
    config, args, hardware = JobConfig(), get_flavor(flavor), get_hardware(machine)
    if efficiency is not None:
        hardware = dataclasses.replace(hardware, exchange_efficiency=efficiency)
    model, lengths = time_model(args, config, hardware, ranks), tulu3_longcite_like(num_samples, seed)
    fitting = fastest_that_fit(parse_levels(levels), config, args, hardware, ranks)
    costs = [level_cost(model, level, 1.0) for level in fitting]
    plan = build_plan(lengths, fitting, ranks, cost=costs, level_order="interleave")
    config.levels = fitting[:1]
    workload = Workload(lengths, lengths - 1, ranks, costs[0])
    name = f"{flavor}, {ranks} {machine}" + ("" if efficiency is None else f", {efficiency:.0%}")
    largest = int(np.max(plan.step_tokens))
    return Compared(name, replay(plan, model), largest, propose(config, args, hardware, workload))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=939_000, help="samples of the mixture [939000]")
    options = parser.parse_args(argv)
    print(HEADER)
    for scenario in SCENARIOS:
        compared = compare(*scenario, options.num_samples)
        print(compared.row(), flush=True)
        print(f"    {', '.join(map(level_name, compared.side_by_side.levels))}", flush=True)


if __name__ == "__main__":
    main()
