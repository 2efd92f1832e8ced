"""Planning: lengths to levels, packs, iterations and optimizer steps. NumPy only; imports no other room.

build_plan makes a Plan from an array of lengths; measure says how good it is.
"""

from hbp_titan.packing.build import METHODS, build_plan
from hbp_titan.packing.cost import CostModel
from hbp_titan.packing.level import Level, check_levels, parse_levels
from hbp_titan.packing.metrics import Metrics, comparison_table, measure
from hbp_titan.packing.packers import PACKERS
from hbp_titan.packing.plan import Iteration, Plan

__all__ = [
    "METHODS",
    "PACKERS",
    "CostModel",
    "Iteration",
    "Level",
    "Metrics",
    "Plan",
    "build_plan",
    "check_levels",
    "comparison_table",
    "measure",
    "parse_levels",
]
