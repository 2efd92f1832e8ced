"""build_plan: lengths to a plan, the one entry of this room.

Owns the registry of methods and the order of the stages: pack and fill, balance, schedule. The stages themselves
live in hierarchy.py, packers.py, balance.py and schedule.py. Everything is a pure function of its arguments.

Packs to iterations: the packs that run side by side cost nearly the same (paper section 3.2, balance batching).

Owns the order of packs within a level, whose consecutive groups of dp packs are the iterations, and the empty packs
that complete the last one. Sorting by modelled time rather than by sum(len^2), as the paper does, also balances
packs that differ in tokens.

Elastic remainder: what is left of an epoch, planned anew for another world size or other levels.

Owns the promise that a run which stops and goes on elsewhere trains each sample of the epoch exactly once.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from hbp_titan.packing.baselines import PACKERS, isf
from hbp_titan.packing.cost import CostModel, costs_per_level
from hbp_titan.packing.hbp import hierarchical_packs, paper_packs
from hbp_titan.packing.level import Level, check_levels
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.ragged import (
    EMPTY,
    IntArray,
    Ragged,
    Stream,
    concatenated,
    longest_first,
    offsets_of,
    round_up,
    shuffled,
)
from hbp_titan.packing.schedule import LEVEL_ORDERS, schedule

# (tokens, sum_sq, cost, stream) -> order of the packs; tokens, sum_sq: int64 [num_packs].
Balancer = Callable[[IntArray, IntArray, CostModel, Stream], IntArray]


def _by_cost(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.argsort(-cost.cost(tokens, sum_sq), kind="stable")


def _by_attention(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.argsort(-sum_sq, kind="stable")


def _shuffled(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return shuffled(len(tokens), *stream)


def _kept(tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    return np.arange(len(tokens))


BALANCERS: dict[str, Balancer] = {
    "cost": _by_cost,
    "attention": _by_attention,
    "shuffled": _shuffled,
    "kept": _kept,
}


def whole_iterations(packs: Ragged, dp_degree: int) -> Ragged:
    """The packs and as many empty ones as complete the last iteration."""
    missing = round_up(packs.num_rows, dp_degree) - packs.num_rows
    return Ragged(packs.ids, np.append(packs.offsets, np.full(missing, packs.offsets[-1])))


# Names of random streams: with seed and epoch before them, no two stages share numbers.
PACK_STREAM, BALANCE_STREAM, SCHEDULE_STREAM = 0, 1, 2

OVERLONG = ("error", "skip")

LevelPacks = Callable[[IntArray, Sequence[Level], int, Stream], list[Ragged]]


@dataclass(frozen=True)
class Method:
    """How packs are made and put side by side.

    pack(lengths, levels, world_size, stream) -> packs of positions in `lengths` per level, in any number.
    balancer: a name of BALANCERS. summary: one line for tables and help.
    """

    pack: LevelPacks
    balancer: str
    summary: str


def _hbp(lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return hierarchical_packs(lengths, longest_first(lengths, *stream), levels, world_size)


def _hbp_paper(lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return paper_packs(lengths, levels, lambda own, capacity: isf(own, capacity, stream), stream)


def _flat(packer: str, lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return [EMPTY] * (len(levels) - 1) + [PACKERS[packer].pack(lengths, levels[-1].max_tokens, stream)]


METHODS: dict[str, Method] = {
    "hbp": Method(_hbp, "cost", "levels, even packs, largest-first fill, balanced by modelled time"),
    "hbp_paper": Method(_hbp_paper, "attention", "levels as the paper prints it: ISF, greedy fill, sort by sum(len^2)"),
    "flat_sorted": Method(partial(_flat, "bfd"), "cost", "one length, best-fit decreasing, balanced by modelled time"),
    **{
        name: Method(partial(_flat, name), "kept" if name == "sorted" else "shuffled", f"one length: {packer.source}")
        for name, packer in PACKERS.items()
    },
}


def build_plan(
    lengths: ArrayLike,
    levels: Sequence[Level],
    world_size: int,
    method: str = "hbp",
    seed: int = 0,
    *,
    loss_tokens: ArrayLike | None = None,
    cost: CostModel | Sequence[CostModel] | None = None,
    global_batch_tokens: int = 0,
    level_order: str = "alternate",
    curriculum_steps: float = 0,
    epoch: int = 0,
    overlong: str = "error",
) -> Plan:
    """Plan one epoch: every sample in exactly one pack, every rank the same number of iterations.

    lengths: tokens of each sample, ints [num_samples], at least 1. loss_tokens: how many of them bear loss, default
        all but the first.
    levels: ascending in max_tokens; methods other than hbp and hbp_paper use the largest alone.
    world_size: ranks; an iteration of level i holds world_size / cp_degree_i packs, some empty where samples run out.
    method: a key of METHODS. seed, epoch: name the random numbers; each epoch packs and orders anew.
    cost: what balances the packs of an iteration, one model or one per level; default CostModel().
    global_batch_tokens: real tokens that an optimizer step comes close to; 0 makes each iteration a step.
    level_order: "alternate" (each step one level, in random order) or "interleave" (each step a share of each level).
    curriculum_steps: steps of the lowest level that come first, in epoch 0 only; below 1 a share of all steps.
    overlong: what to do about a sample longer than the largest level: "error", or "skip" it and list it in
        plan.skipped.

    Raises ValueError for a sample longer than the largest level and for values outside these domains.
    """
    levels = tuple(levels)
    check_levels(levels, world_size)
    lengths = _int_array("lengths", lengths, 1)
    loss_tokens = lengths - 1 if loss_tokens is None else _int_array("loss_tokens", loss_tokens, 0)
    _check_loss_tokens(lengths, loss_tokens)
    sample_ids = None
    if overlong == "error":
        check_fit(lengths, None, levels[-1])
    elif np.any(lengths > levels[-1].max_tokens):
        sample_ids = np.flatnonzero(lengths <= levels[-1].max_tokens)
        if not len(sample_ids):
            raise ValueError(f"every sample is longer than max_tokens={levels[-1].max_tokens}: raise levels.max_tokens")
    if method not in METHODS:
        close = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(method, METHODS, n=1))
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}{close}")
    for name, choice, choices in (("level_order", level_order, LEVEL_ORDERS), ("overlong", overlong, OVERLONG)):
        if choice not in choices:
            raise ValueError(f"{name}={choice!r} is none of {', '.join(choices)}")
    for name, value in (
        ("seed", seed),
        ("epoch", epoch),
        ("global_batch_tokens", global_batch_tokens),
        ("curriculum_steps", curriculum_steps),
    ):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    unplaced = Plan(
        levels=levels,
        world_size=world_size,
        method=method,
        seed=seed,
        epoch=epoch,
        global_batch_tokens=global_batch_tokens,
        level_order=level_order,
        curriculum_steps=float(curriculum_steps),
        costs=costs_per_level(cost, len(levels)),
        lengths=lengths,
        loss_tokens=loss_tokens,
        packs=EMPTY,
        level_of_iteration=EMPTY.ids,
        step_offsets=EMPTY.offsets,
    )
    return place(unplaced, sample_ids)


def place(unplaced: Plan, sample_ids: IntArray | None = None) -> Plan:
    """The plan of these samples (ids, int64 [n]; default all) under the settings of `unplaced`."""
    stream = (unplaced.seed, unplaced.epoch)
    method = METHODS[unplaced.method]
    lengths = unplaced.lengths if sample_ids is None else unplaced.lengths[sample_ids]
    per_level = method.pack(lengths, unplaced.levels, unplaced.world_size, (*stream, PACK_STREAM))
    per_level = [whole_iterations(p, int(dp)) for p, dp in zip(per_level, unplaced.dp_degrees, strict=True)]
    bounds = offsets_of(np.array([p.num_rows for p in per_level]))
    packs = concatenated(per_level)
    del per_level  # a fifth of the peak memory
    tokens, sum_sq = packs.sums(lengths), packs.sums_of_squares(lengths)

    balanced = []
    for level, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        order = BALANCERS[method.balancer](
            tokens[start:end], sum_sq[start:end], unplaced.costs[level], (*stream, BALANCE_STREAM, level)
        )
        balanced.append(start + order)
    level_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds) // unplaced.dp_degrees)
    iterations = Ragged(np.concatenate(balanced), offsets_of(unplaced.dp_degrees[level_of]))

    steps = schedule(
        level_of,
        iterations.sums(tokens),
        global_batch_tokens=unplaced.global_batch_tokens,
        level_order=unplaced.level_order,
        curriculum_steps=unplaced.curriculum_steps if unplaced.epoch == 0 else 0,
        stream=(*stream, SCHEDULE_STREAM),
    )
    placed = packs.take(iterations.take(steps.ids).ids)
    return dataclasses.replace(
        unplaced,
        packs=placed if sample_ids is None else Ragged(sample_ids[placed.ids], placed.offsets),
        level_of_iteration=level_of[steps.ids],
        step_offsets=steps.offsets,
    )


def _int_array(name: str, values: ArrayLike, lowest: int) -> IntArray:
    """Values as int64 [n]; ValueError for another shape, a fraction or a value below `lowest`."""
    array = np.asarray(values)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be one-dimensional and not empty, not of shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    array = np.ascontiguousarray(array, np.int64)
    if array.min() < lowest:
        at = int(array.argmin())
        raise ValueError(f"{name}[{at}] = {array[at]} is below {lowest}: leave that sample out")
    return array


def _check_loss_tokens(lengths: IntArray, loss_tokens: IntArray) -> None:
    if len(lengths) != len(loss_tokens):
        raise ValueError(f"{len(lengths)} lengths but {len(loss_tokens)} loss_tokens: give one of each per sample")
    if np.any(loss_tokens > lengths):
        at = int(np.argmax(loss_tokens > lengths))
        raise ValueError(f"sample {at} has {loss_tokens[at]} loss_tokens but only {lengths[at]} tokens")


def check_fit(lengths: IntArray, sample_ids: IntArray | None, largest: Level) -> None:
    """Raise ValueError, naming its id, for a sample longer than the largest level; sample_ids: default 0 to n - 1."""
    at = int(lengths.argmax())
    if lengths[at] > largest.max_tokens:
        count = int(np.count_nonzero(lengths > largest.max_tokens))
        raise ValueError(
            f"sample {at if sample_ids is None else sample_ids[at]} has {lengths[at]} tokens, more than the largest "
            f"level's max_tokens={largest.max_tokens} ({count} such samples in all): raise levels.max_tokens, or "
            "truncate or leave out these samples (overlong)"
        )


def replan(
    plan: Plan,
    finished_iterations: int,
    *,
    world_size: int | None = None,
    levels: Sequence[Level] | None = None,
    cost: CostModel | Sequence[CostModel] | None = None,
    global_batch_tokens: int | None = None,
) -> Plan:
    """The plan of the samples that iterations finished_iterations, finished_iterations + 1, ... of `plan` hold.

    After s optimizer steps finished_iterations is plan.step_offsets[s]. What is not given stays as in `plan`;
    sample ids, lengths and loss tokens stay those of the whole data set, so remainders can follow one another.
    Curriculum steps that are left come first again.

    Raises ValueError where nothing is left, a remaining sample is longer than the new levels allow, the levels do
    not suit the world size, or the number of levels changes and `plan` has a cost model for each of its own.
    """
    if not 0 <= finished_iterations < plan.num_iterations:
        raise ValueError(
            f"{finished_iterations} finished iterations leave nothing of a plan with {plan.num_iterations}: "
            "start the next epoch"
        )
    levels = plan.levels if levels is None else tuple(levels)
    world_size = plan.world_size if world_size is None else world_size
    check_levels(levels, world_size)
    if cost is None:
        cost = plan.costs[0] if len(set(plan.costs)) == 1 else plan.costs
    # Packs lie in training order.
    left = np.sort(plan.packs.ids[plan.packs.offsets[plan.pack_offsets[finished_iterations]] :])
    check_fit(plan.lengths[left], left, levels[-1])
    curriculum_steps = plan.curriculum_steps
    if 0 < curriculum_steps < 1:
        curriculum_steps *= plan.num_steps
    finished_steps = int(plan.step_of_iteration[finished_iterations])
    unplaced = dataclasses.replace(
        plan,
        levels=levels,
        world_size=world_size,
        costs=costs_per_level(cost, len(levels)),
        curriculum_steps=max(0.0, float(round(curriculum_steps) - finished_steps)),
        global_batch_tokens=plan.global_batch_tokens if global_batch_tokens is None else global_batch_tokens,
    )
    return place(unplaced, left)
