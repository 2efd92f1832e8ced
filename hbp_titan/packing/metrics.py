"""Metrics of a plan: how full, how balanced, how much communication (paper section 2.2), and idle time.

Owns the definitions. All compare the N data-parallel groups of one iteration, so a value holds for the N = dp
degree of its level; T and A count real tokens, never padding.

Length bands: powers of two, in which losses and counts are told apart by the length of their sample.

Owns the borders and their names. Every band reaches from above half its border to its border; the lowest from 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.cost import CostModel, costs_per_level
from hbp_titan.packing.level import tokens_name
from hbp_titan.packing.plan import Plan


@dataclass(frozen=True)
class Metrics:
    """Figures of a plan or of one of its levels.

    dbr: dist balance ratio, mean over iterations of 1 - mean(T) / max(T) over the groups; 0 is best.
    pr: padding ratio, padding / (padding + real tokens), packs being padded to their level's max_tokens.
    abr: attention balance ratio, as dbr with A = sum(len^2) in place of T.
    cr: communication ratio, tokens in packs with cp_degree > 1 / all tokens.
    ave_tokens: mean real tokens of a pack, that is per group and iteration.
    time_imbalance: share of the modelled time that ranks wait for the slowest of their iteration. An iteration
        takes max(cost) / cp_degree, of which its groups work mean(cost) / cp_degree.
    groups: N, the groups that an iteration compares; 0 for a plan whose levels differ in it.
    per_level: the same for each level, None where it has no iteration; empty in the figures of a level.
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
    """Metrics of a plan. cost: one model or one per level; default, those that the plan was balanced by."""
    costs = plan.costs if cost is None else costs_per_level(cost, len(plan.levels))
    figures = _Figures(plan, costs)
    level_of = plan.level_of_iteration
    per_level = tuple(
        figures.metrics(level_of == k) if np.any(level_of == k) else None for k in range(len(plan.levels))
    )
    return figures.metrics(np.ones(len(level_of), bool), per_level)


class _Figures:
    """What the metrics average, one value per iteration."""

    def __init__(self, plan: Plan, costs: Sequence[CostModel]) -> None:
        level_of = plan.level_of_iteration
        first_pack = plan.pack_offsets[:-1]
        cost = plan.costs_of_packs(costs)
        self.dp = plan.dp_degrees[level_of]
        self.cp = np.array([level.cp_degree for level in plan.levels])[level_of]
        self.capacity = np.array([level.max_tokens for level in plan.levels])[level_of] * self.dp
        self.tokens = np.add.reduceat(plan.pack_tokens, first_pack)
        self.samples = np.add.reduceat(plan.packs.counts, first_pack)
        self.max_tokens = np.maximum.reduceat(plan.pack_tokens, first_pack)
        self.attention = np.add.reduceat(plan.pack_sum_sq, first_pack)
        self.max_attention = np.maximum.reduceat(plan.pack_sum_sq, first_pack)
        self.work = np.add.reduceat(cost, first_pack) / self.dp / self.cp
        self.time = np.maximum.reduceat(cost, first_pack) / self.cp

    def metrics(self, chosen: NDArray[np.bool_], per_level: tuple[Metrics | None, ...] = ()) -> Metrics:
        """Metrics over the chosen iterations, bool [num_iterations], at least one."""
        dp, tokens = self.dp[chosen], self.tokens[chosen]
        num_packs, num_tokens = int(dp.sum()), int(tokens.sum())
        return Metrics(
            dbr=float(np.mean(1 - tokens / (dp * self.max_tokens[chosen]))),
            pr=1 - num_tokens / int(self.capacity[chosen].sum()),
            abr=float(np.mean(1 - self.attention[chosen] / (dp * self.max_attention[chosen]))),
            cr=int(tokens[self.cp[chosen] > 1].sum()) / num_tokens,
            ave_tokens=num_tokens / num_packs,
            # Rounding can make a perfect balance -1e-16.
            time_imbalance=max(0.0, float(1 - self.work[chosen].sum() / self.time[chosen].sum())),
            iterations=len(tokens),
            samples_per_pack=int(self.samples[chosen].sum()) / num_packs,
            groups=int(dp[0]) if np.all(dp == dp[0]) else 0,
            per_level=per_level,
        )


def comparison_table(metrics: Mapping[str, Metrics]) -> str:
    """A table of at most 80 columns, one method a line, in the given order."""
    lines = [f"{'method':<13}{'DBR':>8}{'PR':>8}{'ABR':>8}{'CR':>8}{'Ave-T':>10}{'idle time':>11}{'iterations':>12}"]
    for name, m in metrics.items():
        lines.append(
            f"{name:<13}{m.dbr:>8.4f}{m.pr:>8.4f}{m.abr:>8.4f}{m.cr:>8.4f}{m.ave_tokens:>10.0f}"
            f"{m.time_imbalance:>11.5f}{m.iterations:>12,}"
        )
    return "\n".join(lines)


def source_mix(plan: Plan, source_of: NDArray[np.integer]) -> NDArray[np.float64]:
    """Share of each source in the tokens of each iteration, float64 [num_iterations, num_sources].

    source_of: the source of each sample, ints from 0 [num_samples].
    """
    num_sources = int(source_of.max()) + 1
    samples = np.add.reduceat(plan.packs.counts, plan.pack_offsets[:-1])
    cell = np.repeat(np.arange(plan.num_iterations), samples) * num_sources + source_of[plan.packs.ids]
    tokens = np.bincount(cell, weights=plan.lengths[plan.packs.ids], minlength=plan.num_iterations * num_sources)
    mix = tokens.reshape(plan.num_iterations, num_sources)
    return mix / mix.sum(axis=1, keepdims=True)


LOWEST_BAND = 256


def band_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least power of two, LOWEST_BAND or more, that is at least each count."""
    exponents = np.ceil(np.log2(np.maximum(counts, LOWEST_BAND))).astype(np.int64)
    return np.left_shift(1, exponents)


def band_name(border: int) -> str:
    """A band in words: 513 to 1K."""
    low = 1 if border == LOWEST_BAND else border // 2 + 1
    return f"{low:,} to {tokens_name(border)}"
