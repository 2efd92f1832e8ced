"""The FlexSP-style planner: invariants of its plans, and its distance to the best grouping."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.experiments.paper.flexsp import FlexSPPlan, plan_flexsp, replay_concurrent, sample_seconds
from hbp_titan.packing import Level, measure
from hbp_titan.tuning.simulate import replay
from hbp_titan.tuning.time_model import TimeModel
from tests.properties import examples
from tests.tuning.toy import MACHINE, TOY

WORLD = 4
LEVELS = (Level(8, 1), Level(16, 2), Level(32, 4))
MODEL = TimeModel(TOY, MACHINE, WORLD)
# Nearly free communication makes large groups worthwhile.
FAST = TimeModel(TOY, dataclasses.replace(MACHINE, intra_node_bandwidth=1e4, inter_node_bandwidth=1e4), WORLD)


def makespans(plan: FlexSPPlan, model: TimeModel) -> np.ndarray:
    """Return the makespan of each micro-batch by the sums of its groups."""
    slowest = np.zeros(plan.micro_batches)
    for g in range(plan.groups.num_rows):
        ids = plan.groups.ids[plan.groups.offsets[g] : plan.groups.offsets[g + 1]]
        seconds = sample_seconds(model, LEVELS[plan.level_of_group[g]], plan.lengths[ids]).sum()
        micro_batch = plan.micro_batch_of_group[g]
        slowest[micro_batch] = max(slowest[micro_batch], seconds)
    return slowest


@examples(60)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.integers(0, 3))
def test_every_sample_once_within_memory_and_ranks(lengths: list[int], seed: int) -> None:
    plan = plan_flexsp(lengths, LEVELS, MODEL, seed)
    assert sorted(plan.groups.ids.tolist()) == list(range(len(lengths)))
    capacity = np.array([level.max_tokens for level in LEVELS])[plan.level_of_group]
    assert np.all(plan.groups.sums(plan.lengths) <= capacity)
    degrees = np.array([level.cp_degree for level in LEVELS])[plan.level_of_group]
    assert np.bincount(plan.micro_batch_of_group, weights=degrees).max() <= WORLD
    iterations = plan.as_plan()
    assert sorted(iterations.packs.ids.tolist()) == list(range(len(lengths)))
    assert iterations.packs.num_rows == iterations.pack_offsets[-1]
    capacity = np.array([level.max_tokens for level in LEVELS])[iterations.pack_levels]
    assert np.all(iterations.pack_tokens <= capacity)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Yield every partition of the items."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for i in range(len(groups)):
            yield [*groups[:i], [first, *groups[i]], *groups[i + 1 :]]


def best_makespan(lengths: list[int], model: TimeModel) -> float:
    """Return the best makespan of all groupings that fit in one micro-batch, infinity if none does."""
    best = float("inf")
    for groups in partitions(lengths):
        for chosen in itertools.product(LEVELS, repeat=len(groups)):
            if sum(level.cp_degree for level in chosen) > WORLD:
                continue
            if any(sum(g) > level.max_tokens for g, level in zip(groups, chosen, strict=True)):
                continue
            times = [sample_seconds(model, level, np.array(g)).sum() for g, level in zip(groups, chosen, strict=True)]
            best = min(best, max(times))
    return best


@examples(40)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=5), st.sampled_from([MODEL, FAST]))
def test_makespan_is_close_to_the_best_grouping(lengths: list[int], model: TimeModel) -> None:
    plan = plan_flexsp(lengths, LEVELS, model)
    if plan.micro_batches == 1:
        best, reached = best_makespan(lengths, model), makespans(plan, model)[0]
        # The worst case has few samples: of five equal ones, one of four ranks gets two, while the best grouping shares
        # each among all ranks (at most 1.58 times, found by trying all lengths).
        assert best <= reached * (1 + 1e-9)
        assert reached <= 1.6 * best


def test_concurrent_groups_wait_for_the_slowest() -> None:
    # A document of 16 tokens needs two ranks, two of 8 one each: all in one micro-batch.
    plan = plan_flexsp([16, 8, 8], LEVELS, MODEL)
    assert plan.micro_batches == 1
    result = replay_concurrent(plan, MODEL)
    long, short = (sample_seconds(MODEL, level, np.array([n]))[0] for level, n in ((LEVELS[1], 16), (LEVELS[0], 8)))
    # 8 tokens per rank: 4.8 s of matrix products, of FSDP's 15 + 37.5 s 15 - 1.6 and 37.5 - 3.2 are not hidden.
    assert result.seconds - result.steps == pytest.approx(max(long, short) + 13.4 + 34.3)
    assert result.idle == pytest.approx(abs(long - short) / 2)
    assert result.cr == 0.5


def test_as_plan_separates_the_levels() -> None:
    plan = plan_flexsp([16, 8, 8], LEVELS, MODEL).as_plan()
    assert plan.level_of_iteration.tolist() == [0, 1]
    # Half of the ranks idle: two empty packs next to 8 and 8, one next to 16.
    assert plan.pack_tokens.tolist() == [8, 8, 0, 0, 16, 0]
    assert measure(plan).pr == 0.5
    assert replay(plan, MODEL).micro_batches == 2


def test_sample_above_the_largest_level_raises() -> None:
    with pytest.raises(ValueError, match="33 tokens"):
        plan_flexsp([4, 33], LEVELS, MODEL)
    with pytest.raises(ValueError, match="world size 2"):
        plan_flexsp([4], LEVELS, TimeModel(TOY, MACHINE, 2))
