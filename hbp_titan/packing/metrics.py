"""Metrics of a plan: how full, how balanced, how much communication (paper section 2.2), and idle time.

Owns the definitions. All compare the N data-parallel groups of one iteration, so a value holds for the N = dp
degree of its level; T and A count real tokens, never padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.cost import CostModel, costs_per_level
from hbp_titan.packing.plan import Plan


@dataclass(frozen=True)
class Metrics:
    """Figures of a plan, or of one of its levels (`groups` is then N; 0 where levels differ in it).

    dbr: dist balance ratio, mean over iterations of 1 - mean(T) / max(T) over the groups; 0 is best.
    pr: padding ratio, padding / (padding + real tokens), packs being padded to their level's max_tokens.
    abr: attention balance ratio, as dbr with A = sum(len^2) in place of T.
    cr: communication ratio, tokens in packs with cp_degree > 1 / all tokens.
    ave_tokens: mean real tokens of a pack, that is per group and iteration.
    time_imbalance: share of the modelled time that ranks wait for the slowest of their iteration. An iteration
        takes max(cost) / cp_degree, and its groups work mean(cost) / cp_degree of that.
    """

    dbr: float
    pr: float
    abr: float
    cr: float
    ave_tokens: float
    time_imbalance: float
    iterations: int
    samples_per_pack: float
    groups: int
    per_level: tuple[Metrics | None, ...] = field(default=())


def measure(plan: Plan, cost: CostModel | Sequence[CostModel] | None = None) -> Metrics:
    """Metrics of a plan; per_level[k] is None where level k has no iteration. cost: default, the plan's own."""
    costs = plan.costs if cost is None else costs_per_level(cost, len(plan.levels))
    every = np.arange(plan.num_iterations)
    levels = tuple(_measure(plan, np.flatnonzero(plan.level_of_iteration == k), costs) for k in range(len(plan.levels)))
    whole = _measure(plan, every, costs, levels)
    assert whole is not None, "a plan has iterations"
    return whole


def _measure(
    plan: Plan,
    iterations: NDArray[np.int64],
    costs: Sequence[CostModel],
    per_level: tuple[Metrics | None, ...] = (),
) -> Metrics | None:
    if not len(iterations):
        return None
    dp = plan.dp_degrees[plan.level_of_iteration]
    cp = np.array([level.cp_degree for level in plan.levels])[plan.level_of_iteration]
    capacity = np.array([level.max_tokens for level in plan.levels])[plan.level_of_iteration]
    first = plan.pack_offsets[:-1]
    pack_cost = np.zeros(plan.packs.num_rows)
    for k, cost in enumerate(costs):
        mine = plan.pack_levels == k
        pack_cost[mine] = cost.cost(plan.pack_tokens[mine], plan.pack_sum_sq[mine])
    slowest = (np.maximum.reduceat(pack_cost, first) / cp)[iterations]
    mean = (np.add.reduceat(pack_cost, first) / dp / cp)[iterations]
    tokens = np.add.reduceat(plan.pack_tokens, first)[iterations]
    samples = np.add.reduceat(plan.packs.counts, first)[iterations]
    dp, cp, capacity = dp[iterations], cp[iterations], capacity[iterations]
    return Metrics(
        dbr=float(_imbalance(plan.pack_tokens, first, plan)[iterations].mean()),
        pr=float(1 - tokens.sum() / (dp * capacity).sum()),
        abr=float(_imbalance(plan.pack_sum_sq, first, plan)[iterations].mean()),
        cr=float(tokens[cp > 1].sum() / tokens.sum()),
        ave_tokens=float(tokens.sum() / dp.sum()),
        time_imbalance=float(1 - mean.sum() / slowest.sum()),
        iterations=len(iterations),
        samples_per_pack=float(samples.sum() / dp.sum()),
        groups=int(dp[0]) if np.all(dp == dp[0]) else 0,
        per_level=per_level,
    )


def _imbalance(values: NDArray[np.int64], first: NDArray[np.int64], plan: Plan) -> NDArray[np.float64]:
    largest = np.maximum.reduceat(values, first)
    mean = np.add.reduceat(values, first) / plan.dp_degrees[plan.level_of_iteration]
    return np.where(largest > 0, 1 - mean / np.maximum(largest, 1), 0.0)


def comparison_table(metrics: Mapping[str, Metrics]) -> str:
    """A table of methods by their metrics in at most 80 columns; ratios to four digits."""
    lines = [
        f"{'method':<14}{'DBR':>8}{'PR':>8}{'ABR':>8}{'CR':>8}{'Ave-T':>9}{'imbalance':>11}{'iterations':>12}",
        *(
            f"{name:<14}{m.dbr:>8.4f}{m.pr:>8.4f}{m.abr:>8.4f}{m.cr:>8.4f}{m.ave_tokens:>9,.0f}"
            f"{m.time_imbalance:>11.4f}{m.iterations:>12,}"
            for name, m in metrics.items()
        ),
    ]
    return "\n".join(lines)
