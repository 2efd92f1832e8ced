"""Simulated methods: the list of methods, memory plans by method, FlexSP's levels, HBP without balance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hbp_titan.experiments.paper.methods import (
    DEFAULT_METHODS,
    check_methods,
    flexsp_levels,
    level_cost,
    memory_choice,
    replay_megatron,
    replay_methods,
    without_balance,
)
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level, build_plan, measure
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.simulate import Replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import TimeModel, get_dims

LEVELS = [Level(16384, 1, ac_policy="full"), Level(131072, 8, ac_policy="full")]
MODEL = TimeModel(get_dims("llama3_1_8b"), get_hardware("h100-80gb"), 32)


def test_every_method_trains_the_same_tokens() -> None:
    lengths = tulu3_longcite_like(10_000)
    replays = replay_methods(lengths, LEVELS, MODEL, DEFAULT_METHODS)
    assert tuple(replays) == DEFAULT_METHODS
    assert {r.tokens for r in replays.values()} == {int(lengths.sum())}
    assert all(r.idle >= 0 and r.seconds > 0 for r in replays.values())


def test_flexsp_has_a_level_per_power_of_two_and_the_degree_itself() -> None:
    levels = flexsp_levels(Level(131072, 8, ac_policy="full", ac_layers=4))
    assert [(level.max_tokens, level.cp_degree) for level in levels] == [
        (16384, 1),
        (32768, 2),
        (65536, 4),
        (131072, 8),
    ]
    assert {(level.ac_policy, level.ac_layers) for level in levels} == {("full", 4)}
    assert [level.cp_degree for level in flexsp_levels(Level(12, 6))] == [1, 2, 6]


def test_without_balance_regroups_the_same_packs() -> None:
    plan = build_plan(tulu3_longcite_like(10_000), LEVELS, 8, "hbp_paper")
    unbalanced = without_balance(plan)
    for level in range(2):
        own = plan.pack_levels == level
        np.testing.assert_array_equal(np.sort(plan.pack_sum_sq[own]), np.sort(unbalanced.pack_sum_sq[own]))
    assert measure(unbalanced).abr > 5 * measure(plan).abr


def test_level_cost_is_its_seconds_without_constant_and_documents() -> None:
    time, cost = MODEL.level_time(LEVELS[1]), level_cost(MODEL, LEVELS[1])
    # Two packs, all tokens trained: 1000 documents of 100 tokens, and one of 100,000.
    loads = np.array([[1.0, 1e5, 1e7, 1000], [1.0, 1e5, 1e10, 1]])
    difference = np.diff(cost.cost(np.array([10**5, 10**5]), np.array([10**7, 10**10])))
    np.testing.assert_allclose(difference, np.diff(dataclasses.replace(time, per_document=0.0).seconds(loads)))


def test_unknown_method_names_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean flexsp"):
        check_methods(["isf", "flexp"])


H100, LLAMA = get_hardware("h100-80gb"), get_flavor("llama3_1_8b")
FORMS = [Level(16384, 1), Level(131072, 8)]


def test_each_method_gets_the_fastest_memory_plan_that_fits() -> None:
    lengths = tulu3_longcite_like(10_000)
    choice = memory_choice(LLAMA, H100, 32, FORMS)
    assert choice is not None
    for form in FORMS:
        found = [candidate.level for candidate in choice.candidates(form)]
        assert all(choice.peak_bytes(level) <= 0.95 * H100.memory_bytes for level in found)
        assert {"full", "keep_attention"} <= {level.ac_policy for level in found}
        assert choice.fastest(form) in found
    names = ("isf", "flat_sorted", "hbp_paper", "hbp", "flexsp")
    fixed = [dataclasses.replace(level, ac_policy="full") for level in FORMS]
    best = replay_methods(lengths, FORMS, choice.model, names, choice=choice)
    full = replay_methods(lengths, fixed, choice.model, names)
    assert all(best[name].seconds < full[name].seconds for name in names)


def test_parameters_go_to_the_host_only_if_nothing_else_fits() -> None:
    small = dataclasses.replace(H100, memory_bytes=int(45e9))
    # 8.03B parameters take 16 GB on each of 8 ranks.
    for machine, offload in ((H100, False), (dataclasses.replace(small, memory_bytes=int(20e9)), True)):
        choice = memory_choice(LLAMA, machine, 8, [Level(4096, 1)])
        assert choice is not None
        assert choice.model.sharding.cpu_offload == offload
    assert memory_choice(LLAMA, dataclasses.replace(small, memory_bytes=int(2e9)), 8, [Level(4096, 1)]) is None


def megatron(flavor: str, world_size: int) -> Replay | None:
    lengths = tulu3_longcite_like(1_000)
    return replay_megatron(lengths, FORMS[1], TimeModel(get_dims(flavor), H100, world_size))


@pytest.mark.parametrize("flavor", ["deepseek_v2_236b", "qwen3_30b_a3b"])
def test_megatron_supports_neither_experts_nor_latent_attention(flavor: str) -> None:
    assert megatron(flavor, 64) is None


@pytest.mark.slow
def test_megatron_uses_tensor_parallelism_for_models_that_one_gpu_does_not_hold() -> None:
    # 70B x 6 bytes on 8 GPUs of a node are 53 GB each, but not on fewer; with them a rank holds 128K tokens.
    large = megatron("llama3_1_70b", 64)
    assert large is not None
    assert large.world_size == 64
    assert large.cr == 0.0
    # The optimizer's 12 bytes are not sharded over a single node.
    assert megatron("llama3_1_70b", 8) is None
