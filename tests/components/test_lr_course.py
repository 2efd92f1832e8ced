"""The learning rate of a run whose number of steps changes: it goes on where it is and ends where it should."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.components.optimizer import LRScheduler, lr_factor, set_learning_rate
from hbp_titan.job_config import LRScheduler as LRSchedulerConfig

LINEAR = LRSchedulerConfig(warmup_steps=2, decay="linear", min_lr_factor=0.0)


def _factors(course: LRScheduler, config: LRSchedulerConfig, first: int, last: int) -> list[float]:
    return [course.factor(config, step) for step in range(first, last)]


def test_a_run_without_change_has_the_schedule_itself() -> None:
    config = LRSchedulerConfig(warmup_steps=0.1)
    of_step = lr_factor(config, 37)
    assert _factors(LRScheduler(37, 37), config, 0, 37) == [of_step(step) for step in range(37)]


def test_twice_the_steps_take_half_as_much_of_the_schedule_each() -> None:
    # 2 steps of warm-up, then down by 1 / 4 a step: after 4 of 6 steps the place 0.5.
    course = LRScheduler(6, 6)
    assert _factors(course, LINEAR, 0, 6) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert _factors(course.extend(4, 8), LINEAR, 4, 8) == pytest.approx([0.375, 0.25, 0.125, 0.0])
    # And in the middle of the warm-up: from 0.5 by 0.25.
    slower = course.extend(1, 11)
    assert _factors(slower, LINEAR, 1, 5) == pytest.approx([0.75, 1.0, 0.875, 0.75])


def test_fewer_steps_take_more_each_and_changes_follow_one_another() -> None:
    course = LRScheduler(6, 6).extend(4, 8).extend(6, 7)
    assert _factors(course, LINEAR, 6, 7) == pytest.approx([0.0])
    assert LRScheduler(**json.loads(json.dumps(asdict(course)))) == course


def test_a_run_that_was_over_and_gets_more_steps_keeps_the_last_rate() -> None:
    config = LRSchedulerConfig(warmup_steps=0, decay="cosine", min_lr_factor=0.1)
    assert _factors(LRScheduler(6, 6).extend(6, 9), config, 6, 9) == pytest.approx([0.1, 0.1, 0.1])
    assert LRScheduler(6, 6).extend(6, 6).position_at(6) == 6


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 20),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 80)), max_size=4),
)
def test_no_change_makes_the_rate_jump(decay: str, warmup: float, changes: list[tuple[int, int]]) -> None:
    config = LRSchedulerConfig(warmup_steps=warmup, decay=decay)
    course, done, places = LRScheduler(40, 40), 0, [0.0]
    for trained, left in [*changes, (0, 1)]:
        for _ in range(min(trained, course.total - done)):
            done += 1
            places.append(course.position_at(done))
        course = course.extend(done, done + left)
        assert course.position_at(done) == pytest.approx(places[-1])
    places.append(course.position_at(done + 1))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(places))
    assert places[-1] == pytest.approx(40)
    assert course.factor(config, done) == pytest.approx(lr_factor(config, 40)(39))


def test_the_rate_is_set_in_every_group() -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
