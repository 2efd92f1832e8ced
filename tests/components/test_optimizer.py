"""AdamW's groups and state, clipping by definition, and the learning-rate schedule when the number of steps changes."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hbp_titan.components.optimizer import LRScheduler, build_optimizer, clip_grad_norm, lr_factor, set_learning_rate
from hbp_titan.job_config import LRScheduler as LRSchedulerConfig
from hbp_titan.job_config import Optimizer

LINEAR = LRSchedulerConfig(warmup_steps=2, decay="linear", min_lr_factor=0.0)


def test_only_matrices_and_stacks_of_them_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Bilinear(4, 4, 4, bias=False))
    optimizer = build_optimizer(model, Optimizer(weight_decay=0.1))
    found = [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in optimizer.param_groups]
    assert found == [(0.1, [2]), (0.1, [3]), (0.0, [1, 1])]
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3


def test_clipping_scales_to_the_norm_and_zero_turns_it_off() -> None:
    model = nn.Linear(2, 1, bias=False)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert float(clip_grad_norm(model, max_norm)) == pytest.approx(5.0)
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_state_exists_before_the_first_update_and_does_not_change_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5))
    assert all(p.equal(old) and p.grad is None for p, old in zip(model.parameters(), before, strict=True))
    # A checkpoint calls it, and it would create missing state by a step.
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == len(before)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())

    # torch's own AdamW creates its state in the first step.
    twin = copy.deepcopy(model)
    twin_of = dict(zip(model.parameters(), twin.parameters(), strict=True))
    groups = [{**group, "params": [twin_of[p] for p in group["params"]]} for group in optimizer.param_groups]
    for each, stepped in ((model, optimizer), (twin, torch.optim.AdamW(groups))):
        for _ in range(2):
            each(torch.ones(3, 4)).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("warmup", "decay", "total", "expected"),
    [
        (2, "constant", 6, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (2, "linear", 6, [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]),
        (2, "cosine", 6, [0.5, 1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1]),
        # Below one: a share of all steps.
        (0.4, "constant", 10, [0.25, 0.5, 0.75, *[1.0] * 7]),
        # Longer than the run.
        (10, "cosine", 3, [1 / 3, 2 / 3, 1.0]),
    ],
)
def test_schedule_warms_up_and_ends_at_the_minimum(
    warmup: float, decay: str, total: int, expected: list[float]
) -> None:
    config = LRSchedulerConfig(warmup_steps=warmup, decay=decay, min_lr_factor=0.1)
    factor = lr_factor(config, total_steps=total)
    assert [factor(step) for step in range(total)] == pytest.approx(expected)
    assert _factors(LRScheduler(total, total), config, 0, total) == [factor(step) for step in range(total)]


def _factors(scheduler: LRScheduler, config: LRSchedulerConfig, first: int, last: int) -> list[float]:
    return [scheduler.factor(config, step) for step in range(first, last)]


def test_remaining_steps_share_the_rest_of_the_schedule() -> None:
    # 2 steps of warm-up, then down by 1/4 per step: 0.5 after 4 of 6 steps.
    scheduler = LRScheduler(6, 6)
    assert _factors(scheduler, LINEAR, 0, 6) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert _factors(scheduler.extend(4, 8), LINEAR, 4, 8) == pytest.approx([0.375, 0.25, 0.125, 0.0])
    # In the middle of the warm-up: from 0.5 by 0.25.
    assert _factors(scheduler.extend(1, 11), LINEAR, 1, 5) == pytest.approx([0.75, 1.0, 0.875, 0.75])
    # Twice in a row, the second time to fewer steps.
    twice = scheduler.extend(4, 8).extend(6, 7)
    assert _factors(twice, LINEAR, 6, 7) == pytest.approx([0.0])
    assert LRScheduler(**json.loads(json.dumps(asdict(twice)))) == twice
    # A finished run that gets more steps keeps the last rate.
    config = LRSchedulerConfig(warmup_steps=0, decay="cosine", min_lr_factor=0.1)
    assert _factors(scheduler.extend(6, 9), config, 6, 9) == pytest.approx([0.1, 0.1, 0.1])
    assert scheduler.extend(6, 6).position_at(6) == 6
    assert [scheduler.extend(6, total).used_up for total in (6, 9)] == [False, True]
    assert not scheduler.extend(5, 9).used_up


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 20),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 80)), max_size=4),
)
def test_no_change_of_the_step_count_makes_the_rate_jump(
    decay: str, warmup: float, changes: list[tuple[int, int]]
) -> None:
    config = LRSchedulerConfig(warmup_steps=warmup, decay=decay)
    scheduler, done, positions = LRScheduler(40, 40), 0, [0.0]
    for trained, remaining in [*changes, (0, 1)]:
        for _ in range(min(trained, scheduler.total - done)):
            done += 1
            positions.append(scheduler.position_at(done))
        scheduler = scheduler.extend(done, done + remaining)
        assert scheduler.position_at(done) == pytest.approx(positions[-1])
    positions.append(scheduler.position_at(done + 1))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(positions))
    assert positions[-1] == pytest.approx(40)
    assert scheduler.factor(config, done) == pytest.approx(lr_factor(config, 40)(39))
