"""Megatron's dynamic context parallelism: decisions by hand, invariants of plans, time and waiting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.experiments.paper.dynamic_cp import (
    DynamicCPPlan,
    Megatron,
    needed_degree,
    plan_dynamic_cp,
    replay_dynamic_cp,
    schedule_micro_batch,
)
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import Ragged
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.time_model import TimeModel, get_dims
from tests.properties import examples
from tests.tuning.toy import MACHINE, TOY


def groups_of(*lengths: int, ranks: int = 4, tokens: int = 16) -> list[tuple[int, list[int]]]:
    """Return (degree, lengths of the pack) of each group of one micro-batch."""
    groups = schedule_micro_batch(np.array(lengths), ranks, tokens)
    return [(degree, [lengths[i] for i in samples]) for degree, samples in groups]


def test_each_sample_gets_the_ranks_that_it_needs() -> None:
    assert [needed_degree(n, 16) for n in (1, 16, 17, 32, 33, 64)] == [1, 1, 2, 2, 4, 4]
    assert groups_of(32, 16, 16) == [(2, [32]), (1, [16]), (1, [16])]


def test_short_samples_fill_groups_whose_work_stays_below_the_longest() -> None:
    # 12^2 = 144 is the work of the slowest rank. The second 8 joins the first (64 + 64), the second 4 the first; a 4
    # next to 12 would make 160. The fourth rank is empty and joins 12.
    assert groups_of(12, 8, 8, 4, 4) == [(2, [12]), (1, [8, 8]), (1, [4, 4])]
    # Without a free rank, 12 takes the first 4 after all, and the next stays for another micro-batch.
    assert groups_of(12, 8, 8, 4, 4, ranks=2) == [(1, [12, 4]), (1, [8, 8])]


def test_a_sample_takes_more_ranks_than_it_needs_if_that_keeps_the_slowest_rank_faster() -> None:
    # 24 on two ranks: 288 each. On one rank 16 would be 256; that leaves the other empty, so it doubles: 128 each.
    assert groups_of(24, 16) == [(2, [24]), (2, [16])]


def test_empty_ranks_join_the_smallest_groups() -> None:
    assert groups_of(20, 8, ranks=8) == [(4, [20]), (4, [8])]
    assert groups_of(8, 8, 8, ranks=4) == [(2, [8]), (1, [8]), (1, [8])]


def test_samples_beyond_memory_and_other_worlds_raise() -> None:
    with pytest.raises(ValueError, match="65 tokens"):
        groups_of(65)
    with pytest.raises(ValueError, match="power of two"):
        groups_of(4, ranks=6)


@examples(60)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.integers(0, 3))
def test_every_sample_once_within_memory_and_ranks(lengths: list[int], seed: int) -> None:
    plan = plan_dynamic_cp(lengths, 4, 16, seed)
    assert sorted(plan.packs.ids.tolist()) == list(range(len(lengths)))
    assert np.all(plan.packs.counts > 0)
    assert np.all(plan.packs.sums(plan.lengths) <= 16 * plan.cp_degrees)
    assert np.all(np.bincount(plan.micro_batch_of, weights=plan.cp_degrees) == 4)
    assert np.all(np.diff(plan.step_of) >= 0)


def test_steps_can_be_limited() -> None:
    lengths = np.full(200, 16)
    whole, two = plan_dynamic_cp(lengths, 2, 16), plan_dynamic_cp(lengths, 2, 16, max_steps=2)
    # 0.95 x 8 x 2 x 16 = 243 tokens hold 15 samples.
    assert (whole.step_of[-1], two.step_of[-1]) == (13, 1)
    assert two.packs.ids.tolist() == whole.packs.ids[: two.packs.counts.sum()].tolist()


def toy_plan(lengths: list[int], degrees: list[int], micro_batch_of: list[int], step_of: list[int]) -> DynamicCPPlan:
    """Return a plan with one sample per pack on four ranks."""
    packs = Ragged(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    return DynamicCPPlan(4, np.array(lengths), packs, np.array(degrees), np.array(micro_batch_of), np.array(step_of))


TOY_RANKS = Megatron.of(TimeModel(TOY, dataclasses.replace(MACHINE, gpus_per_node=4), 4), 1)


def toy_level(degree: int) -> Level:
    return Level(16 * degree, degree)


def pack_seconds(length: int, degree: int) -> float:
    """Return the seconds of a pack of one sample, without the traffic of parameters."""
    loads = np.array([[1.0, length - 1, length**2, 1]])
    parts = TOY_RANKS.model.parts(toy_level(degree), loads, np.array([float(length)]))
    return float(sum(part[0] for name, part in parts.items() if name != "fsdp"))


def test_ranks_meet_only_where_they_share_a_pack_and_at_the_end_of_a_step() -> None:
    # Micro-batch 1: 16, 8, 8, 8 on a rank each; micro-batch 2: 8 on each of ranks 0 and 1, 32 on ranks 2 and 3.
    plan = toy_plan([16, 8, 8, 8, 8, 8, 32], [1, 1, 1, 1, 1, 1, 2], [0] * 4 + [1] * 3, [0, 0])
    found = replay_dynamic_cp(plan, TOY_RANKS, toy_level)
    one, half, shared = pack_seconds(16, 1), pack_seconds(8, 1), pack_seconds(32, 2)
    wall = max(one + half, half + shared)
    assert found.seconds - found.steps == pytest.approx(wall)
    busy = [one + half, 2 * half, half + shared, half + shared]
    assert found.idle == pytest.approx(wall - sum(busy) / 4)
    assert found.cr == pytest.approx(32 / 88)
    # In two steps, and with a wait in between, it takes longer.
    apart = replay_dynamic_cp(dataclasses.replace(plan, step_of=np.array([0, 1])), TOY_RANKS, toy_level)
    assert apart.seconds - apart.steps == pytest.approx(one + max(half, shared))
    assert apart.steps == pytest.approx(2 * found.steps)


@pytest.mark.parametrize(("degree", "tokens"), [(1, 9.0), (2, 12.0), (4, 16.0)])
def test_samples_are_padded_to_two_chunks_per_rank(degree: int, tokens: float) -> None:
    plan = toy_plan([9] * (4 // degree), [degree] * (4 // degree), [0] * (4 // degree), [0])
    found = replay_dynamic_cp(plan, TOY_RANKS, toy_level)
    loads = np.array([[1.0, 8, 81, 1]])
    assert found.parts["linear"] == pytest.approx(
        TOY_RANKS.model.parts(toy_level(degree), loads, np.array([tokens]))["linear"][0]
    )


LLAMA, H100 = get_dims("llama3_1_8b"), get_hardware("h100-80gb")


def test_state_has_all_parameters_and_gradients_and_a_share_of_the_optimizer() -> None:
    params = LLAMA.params
    assert Megatron.of(TimeModel(LLAMA, H100, 8), 1).state_bytes() == 6 * params + 12 * params // 8
    # Two GPUs work as one rank of twice the memory.
    halves = Megatron.of(TimeModel(LLAMA, H100, 8), 2)
    assert halves.model.world_size == 4
    assert halves.model.hardware.memory_bytes == 2 * H100.memory_bytes


def tensor_seconds(degree: int, policy: str = "none", tensor_parallel: int = 8) -> float:
    megatron = Megatron.of(TimeModel(LLAMA, H100, 64), tensor_parallel)
    return float(megatron.tensor_seconds(Level(16384 * degree, degree, ac_policy=policy), np.array([16384.0]))[0])


def test_tensor_parallelism_costs_eight_exchanges_of_hidden_states_per_layer() -> None:
    sent = 16384 * LLAMA.hidden_size * 2 * 7 / 8
    assert tensor_seconds(1) == pytest.approx(0.5 * 8 * LLAMA.num_layers * sent / (450e9 * 0.8))
    assert tensor_seconds(1, "full") == pytest.approx(1.5 * tensor_seconds(1))
    assert tensor_seconds(2) == pytest.approx(tensor_seconds(1) / 2)
    assert tensor_seconds(1, tensor_parallel=1) == 0
