"""A plan next to the baselines: the same samples, levels, ranks and costs, packed by other methods.

Owns the choice and the names of the baselines that a run is compared with. Planning is cheap (a million samples take
0.3 s), so a comparison needs nothing but the plan itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbp_titan.packing.build import METHODS, build_plan
from hbp_titan.packing.level import one_at_a_time
from hbp_titan.packing.metrics import Metrics, measure
from hbp_titan.packing.plan import Plan

BASELINES = ("flat_sorted", "isf")
LABELS = {"hbp": "HBP", "hbp_paper": "HBP as printed", "isf": "ISF", "flat_sorted": "flat + sort"}
MEANINGS = {
    "hbp": "Hierarchical Balance Packing, this project's: short samples in short packs, long ones in long packs that "
    "several ranks share; packs of a micro-batch cost the same.",
    "hbp_paper": "Hierarchical Balance Packing as the paper prints it (arXiv 2503.07680).",
    "flat_sorted": "One pack length for all samples, packs sorted by cost: the strongest baseline.",
    "isf": "Iterative sampling and filling, the paper's baseline: one pack length, packs in random order.",
}


def label_of(method: str) -> str:
    """Return the name of a method for people."""
    return LABELS.get(method, method)


def meaning_of(method: str) -> str:
    """Return one sentence on a method, "" for an unknown one."""
    return MEANINGS.get(method) or (METHODS[method].summary if method in METHODS else "")


def planned_by(plan: Plan, method: str) -> Plan:
    """Return the plan of the same samples by another method, everything else equal; `plan` itself for its own method.

    Other methods train one level at a time, so of levels side by side they get those that ascend.
    """
    if method == plan.method:
        return plan
    parallel = plan.level_order == "parallel"
    kept = one_at_a_time(plan.levels) if parallel else range(len(plan.levels))
    ids = np.sort(plan.packs.ids)
    return build_plan(
        plan.lengths[ids],
        [plan.levels[k] for k in kept],
        plan.world_size,
        method,
        plan.seed,
        loss_tokens=plan.loss_tokens[ids],
        cost=[plan.costs[k] for k in kept],
        global_batch_tokens=plan.global_batch_tokens,
        level_order="alternate" if parallel else plan.level_order,
        curriculum_steps=plan.curriculum_steps,
        epoch=plan.epoch,
    )


@dataclass(frozen=True)
class Compared:
    """A plan of one method. label: "HBP"; own: whether the run uses it."""

    label: str
    own: bool
    plan: Plan
    metrics: Metrics


def with_baselines(plan: Plan) -> list[Compared]:
    """Return the plan and those of BASELINES, the plan first."""
    plans = [plan, *(planned_by(plan, method) for method in BASELINES if method != plan.method)]
    return [Compared(label_of(of.method), of is plan, of, measure(of)) for of in plans]
