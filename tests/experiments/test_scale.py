"""Scenarios of scale: levels, lengths, table and chart."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest

from hbp_titan.experiments.paper.scale import (
    METHODS,
    Scenario,
    scale_lengths,
    scale_levels,
    scale_svg,
    scale_table,
    simulate_scale,
)
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import Replay
from hbp_titan.tuning.time_model import PARTS, get_dims

LLAMA = get_dims("llama3_1_8b")


def replay_of(tokens: int, attention: float, idle: float) -> Replay:
    return Replay(8, 1, tokens, 0.5, {**dict.fromkeys(PARTS, 0.0), "attention": attention}, idle, 0.0)


def test_speed_up_is_per_token_and_absent_methods_have_a_dash() -> None:
    # ISF trains 100 tokens in 8 s; dynamic CP half of them in 2 s; ours all in 2 s.
    replays = {name: replay_of(100, 8.0, 0.0) for name in METHODS if name != "flexsp"}
    replays |= {"dynamic_cp": replay_of(50, 1.0, 1.0), "hbp": replay_of(100, 1.5, 0.5)}
    scenario = Scenario(LLAMA, 131_072, 8, replays)
    assert scenario.speed_up("dynamic_cp") == 2.0
    row = scale_table([scenario]).splitlines()[2].split(" | ")
    assert row[5:10] == ["1.00x", "-", "2.00x", "1.00x", "4.00x"]
    assert row[10] == "25.0%"


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
        ("deepseek_v2_236b", 64, False),
    ]
    # One group of 8 does not wait for another; eight groups do.
    assert scenarios[0].speed_up("flat_sorted") == pytest.approx(1.0, abs=0.01)
    for found in (scenarios[2], scenarios[3]):
        assert found.replays is not None
        assert all(found.speed_up("hbp") >= found.speed_up(name) for name in found.replays)
    # Megatron's scheduler supports no experts.
    assert "dynamic_cp" in (scenarios[2].replays or {})
    assert "dynamic_cp" not in (scenarios[3].replays or {})
    rows = scale_table(scenarios).splitlines()
    assert len(rows) == 2 + 4
    assert sum("does not fit" in row for row in rows) == 1
    root = xml.etree.ElementTree.fromstring(scale_svg(scenarios))
    assert root.attrib["viewBox"] == "0 0 1040 300"
