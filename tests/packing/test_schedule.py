"""Optimizer steps: steady tokens, curriculum first, and both level orders."""

from __future__ import annotations

import numpy as np
import pytest

from hbp_titan.packing import build_plan, measure, parse_levels
from hbp_titan.tuning.simulate import tulu3_longcite_like

LEVELS = parse_levels("16384:1,131072:8")
LENGTHS = tulu3_longcite_like(60_000, seed=4)


def steps_of(plan):
    return [plan.level_of_iteration[a:b] for a, b in zip(plan.step_offsets[:-1], plan.step_offsets[1:], strict=True)]


def test_alternate_gives_each_step_one_level_in_mixed_order():
    plan = build_plan(LENGTHS, LEVELS, 8, global_batch_tokens=520_000)
    levels = [set(step.tolist()) for step in steps_of(plan)]
    assert all(len(level) == 1 for level in levels)
    order = [level.pop() for level in levels]
    assert {0, 1} == set(order) == set(order[: len(order) // 2]) == set(order[len(order) // 2 :])
    # 131072 tokens per iteration: four per step.
    assert abs(np.median(plan.step_tokens) / 524_288 - 1) < 0.01


def test_interleave_gives_each_step_its_share_of_every_level_and_the_same_tokens():
    plan = build_plan(LENGTHS, LEVELS, 8, level_order="interleave", global_batch_tokens=10 * 131_072)
    share = np.mean(plan.level_of_iteration)
    for step in steps_of(plan):
        assert abs(step.sum() - share * len(step)) <= 1.5
    # An iteration is a tenth of a step: all steps but the few that hold one more or less are equal within 1%.
    off = np.abs(plan.step_tokens / np.median(plan.step_tokens) - 1)
    assert np.mean(off > 0.01) < 0.15
    assert off.max() < 0.11


def test_interleave_keeps_steps_within_one_percent_if_iterations_are_small_enough():
    plan = build_plan(LENGTHS, LEVELS, 8, level_order="interleave", global_batch_tokens=110 * 131_072)
    assert plan.num_steps >= 3
    assert np.abs(plan.step_tokens / plan.step_tokens.mean() - 1).max() <= 0.01


def test_levels_of_unequal_iterations_come_close_to_the_target():
    # Level 1 trains four packs of 8192 tokens in an iteration, level 0 eight of 1024.
    lengths = np.minimum(LENGTHS, 8192)[:20_000]
    for level_order in ("alternate", "interleave"):
        plan = build_plan(
            lengths, parse_levels("1024:1,8192:2"), 8, level_order=level_order, global_batch_tokens=32_768
        )
        assert abs(plan.step_tokens.mean() / 32_768 - 1) < 0.02
        assert np.mean(np.abs(plan.step_tokens / 32_768 - 1) > 0.02) < 0.02


@pytest.mark.parametrize("level_order", ["alternate", "interleave"])
@pytest.mark.parametrize("global_batch_tokens", [0, 520_000])
def test_curriculum_trains_the_lowest_level_first_in_the_first_epoch_only(level_order, global_batch_tokens):
    options = {"level_order": level_order, "global_batch_tokens": global_batch_tokens}
    first = build_plan(LENGTHS, LEVELS, 8, curriculum_steps=20, **options)
    assert all((step == 0).all() for step in steps_of(first)[:20])
    assert any((step == 1).any() for step in steps_of(first)[20:60])
    share = build_plan(LENGTHS, LEVELS, 8, curriculum_steps=0.25, **options)
    quarter = round(0.25 * share.num_steps)
    assert all((step == 0).all() for step in steps_of(share)[: quarter - 1])
    assert any((step == 1).any() for step in steps_of(share)[quarter : quarter + 40])
    second = build_plan(LENGTHS, LEVELS, 8, curriculum_steps=20, epoch=1, **options)
    assert any((step == 1).any() for step in steps_of(second)[:20])


def test_defaults_are_a_step_per_iteration_and_a_long_curriculum_takes_all_of_the_lowest_level():
    plan = build_plan(LENGTHS, LEVELS, 8, curriculum_steps=10**6)
    assert plan.step_of_iteration.tolist() == list(range(plan.num_iterations))
    assert (np.diff(plan.level_of_iteration) >= 0).all()


def test_each_epoch_is_packed_differently_at_the_same_quality():
    plans = [build_plan(LENGTHS, LEVELS, 8, epoch=epoch) for epoch in (0, 1)]
    assert not np.array_equal(plans[0].packs.ids, plans[1].packs.ids)
    assert measure(plans[0]).pr == pytest.approx(measure(plans[1]).pr)


def test_the_first_iterations_are_not_the_most_expensive():
    plan = build_plan(LENGTHS, LEVELS, 8)
    cost = np.add.reduceat(plan.pack_costs(plan.costs), plan.pack_offsets[:-1])[plan.level_of_iteration == 0]
    assert abs(cost[: len(cost) // 2].mean() / cost.mean() - 1) < 0.02
