"""Levels side by side: comparable costs, and a proposal that waits little and costs little."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hbp_titan.config import JobConfig
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import CostModel, Level, build_plan
from hbp_titan.packing.parallel import rank_costs
from hbp_titan.tuning import parallel_levels
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.parallel_levels import costs_on, propose
from hbp_titan.tuning.search import Workload
from hbp_titan.tuning.simulate import pack_seconds, replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import time_model

ARGS, HARDWARE = get_flavor("llama3_1_8b"), get_hardware("h100-80gb")


def workload(num_samples: int, ranks: int) -> Workload:
    lengths = tulu3_longcite_like(num_samples, seed=3)
    return Workload(lengths, lengths - 1, ranks, CostModel())


def test_planned_costs_are_the_simulated_seconds() -> None:
    config = JobConfig()
    config.levels = [Level(16384), Level(65536, 8), Level(131072, 32, "hybrid"), Level(262144, 32, "hybrid", "full")]
    samples = workload(20_000, 64)
    costs = costs_on(HARDWARE, config, ARGS, 64, samples)
    plan = build_plan(samples.lengths, config.levels, 64, cost=costs, level_order="parallel")
    simulated = sum(pack_seconds(plan, time_model(ARGS, config, HARDWARE, 64), True).values())
    planned = rank_costs(plan.levels, costs, plan.pack_levels, plan.pack_sum_sq)
    # Left out of the cost: partly filled tiles of attention, and trained tokens that a pack lacks.
    full = plan.pack_tokens > 0.9 * np.array([level.max_tokens for level in plan.levels])[plan.pack_levels]
    np.testing.assert_allclose(planned[full], simulated[full], rtol=0.03)


def test_without_known_hardware_costs_are_flops_with_recomputation() -> None:
    config = JobConfig()
    config.levels = [Level(16384), Level(32768, 2, ac_policy="full")]
    plain, recomputing = costs_on(None, config, ARGS, 2, workload(100, 2))
    assert recomputing.alpha / plain.alpha == pytest.approx(1.25, abs=0.1)
    assert recomputing.beta / plain.beta == pytest.approx(4 / 3)


def test_proposed_levels_hold_the_longest_sample_and_hardly_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer candidates than in use: each costs a memory estimate.
    monkeypatch.setattr(parallel_levels, "SHARES", (1 / 2, 1))
    monkeypatch.setattr(parallel_levels, "LOWEST", (1,))
    config, samples = JobConfig(), workload(10_000, 16)
    config.levels = [Level(16384)]
    found = propose(config, ARGS, HARDWARE, samples)
    assert found.levels[0].cp_degree == 1
    assert max(level.max_tokens for level in found.levels) >= samples.lengths.max()
    assert found.replay.share("idle") < 0.06
    assert found.replay.tokens == samples.lengths.sum()
    model = time_model(ARGS, config, HARDWARE, 16)
    # Faster than one level for all.
    flat = [dataclasses.replace(found.levels[-1], ac_policy="full")]
    assert found.replay.seconds < replay(build_plan(samples.lengths, flat, 16, "isf"), model).seconds
    assert "packing.level_order" in found.describe(found.replay.seconds)


def test_a_lowest_level_that_does_not_fit_is_refused() -> None:
    config = JobConfig()
    config.levels = [Level(1 << 22)]
    with pytest.raises(ValueError, match="lower"):
        propose(config, ARGS, HARDWARE, workload(100, 8))
