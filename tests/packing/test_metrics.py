"""Metrics equal the paper's definitions, worked out by hand on a plan of two iterations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hbp_titan.packing import CostModel, Level, build_plan, comparison_table, measure
from hbp_titan.packing.metrics import bucket_name, length_bucket
from hbp_titan.packing.ragged import Ragged


def hand_made_plan():
    """Level 0 (10 tokens, cp 1, two groups): packs {4, 4} and {6}. Level 1 (20 tokens, cp 2): pack {12, 3}."""
    plan = build_plan([4, 4, 6, 12, 3], [Level(10), Level(20, 2)], world_size=2)
    return dataclasses.replace(
        plan,
        packs=Ragged(np.array([0, 1, 2, 3, 4]), np.array([0, 2, 3, 5])),
        pack_levels=np.array([0, 0, 1]),
        step_offsets=np.array([0, 1, 2]),
    )


def test_metrics_by_hand():
    m = measure(hand_made_plan(), CostModel(alpha=1.0, beta=0.5))
    # Iteration 0: T = 8, 6; A = 32, 36; cost = 8 + 16, 6 + 18. Iteration 1: one group.
    low, high = m.per_level
    assert low.dbr == pytest.approx((8 - 6) / (2 * 8))
    assert low.abr == pytest.approx((36 - 32) / (2 * 36))
    assert (low.pr, low.cr, low.groups) == (pytest.approx(6 / 20), 0, 2)
    assert (high.dbr, high.abr, high.cr, high.groups) == (0, 0, 1, 1)
    assert m.dbr == pytest.approx(low.dbr / 2)
    assert m.pr == pytest.approx(1 - 29 / 40)
    assert m.cr == pytest.approx(15 / 29)
    assert m.ave_tokens == pytest.approx(29 / 3)
    assert m.samples_per_pack == pytest.approx(5 / 3)
    assert (m.iterations, m.groups) == (2, 0)
    assert m.time_imbalance == 0


def test_time_imbalance_is_weighted_by_the_time_of_the_iteration():
    # Cost = tokens: iteration 0 takes 8 of which 7 are worked, iteration 1 takes 15 / cp 2 = 7.5, all worked.
    assert measure(hand_made_plan(), CostModel(1.0, 0.0)).time_imbalance == pytest.approx(1 - 14.5 / 15.5)


def test_a_level_without_iterations_has_no_metrics():
    assert measure(build_plan([3, 4], [Level(10), Level(20, 2)], world_size=2)).per_level[1] is None


def test_the_table_has_one_row_per_method_within_eighty_columns():
    lines = comparison_table({"hbp": measure(hand_made_plan()), "hbp_paper": measure(hand_made_plan())}).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "hbp", "hbp_paper"]
    assert max(map(len, lines)) <= 80


def test_length_buckets_are_powers_of_two():
    counts = np.array([1, 256, 257, 512, 1024, 1025])
    assert length_bucket(counts).tolist() == [256, 256, 512, 512, 1024, 2048]
    assert [bucket_name(upper) for upper in (256, 1024)] == ["1 to 256", "513 to 1K"]
