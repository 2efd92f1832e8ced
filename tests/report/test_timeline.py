"""The picture of ranks over time: how long ranks wait, what balancing changes, and that areas are times."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from collections import defaultdict

import numpy as np
import pytest

from hbp_titan.packing import Level, build_plan, measure
from hbp_titan.report.timeline import idle_of, modeled, panels_of, timeline_document, timeline_figure, unbalanced

LENGTHS = np.random.default_rng(0).integers(20, 1000, 240)
LEVELS = [Level(1024), Level(2048, 2)]


def test_ranks_wait_for_the_slowest_of_each_micro_batch() -> None:
    plan = build_plan([4, 4, 4, 4], [Level(4)], 2)
    # 1 s and 3 s, then 2 s and 2 s: 8 of 10 s are work.
    assert idle_of(plan, np.array([1.0, 3.0, 2.0, 2.0])) == pytest.approx(0.2)


def test_random_order_keeps_the_packs_and_waits_longer() -> None:
    plan = build_plan(LENGTHS, LEVELS, 4)
    cost = modeled(plan)
    mixed = unbalanced(plan, cost)
    for k in (0, 1):
        own = plan.pack_levels == k
        assert sorted(mixed[own]) == sorted(cost[own])
    assert idle_of(plan, cost) == pytest.approx(measure(plan).time_imbalance)
    assert idle_of(plan, mixed) > idle_of(plan, cost)


def test_panels_are_one_length_random_order_and_the_plan() -> None:
    one, mixed, own = panels_of(build_plan(LENGTHS, LEVELS, 4))
    assert (one.plan.method, mixed.plan.method, own.plan.method) == ("isf", "hbp", "hbp")
    assert own.idle == pytest.approx(measure(own.plan).time_imbalance)
    assert len(panels_of(one.plan)) == 1
    side_by_side = build_plan(LENGTHS, [Level(1024), Level(1024, 2)], 4, level_order="parallel")
    assert [panel.plan.method for panel in panels_of(side_by_side)] == ["isf", "hbp"]


def test_area_of_waiting_in_the_picture_is_its_share_of_the_time() -> None:
    plan = build_plan(LENGTHS[:60], [Level(1024)], 4, "isf")
    # All of its few micro-batches are in the window.
    assert plan.num_iterations < 18
    (panel,) = panels_of(plan)
    root = xml.etree.ElementTree.fromstring(timeline_document([panel], "modeled"))
    areas: dict[str, float] = defaultdict(float)
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        for width, height in re.findall(r"h([\d.]+)v([\d.]+)", path.attrib["d"]):
            areas[path.attrib["fill"]] += float(width) * float(height)
    assert areas["var(--wait)"] / sum(areas.values()) == pytest.approx(panel.idle, rel=0.03)


def test_large_world_shows_its_first_ranks_and_says_so() -> None:
    plan = build_plan(np.full(4000, 500), [Level(512), Level(1024, 8)], 256)
    figure = timeline_figure(plan)
    assert "64 of 256 ranks" in figure
    assert len(figure) < 100_000
