"""Simulated methods: the list of methods, FlexSP's levels, HBP without balance; scenarios of scale."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree

import numpy as np
import pytest

from hbp_titan.experiments.paper.scale import (
    DEFAULT_METHODS,
    check_methods,
    flexsp_levels,
    level_cost,
    replay_methods,
    scale_lengths,
    scale_levels,
    scale_svg,
    scale_table,
    simulate_scale,
    without_balance,
)
from hbp_titan.packing import Level, build_plan, measure
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import tulu3_longcite_like
from hbp_titan.tuning.time_model import TimeModel, get_dims

LEVELS = [Level(16384, 1, ac_policy="full"), Level(131072, 8, ac_policy="full")]
MODEL = TimeModel(get_dims("llama3_1_8b"), get_hardware("h100-80gb"), 32)


def test_every_method_trains_the_same_tokens() -> None:
    lengths = tulu3_longcite_like(10_000)
    replays = replay_methods(lengths, LEVELS, MODEL, DEFAULT_METHODS)
    assert tuple(replays) == DEFAULT_METHODS
    assert {r.tokens for r in replays.values()} == {int(lengths.sum())}
    assert all(r.idle >= 0 and r.seconds > 0 for r in replays.values())


def test_flexsp_has_a_level_per_power_of_two_and_the_degree_itself() -> None:
    levels = flexsp_levels(Level(131072, 8, ac_policy="full", ac_layers=4))
    assert [(level.max_tokens, level.cp_degree) for level in levels] == [
        (16384, 1),
        (32768, 2),
        (65536, 4),
        (131072, 8),
    ]
    assert {(level.ac_policy, level.ac_layers) for level in levels} == {("full", 4)}
    assert [level.cp_degree for level in flexsp_levels(Level(12, 6))] == [1, 2, 6]


def test_without_balance_regroups_the_same_packs() -> None:
    plan = build_plan(tulu3_longcite_like(10_000), LEVELS, 8, "hbp_paper")
    unbalanced = without_balance(plan)
    for level in range(2):
        own = plan.pack_levels == level
        np.testing.assert_array_equal(np.sort(plan.pack_sum_sq[own]), np.sort(unbalanced.pack_sum_sq[own]))
    assert measure(unbalanced).abr > 5 * measure(plan).abr


def test_level_cost_is_its_seconds_without_constant_and_documents() -> None:
    time, cost = MODEL.level_time(LEVELS[1]), level_cost(MODEL, LEVELS[1])
    # Two packs, all tokens trained: 1000 documents of 100 tokens, and one of 100,000.
    loads = np.array([[1.0, 1e5, 1e7, 1000], [1.0, 1e5, 1e10, 1]])
    difference = np.diff(cost.cost(np.array([10**5, 10**5]), np.array([10**7, 10**10])))
    np.testing.assert_allclose(difference, np.diff(dataclasses.replace(time, per_document=0.0).seconds(loads)))


def test_unknown_method_names_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean flexsp"):
        check_methods(["isf", "flexp"])


LLAMA = get_dims("llama3_1_8b")


def test_levels_have_16k_tokens_per_rank_if_there_are_ranks() -> None:
    assert [(level.max_tokens, level.cp_degree, level.cp_style) for level in scale_levels(LLAMA, 1 << 20, 512)] == [
        (16384, 1, "ulysses"),
        (131072, 8, "ulysses"),
        (1 << 20, 64, "hybrid"),
    ]
    assert [level.cp_degree for level in scale_levels(LLAMA, 1 << 20, 8)] == [1, 8, 8]


@pytest.mark.parametrize("context", [131_072, 1_048_576])
def test_lengths_reach_the_context(context: int) -> None:
    lengths = scale_lengths(context, 64)
    assert 0.9 * context < lengths.max() <= context
    assert lengths.min() >= 1


@pytest.mark.slow
def test_scenario_runs_the_methods_or_does_not_fit() -> None:
    h100 = get_hardware("h100-80gb")
    scenarios = list(simulate_scale(h100, ("llama3_1_8b", "deepseek_v2_236b"), (131_072,), (8, 64)))
    assert [(s.dims.name, s.world_size, s.replays is None) for s in scenarios] == [
        ("llama3_1_8b", 8, False),
        ("deepseek_v2_236b", 8, True),
        ("llama3_1_8b", 64, False),
        ("deepseek_v2_236b", 64, True),
    ]
    # One group of 8 does not wait for another; eight groups do.
    assert scenarios[0].speed_up("flat_sorted") == pytest.approx(1.0, abs=0.01)
    assert scenarios[2].speed_up("hbp") > scenarios[2].speed_up("flat_sorted") > 1.2
    rows = scale_table(scenarios).splitlines()
    assert len(rows) == 2 + 4
    assert sum("does not fit" in row for row in rows) == 2
    root = xml.etree.ElementTree.fromstring(scale_svg(scenarios))
    assert root.attrib["viewBox"] == "0 0 1040 300"
