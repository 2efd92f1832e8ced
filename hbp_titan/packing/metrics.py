"""Metrics of a plan (paper section 2.2): padding, balance, communication and the modelled wait of ranks.

Owns the definitions. Each metric compares the N data-parallel groups of one iteration, where N is the dp degree of the
level; with levels side by side it compares what each rank has of its pack. Tokens are real tokens, never padding. Also
owns the length buckets by which losses are reported: powers of two, each from above half its upper bound to its upper
bound, the lowest from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.cost import CostModel, costs_per_level
from hbp_titan.packing.level import format_tokens
from hbp_titan.packing.plan import Plan

LOWEST_BUCKET = 256


@dataclass(frozen=True)
class Metrics:
    """Metrics of a plan or of one of its levels. T: tokens of a group in an iteration. A: CostModel.squares of it.

    dbr: dist balance ratio, mean over iterations of 1 - mean(T) / max(T) over the groups; 0 is best.
    pr: padding ratio, padding / (padding + real tokens) if packs are padded to their level's max_tokens.
    abr: attention balance ratio, the same as dbr with A in place of T.
    cr: communication ratio, tokens in packs with cp_degree > 1 / all tokens.
    ave_tokens: mean real tokens per pack, that is, per group and iteration.
    time_imbalance: share of the modelled time that ranks wait for the slowest group of their iteration, which takes
        max(cost) / cp_degree while groups work mean(cost) / cp_degree.
    groups: N; 0 for a plan whose levels differ in it.
    per_level: metrics of each level, None for a level without iterations; empty in the metrics of a level.
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
    per_level: tuple[Metrics | None, ...] = ()


def measure(plan: Plan, cost: CostModel | Sequence[CostModel] | None = None) -> Metrics:
    """Return the metrics of a plan. cost: one model or one per level; default, those that balanced the plan."""
    packs = _Packs(plan, plan.costs if cost is None else costs_per_level(cost, len(plan.levels)))
    chosen = [plan.pack_levels == k for k in range(len(plan.levels))]
    per_level = tuple(packs.metrics(own) if own.any() else None for own in chosen)
    return packs.metrics(np.ones(plan.packs.num_rows, bool), per_level)


class _Packs:
    """What each rank has of each pack, and the most that any rank has in the same iteration; one element per pack."""

    def __init__(self, plan: Plan, costs: Sequence[CostModel]) -> None:
        # Reductions over arrays: millions of packs without a loop in Python.
        self.plan = plan
        self.capacity = np.array([level.max_tokens for level in plan.levels])[plan.pack_levels]
        # The ranks of a cp group share its pack.
        totals = (plan.pack_tokens, plan.pack_sum_sq, plan.pack_costs(costs))
        self.tokens, self.attention, self.work = (values / plan.pack_degrees for values in totals)
        counts = np.diff(plan.pack_offsets)
        self.groups = np.repeat(counts, counts)
        self.max_tokens, self.max_attention, self.time = (
            np.repeat(plan.over_ranks(values)[1], counts) for values in (self.tokens, self.attention, self.work)
        )

    def metrics(self, chosen: NDArray[np.bool_], per_level: tuple[Metrics | None, ...] = ()) -> Metrics:
        """Return the metrics over the chosen packs, bool [num_packs], at least one True."""
        plan, groups, ranks = self.plan, self.groups[chosen], self.plan.pack_degrees[chosen]
        tokens, num_ranks = plan.pack_tokens[chosen], int(ranks.sum())
        num_packs, num_tokens = len(tokens), int(tokens.sum())

        def unused(own: NDArray[np.float64], most: NDArray[np.float64]) -> float:
            return float(np.sum(ranks * (1 - own[chosen] / most[chosen]))) / num_ranks

        return Metrics(
            dbr=unused(self.tokens, self.max_tokens),
            pr=1 - num_tokens / int(self.capacity[chosen].sum()),
            abr=unused(self.attention, self.max_attention),
            # Side by side, a level may have empty packs only, which complete an iteration.
            cr=int(tokens[ranks > 1].sum()) / max(1, num_tokens),
            ave_tokens=num_tokens / num_packs,
            # Rounding can make a perfect balance -1e-16.
            time_imbalance=max(0.0, float(1 - np.sum(ranks * self.work[chosen]) / np.sum(ranks * self.time[chosen]))),
            iterations=len(np.unique(plan.iteration_of_pack[chosen])),
            samples_per_pack=int(plan.packs.counts[chosen].sum()) / num_packs,
            groups=int(groups[0]) if np.all(groups == groups[0]) else 0,
            per_level=per_level,
        )


def comparison_table(metrics: Mapping[str, Metrics]) -> str:
    """Return a table of at most 80 columns with one row per method, in the given order."""
    lines = [f"{'method':<13}{'DBR':>8}{'PR':>8}{'ABR':>8}{'CR':>8}{'Ave-T':>10}{'idle share':>11}{'iterations':>12}"]
    for name, m in metrics.items():
        lines.append(
            f"{name:<13}{m.dbr:>8.4f}{m.pr:>8.4f}{m.abr:>8.4f}{m.cr:>8.4f}{m.ave_tokens:>10.0f}"
            f"{m.time_imbalance:>11.5f}{m.iterations:>12,}"
        )
    return "\n".join(lines)


def length_bucket(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the upper bound of each count's bucket: the least power of two >= the count and >= LOWEST_BUCKET."""
    exponents = np.ceil(np.log2(np.maximum(counts, LOWEST_BUCKET))).astype(np.int64)
    return np.left_shift(1, exponents)


def bucket_name(upper: int) -> str:
    """Return the range of a bucket in words, such as 513 to 1K."""
    low = 1 if upper == LOWEST_BUCKET else upper // 2 + 1
    return f"{low:,} to {format_tokens(upper)}"
