"""Elastic remainder: what was trained and what is left make up the data set exactly, however often it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.packing import CostModel, build_plan, measure, parse_levels, replan
from hbp_titan.tuning.simulate import tulu3_longcite_like
from tests.properties import examples

LEVELS = parse_levels("100:1,800:4")


@examples(100)
@given(st.data(), st.lists(st.integers(1, 800), min_size=1, max_size=80).map(np.array))
def test_trained_and_remaining_samples_are_each_sample_once(data, lengths):
    plan = build_plan(lengths, LEVELS, data.draw(st.sampled_from([4, 8])), global_batch_tokens=1000)
    trained = []
    for _ in range(3):
        finished = data.draw(st.integers(0, plan.num_iterations - 1))
        trained.extend(plan.samples_of(0, finished).tolist())
        plan = replan(plan, finished, world_size=data.draw(st.sampled_from([4, 8, 12])))
        assert sorted([*trained, *plan.packs.ids.tolist()]) == list(range(len(lengths)))
    assert plan.pack_tokens.max() <= 800


def test_other_levels_and_world_size_are_planned_as_well_as_a_fresh_plan():
    plan = build_plan(tulu3_longcite_like(60_000, seed=3), parse_levels("16384:1,131072:8"), 32)
    rest = replan(plan, plan.num_iterations // 2, world_size=16, levels=parse_levels("8192:1,32768:2,131072:4"))
    m = measure(rest)
    assert m.pr < 0.02
    assert m.dbr < 0.01
    assert len(rest.levels) == 3
    assert len(rest.packs.ids) < len(plan.packs.ids)
    np.testing.assert_array_equal(rest.lengths, plan.lengths)


def test_curriculum_steps_that_are_left_come_first():
    plan = build_plan(tulu3_longcite_like(30_000, seed=3), parse_levels("16384:1,131072:8"), 8, curriculum_steps=30)
    rest = replan(plan, int(plan.step_offsets[10]), world_size=16)
    assert rest.curriculum_steps == 20
    assert (rest.level_of_iteration[:20] == 0).all()
    assert replan(plan, int(plan.step_offsets[40])).curriculum_steps == 0
    # Steps, not a share: half a step that is left must not become half of the steps.
    halves = build_plan(np.arange(1, 60), LEVELS, 4, curriculum_steps=2.5)
    assert replan(halves, int(halves.step_offsets[2])).curriculum_steps == 0


def test_a_remaining_sample_that_fits_no_new_level_is_named():
    plan = build_plan([5, 700, 6], LEVELS, 4)
    with pytest.raises(ValueError, match=r"sample 1 has 700 tokens.*max_tokens=600"):
        replan(plan, 0, levels=parse_levels("600:1"))


def test_nothing_left_is_an_error():
    plan = build_plan([5, 6], LEVELS, 4)
    with pytest.raises(ValueError, match="1 finished iterations leave nothing"):
        replan(plan, 1)


def test_costs_per_level_are_asked_for_when_the_number_of_levels_changes():
    plan = build_plan([5, 6], LEVELS, 4, cost=[CostModel(), CostModel(1, 0)])
    with pytest.raises(ValueError, match="2 cost models for 1 levels"):
        replan(plan, 0, levels=LEVELS[1:])
    assert replan(plan, 0, levels=LEVELS[1:], cost=CostModel()).num_iterations == 1
