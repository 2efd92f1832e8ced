"""build_plan and replan: lengths to a plan, the entry of this package.

Owns the registry of methods and the order of the stages: pack and fill (hbp.py, baselines.py), balance, schedule
(schedule.py). Balancing orders the packs of a level so that those of one iteration cost nearly the same (paper section
3.2, balance batching); sorting by modelled time rather than by sum(len^2), as the paper does, also balances packs that
differ in tokens. Everything is a pure function of its arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

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

OVERLONG = ("error", "skip")

# Identify random streams: with seed and epoch before them, no two stages share numbers.
PACK_STREAM, BALANCE_STREAM, SCHEDULE_STREAM = 0, 1, 2

# (lengths, levels, world_size, stream) -> packs of positions in `lengths` per level, in any number.
LevelPacker = Callable[[IntArray, Sequence[Level], int, Stream], list[Ragged]]


class Method(NamedTuple):
    """How packs are made and ordered. balance: as in _balanced_order. summary: one line for tables and help."""

    pack: LevelPacker
    balance: str
    summary: str


def _hbp(lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return hierarchical_packs(lengths, longest_first(lengths, stream), levels, world_size)


def _hbp_paper(lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return paper_packs(lengths, levels, lambda own, capacity: isf(own, capacity, stream), stream)


def _flat(packer: str, lengths: IntArray, levels: Sequence[Level], world_size: int, stream: Stream) -> list[Ragged]:
    return [EMPTY] * (len(levels) - 1) + [PACKERS[packer].pack(lengths, levels[-1].max_tokens, stream)]


METHODS: dict[str, Method] = {
    "hbp": Method(_hbp, "cost", "levels, even packs, largest-first fill, balanced by modelled time"),
    "hbp_paper": Method(_hbp_paper, "attention", "levels as the paper prints it: ISF, greedy fill, sort by sum(len^2)"),
    "flat_sorted": Method(partial(_flat, "bfd"), "cost", "one length, best-fit decreasing, balanced by modelled time"),
    **{
        # "sorted" puts similar packs into one iteration; a shuffle would undo it.
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

    lengths: tokens of each sample, ints [num_samples], at least 1. loss_tokens: how many of them have a loss, default
        all but the first.
    levels: ascending in max_tokens; methods other than hbp and hbp_paper use only the largest.
    world_size: ranks; an iteration of level i holds world_size / cp_degree_i packs, some perhaps empty.
    method: a key of METHODS. seed, epoch: select the random numbers; each epoch is packed and ordered differently.
    cost: balances the packs of an iteration, one model or one per level; default CostModel().
    global_batch_tokens: target real tokens of an optimizer step; 0 makes each iteration a step.
    level_order: "alternate" (each step one level, in random order), "interleave" (each step a share of each level) or
        "parallel" (each iteration a share of each level, side by side on different ranks).
    curriculum_steps: steps of the lowest level that come first, in epoch 0 only; below 1 a share of all steps.
    overlong: a sample longer than the largest level is an "error", or "skip" lists it in plan.skipped.

    Raises ValueError for a sample longer than the largest level and for values outside these domains.
    """
    levels = tuple(levels)
    _check_choice("level_order", level_order, LEVEL_ORDERS)
    check_levels(levels, world_size, side_by_side=level_order == "parallel")
    _check_choice("method", method, METHODS)
    check_side_by_side(method, level_order, curriculum_steps)
    _check_choice("overlong", overlong, OVERLONG)
    _check_not_negative(
        seed=seed, epoch=epoch, global_batch_tokens=global_batch_tokens, curriculum_steps=curriculum_steps
    )
    lengths = _int_array("lengths", lengths, 1)
    loss_tokens = lengths - 1 if loss_tokens is None else _int_array("loss_tokens", loss_tokens, 0)
    _check_loss_tokens(lengths, loss_tokens)
    if overlong == "error":
        _check_fit(lengths, None, levels[-1])
    template = Plan(
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
        pack_levels=EMPTY.ids,
        step_offsets=EMPTY.offsets,
    )
    return _pack_and_schedule(template, _ids_that_fit(lengths, levels[-1].max_tokens))


def replan(
    plan: Plan,
    finished_iterations: int,
    *,
    world_size: int | None = None,
    levels: Sequence[Level] | None = None,
    cost: CostModel | Sequence[CostModel] | None = None,
    global_batch_tokens: int | None = None,
) -> Plan:
    """Plan the samples that iterations finished_iterations, finished_iterations + 1, ... of `plan` hold.

    Lets a run continue on another world size or with other levels and still train each sample of the epoch exactly
    once. After s optimizer steps finished_iterations is plan.step_offsets[s]. Options that are not given stay as in
    `plan`; sample ids, lengths and loss tokens stay those of the whole data set, so a replanned plan can be replanned.
    The remaining curriculum steps come first again.

    Raises ValueError if nothing remains, a remaining sample is longer than the new levels allow, the levels do not
    match the world size, or the number of levels changes and `plan` has a cost model for each of its own.
    """
    if not 0 <= finished_iterations < plan.num_iterations:
        raise ValueError(
            f"{finished_iterations} finished iterations of {plan.num_iterations}: nothing remains to plan; start the "
            "next epoch"
        )
    levels = plan.levels if levels is None else tuple(levels)
    world_size = plan.world_size if world_size is None else world_size
    check_levels(levels, world_size, side_by_side=plan.level_order == "parallel")
    if cost is None:
        cost = plan.costs[0] if len(set(plan.costs)) == 1 else plan.costs
    # Packs are in training order, so the remaining ids are one slice. Sorted, they do not depend on the old packs.
    remaining = np.sort(plan.packs.ids[plan.packs.offsets[plan.pack_offsets[finished_iterations]] :])
    _check_fit(plan.lengths[remaining], remaining, levels[-1])
    curriculum_steps = plan.curriculum_steps
    # A share counts the steps of the whole epoch, so it becomes a number before it is reduced.
    if 0 < curriculum_steps < 1:
        curriculum_steps *= plan.num_steps
    finished_steps = int(plan.step_of_iteration[finished_iterations])
    template = dataclasses.replace(
        plan,
        levels=levels,
        world_size=world_size,
        costs=costs_per_level(cost, len(levels)),
        curriculum_steps=max(0.0, float(round(curriculum_steps) - finished_steps)),
        global_batch_tokens=plan.global_batch_tokens if global_batch_tokens is None else global_batch_tokens,
    )
    return _pack_and_schedule(template, remaining)


def _pack_and_schedule(template: Plan, sample_ids: IntArray | None = None) -> Plan:
    """Return the plan of these samples (ids, int64 [n]; default all) with the settings of `template`."""
    stream = (template.seed, template.epoch)
    method = METHODS[template.method]
    lengths = template.lengths if sample_ids is None else template.lengths[sample_ids]
    if template.level_order == "parallel":
        # Not at the top: few runs train levels side by side.
        from hbp_titan.packing.parallel import mixed_iterations

        levels, costs = template.levels, template.costs
        packs, level_of, mixed = mixed_iterations(lengths, levels, costs, template.world_size, (*stream, PACK_STREAM))
        # Every iteration is a share of all levels, so that the schedule need not tell them apart.
        order, of_iteration = "alternate", np.zeros(mixed.num_rows, np.int64)
    else:
        packs, level_of, mixed = _iterations_per_level(lengths, template, method, stream)
        order, of_iteration = template.level_order, level_of[mixed.ids[mixed.offsets[:-1]]]
    steps = schedule(
        of_iteration,
        mixed.sums(packs.sums(lengths)),
        global_batch_tokens=template.global_batch_tokens,
        level_order=order,
        curriculum_steps=template.curriculum_steps if template.epoch == 0 else 0,
        stream=(*stream, SCHEDULE_STREAM),
    )
    in_order = mixed.take(steps.ids).ids
    packs = packs.take(in_order)
    return dataclasses.replace(
        template,
        packs=packs if sample_ids is None else Ragged(sample_ids[packs.ids], packs.offsets),
        pack_levels=level_of[in_order],
        step_offsets=steps.offsets,
    )


def _iterations_per_level(
    lengths: IntArray, template: Plan, method: Method, stream: Stream
) -> tuple[Ragged, IntArray, Ragged]:
    """Return packs, the level of each, int64 [num_packs], and iterations of one level each, rows of pack indices."""
    per_level = method.pack(lengths, template.levels, template.world_size, (*stream, PACK_STREAM))
    degrees = np.array([level.dp_degree(template.world_size) for level in template.levels])
    per_level = [_whole_iterations(p, dp) for p, dp in zip(per_level, degrees.tolist(), strict=True)]
    num_packs = np.array([p.num_rows for p in per_level])
    packs, level_of = concatenated(per_level), np.repeat(np.arange(len(degrees)), num_packs)
    del per_level  # a fifth of the peak memory
    tokens, sum_sq = packs.sums(lengths), template.costs[0].squares(lengths, packs)
    balanced = []
    for level, (start, end) in enumerate(itertools.pairwise(offsets_of(num_packs).tolist())):
        of_level, level_stream = slice(start, end), (*stream, BALANCE_STREAM, level)
        cost = template.costs[level]
        balanced.append(start + _balanced_order(method.balance, tokens[of_level], sum_sq[of_level], cost, level_stream))
    sizes = np.repeat(degrees, num_packs // degrees)
    return packs, level_of, Ragged(np.concatenate(balanced), offsets_of(sizes))


def _balanced_order(by: str, tokens: IntArray, sum_sq: IntArray, cost: CostModel, stream: Stream) -> IntArray:
    """Return the order of a level's packs by descending "cost" or "attention", "shuffled", or "kept" as packed."""
    if by == "cost":
        return np.argsort(-cost.cost(tokens, sum_sq), kind="stable")
    if by == "attention":
        return np.argsort(-sum_sq, kind="stable")
    return shuffled(len(tokens), *stream) if by == "shuffled" else np.arange(len(tokens))


def _whole_iterations(packs: Ragged, dp_degree: int) -> Ragged:
    """Append empty packs until the last iteration is complete."""
    missing = round_up(packs.num_rows, dp_degree) - packs.num_rows
    return Ragged(packs.ids, np.append(packs.offsets, np.full(missing, packs.offsets[-1])))


def check_side_by_side(method: str, level_order: str, curriculum_steps: float) -> None:
    """Raise ValueError for what level_order "parallel" excludes."""
    if level_order != "parallel":
        return
    if method != "hbp":
        raise ValueError(f'level_order="parallel" with method={method!r}: it has its own packer; use method="hbp"')
    if curriculum_steps:
        raise ValueError(
            f'level_order="parallel" with curriculum_steps={curriculum_steps}: every step has a share of all levels; '
            "set curriculum_steps = 0"
        )


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        close = "".join(f"; did you mean {other}?" for other in difflib.get_close_matches(value, choices, n=1))
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}{close}")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")


def _int_array(name: str, values: ArrayLike, lowest: int) -> IntArray:
    """Return values as int64 [n]; ValueError for another shape, a fraction or a value below `lowest`."""
    array = np.asarray(values)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be one-dimensional and not empty, not of shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    array = np.ascontiguousarray(array, np.int64)
    if array.min() < lowest:
        at = int(array.argmin())
        raise ValueError(f"{name}[{at}] = {array[at]} must be at least {lowest}; remove that sample")
    return array


def _check_loss_tokens(lengths: IntArray, loss_tokens: IntArray) -> None:
    if len(lengths) != len(loss_tokens):
        raise ValueError(f"{len(lengths)} lengths but {len(loss_tokens)} loss_tokens; give one of each per sample")
    if np.any(loss_tokens > lengths):
        at = int(np.argmax(loss_tokens > lengths))
        raise ValueError(f"sample {at} has {loss_tokens[at]} loss_tokens but only {lengths[at]} tokens")


def _ids_that_fit(lengths: IntArray, max_tokens: int) -> IntArray | None:
    """Return the ids of samples of at most `max_tokens` tokens, None if these are all. ValueError if there are none."""
    if lengths.max() <= max_tokens:
        return None
    ids = np.flatnonzero(lengths <= max_tokens)
    if not len(ids):
        raise ValueError(f"every sample is longer than max_tokens={max_tokens}; raise levels.max_tokens")
    return ids


def _check_fit(lengths: IntArray, sample_ids: IntArray | None, largest: Level) -> None:
    """Raise ValueError for a sample longer than the largest level. sample_ids: for the message; default 0 to n - 1."""
    at = int(lengths.argmax())
    if lengths[at] > largest.max_tokens:
        count = int(np.count_nonzero(lengths > largest.max_tokens))
        raise ValueError(
            f"sample {at if sample_ids is None else sample_ids[at]} has {lengths[at]} tokens, more than the largest "
            f"level's max_tokens={largest.max_tokens} ({count} such samples in total); raise levels.max_tokens, or "
            "truncate or skip these samples (data.max_length_policy, --overlong)"
        )
