"""The four normalizers against their definitions, computed from the packs of a step by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hbp_titan.components.loss import NORMALIZERS, weight_range
from hbp_titan.packing import Level, Plan, build_plan

LENGTHS = np.array([3, 60, 7, 16, 9, 33, 2, 5, 11, 40, 8, 4, 6, 12])
LOSS_TOKENS = np.array([1, 20, 0, 15, 4, 32, 1, 2, 10, 0, 7, 3, 5, 6])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(
        LENGTHS,
        [Level(16), Level(64, 2)],
        2,
        loss_tokens=LOSS_TOKENS,
        global_batch_tokens=100,
        level_order="interleave",
    )


def _packs(plan: Plan, step: int) -> list[tuple[int, np.ndarray]]:
    """(iteration, sample ids) of each pack of a step."""
    iterations = range(plan.step_offsets[step], plan.step_offsets[step + 1])
    return [(i, pack) for i in iterations for pack in plan.iteration(i).packs]


def _objective(plan: Plan, name: str, step: int, losses: list[np.ndarray]) -> float:
    """What the weights make of given token losses, one array a sample."""
    total = 0.0
    for iteration, pack in _packs(plan, step):
        weights = NORMALIZERS[name](plan, iteration, pack)
        total += sum(weight * losses[i].sum() for weight, i in zip(weights, pack, strict=True))
    return total


def test_objectives_are_the_means_that_the_names_say(plan: Plan) -> None:
    rng = np.random.default_rng(0)
    losses = [rng.random(count) for count in LOSS_TOKENS]
    assert plan.num_steps >= 2
    assert max(np.diff(plan.step_offsets)) >= 2
    for step in range(plan.num_steps):
        packs = [np.concatenate([np.zeros(0), *(losses[i] for i in pack)]) for _, pack in _packs(plan, step)]
        samples = [losses[i] for _, pack in _packs(plan, step) for i in pack if len(losses[i])]
        tokens = np.concatenate(packs)
        expected = {
            "ave_token": tokens.mean(),
            "token_mean": np.mean([pack.mean() for pack in packs if len(pack)]),
            "sample_mean": np.mean([sample.mean() for sample in samples]),
            "sum": tokens.sum(),
        }
        for name, value in expected.items():
            assert _objective(plan, name, step, losses) == pytest.approx(value), name


def test_ave_token_alone_does_not_depend_on_how_samples_are_packed() -> None:
    rng = np.random.default_rng(1)
    losses = [rng.random(count) for count in LOSS_TOKENS]
    plans = [
        build_plan(
            LENGTHS, levels, world_size, loss_tokens=LOSS_TOKENS, global_batch_tokens=10_000, level_order="interleave"
        )
        for levels, world_size in (((Level(64),), 1), ((Level(16), Level(64, 2)), 2), ((Level(64, 4),), 4))
    ]
    assert [plan.num_steps for plan in plans] == [1, 1, 1]
    values = {name: [_objective(plan, name, 0, losses) for plan in plans] for name in NORMALIZERS}
    assert values["ave_token"] == pytest.approx([values["ave_token"][0]] * 3, rel=1e-12)
    assert values["token_mean"] != pytest.approx([values["token_mean"][0]] * 3, rel=1e-3)


def test_weight_range_says_how_unevenly_tokens_count() -> None:
    # One step of two packs: samples with 8 and with 1 + 1 trained tokens; T = 10.
    plan = build_plan([16, 9, 2], [Level(16)], 2, loss_tokens=[8, 1, 1])
    assert plan.num_steps == 1
    expected = {
        "ave_token": (1, 1),
        # Packs of 8 and of 2 trained tokens: 10 / (8 * 2) and 10 / (2 * 2).
        "token_mean": (0.625, 2.5),
        # Samples of 8, 1 and 1: 10 / (8 * 3) and 10 / (1 * 3).
        "sample_mean": (10 / 24, 10 / 3),
        "sum": (10, 10),
    }
    for name, bounds in expected.items():
        assert weight_range(NORMALIZERS[name], plan, 0) == pytest.approx(bounds), name
