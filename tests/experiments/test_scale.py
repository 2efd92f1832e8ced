"""Scenarios of scale: their levels, data, and what does not fit."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest

from hbp_titan.experiments.paper.scale import scale_lengths, scale_levels, scale_svg, scale_table, simulate_scale
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.time_model import get_dims

LLAMA = get_dims("llama3_1_8b")


def test_levels_hold_16k_tokens_a_rank_as_far_as_there_are_ranks() -> None:
    assert [(level.max_tokens, level.cp_degree, level.cp_style) for level in scale_levels(LLAMA, 1 << 20, 512)] == [
        (16384, 1, "ulysses"),
        (131072, 8, "ulysses"),
        (1 << 20, 64, "hybrid"),
    ]
    assert [level.cp_degree for level in scale_levels(LLAMA, 1 << 20, 8)] == [1, 8, 8]


@pytest.mark.parametrize("context", [131_072, 1_048_576])
def test_lengths_reach_into_the_context_and_not_beyond(context: int) -> None:
    lengths = scale_lengths(context, 64)
    assert 0.9 * context < lengths.max() <= context
    assert lengths.min() >= 1


@pytest.mark.slow
def test_a_scenario_runs_the_methods_or_says_that_it_does_not_fit() -> None:
    h100 = get_hardware("h100-80gb")
    scenarios = list(simulate_scale(h100, ("llama3_1_8b", "deepseek_v2_236b"), (131_072,), (8, 64)))
    assert [(s.dims.name, s.world_size, s.replays is None) for s in scenarios] == [
        ("llama3_1_8b", 8, False),
        ("deepseek_v2_236b", 8, True),
        ("llama3_1_8b", 64, False),
        ("deepseek_v2_236b", 64, True),
    ]
    # One group of 8 has nobody to wait for; eight have.
    assert scenarios[0].speed_up("flat_sorted") == pytest.approx(1.0, abs=0.01)
    assert scenarios[2].speed_up("hbp") > scenarios[2].speed_up("flat_sorted") > 1.2
    rows = scale_table(scenarios).splitlines()
    assert len(rows) == 2 + 4
    assert sum("does not fit" in row for row in rows) == 2
    root = xml.etree.ElementTree.fromstring(scale_svg(scenarios))
    assert root.attrib["viewBox"] == "0 0 1040 300"
