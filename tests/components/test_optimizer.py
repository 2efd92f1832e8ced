"""The learning-rate schedule by literals, decay groups and clipping by definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm, lr_factor
from hbp_titan.job_config import LRScheduler, Optimizer


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.5, 1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1]),
    ],
)
def test_schedule_warms_up_and_ends_at_the_least_factor(decay: str, expected: list[float]) -> None:
    factor = lr_factor(LRScheduler(warmup_steps=2, decay=decay, min_lr_factor=0.1), total_steps=6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected)


def test_warmup_below_one_is_a_share_of_all_steps() -> None:
    factor = lr_factor(LRScheduler(warmup_steps=0.1, decay="constant"), total_steps=100)
    assert factor(8) == pytest.approx(0.9)
    assert factor(9) == 1.0


def test_warmup_longer_than_the_run_still_rises() -> None:
    factor = lr_factor(LRScheduler(warmup_steps=10, decay="cosine"), total_steps=3)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_only_matrices_and_stacks_of_them_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.Bilinear(4, 4, 4, bias=False))
    groups = build_optimizer(model, Optimizer(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.1, [3]),
        (0.0, [1, 1]),
    ]


def test_clipping_scales_to_the_norm_and_zero_turns_it_off() -> None:
    model = nn.Linear(2, 1, bias=False)
    for max_norm, expected in ((1.0, [0.6, 0.8]), (0.0, [3.0, 4.0])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert float(clip_grad_norm(model, max_norm)) == pytest.approx(5.0)
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_state_is_there_before_the_first_update_and_changes_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5))
    assert all(p.equal(old) and p.grad is None for p, old in zip(model.parameters(), before, strict=True))
    get_optimizer_state_dict(model, optimizer)  # as a checkpoint does; it makes what is missing
    assert len(optimizer.state) == len(before)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())

    # torch's own AdamW makes its state in the first step.
    twin = copy.deepcopy(model)
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    for group, source in zip(groups, optimizer.param_groups, strict=True):
        group["params"] = [dict(twin.named_parameters())[names[id(p)]] for p in source["params"]]
    for each, stepped in ((model, optimizer), (twin, torch.optim.AdamW(groups))):
        for _ in range(2):
            each(torch.ones(3, 4)).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
