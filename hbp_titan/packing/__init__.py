"""Sample lengths to a plan of balanced packs. Needs NumPy only and none of the other packages."""

from hbp_titan.packing.baselines import PACKERS
from hbp_titan.packing.build import METHODS, build_plan, replan
from hbp_titan.packing.cost import CostModel
from hbp_titan.packing.level import Level, check_levels, parse_levels
from hbp_titan.packing.metrics import Metrics, comparison_table, measure
from hbp_titan.packing.plan import Iteration, Plan, load_plan, save_plan

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
    "load_plan",
    "measure",
    "parse_levels",
    "replan",
    "save_plan",
]
