"""FlexSP's planner (arXiv 2412.01523), re-implemented for comparison: groups of different SP degrees in parallel.

FlexSP sorts each global batch by length, cuts it into micro-batches, and solves a mixed-integer program for each: which
groups of ranks, of which degree, take which samples, so that the slowest group finishes as early as possible. Here a
heuristic replaces the solver: MULTIFIT (Coffman, Garey, Johnson 1978), a bisection of the makespan with first-fit
decreasing into groups that are opened as needed. Lengths are rounded up to a geometric grid, like FlexSP's buckets, so
that equal lengths are placed at once. `replay_concurrent` simulates the plan in FlexSP's form, groups in parallel and
without padding; `as_plan` converts the groups to micro-batches of one level each, which our runtime can train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hbp_titan.components.timing import FloatArray
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.cost import costs_per_level
from hbp_titan.packing.level import check_levels
from hbp_titan.packing.ragged import IntArray, Ragged, concatenated, offsets_of, round_up, runs, shuffled
from hbp_titan.tuning.simulate import Replay
from hbp_titan.tuning.time_model import PARTS, TimeModel

# Share of the memory that a global batch fills, and its number of micro-batches.
FILL, MICRO_BATCHES = 0.95, 4
# Adjacent lengths of the grid differ by 2.2%; the bisection ends at 1%.
GRID = 2 ** (1 / 32)
TOLERANCE = 0.01

# A group while it is filled: its level, and its samples as (bucket, count).
Group = tuple[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class FlexSPPlan:
    """Groups of samples, in training order.

    levels: one per degree, ascending. level_of_group, micro_batch_of_group: int64 [num_groups]; the groups of a
    micro-batch run in parallel, so the sum of their degrees is at most the world size. micro_batches: their number.
    """

    levels: tuple[Level, ...]
    world_size: int
    lengths: IntArray
    groups: Ragged
    level_of_group: IntArray
    micro_batch_of_group: IntArray
    micro_batches: int

    def as_plan(self) -> Plan:
        """Return a Plan with the same groups as packs, level by level.

        The last micro-batch of a level is filled up with empty packs.
        """
        parts, level_of = [], []
        for k, level in enumerate(self.levels):
            own = self.groups.take(np.flatnonzero(self.level_of_group == k))
            dp = level.dp_degree(self.world_size)
            missing = round_up(own.num_rows, dp) - own.num_rows
            parts.append(Ragged(own.ids, np.append(own.offsets, np.full(missing, own.offsets[-1]))))
            level_of += [k] * parts[-1].num_rows
        return Plan(
            levels=self.levels,
            world_size=self.world_size,
            method="flexsp",
            seed=0,
            epoch=0,
            global_batch_tokens=0,
            level_order="alternate",
            curriculum_steps=0.0,
            costs=costs_per_level(None, len(self.levels)),
            lengths=self.lengths,
            loss_tokens=self.lengths - 1,
            packs=concatenated(parts),
            pack_levels=np.array(level_of, np.int64),
            step_offsets=np.arange(sum(self.levels[k].cp_degree for k in level_of) // self.world_size + 1),
        )


def plan_flexsp(lengths: ArrayLike, levels: Sequence[Level], model: TimeModel, seed: int = 0) -> FlexSPPlan:
    """Plan one epoch. levels: one per degree, ascending in degree and max_tokens (the capacity of its ranks).

    Raises ValueError for a sample longer than the largest level, and for levels that do not fit the world size.
    """
    lengths = np.asarray(lengths, np.int64)
    levels = tuple(levels)
    check_levels(levels, model.world_size)
    if lengths.max() > levels[-1].max_tokens:
        raise ValueError(f"a sample has {lengths.max()} tokens, more than max_tokens={levels[-1].max_tokens}")
    # Global batches are random; only a batch is sorted by length.
    order = shuffled(len(lengths), seed, 0)
    capacity = max(level.max_tokens * level.dp_degree(model.world_size) for level in levels)
    # Not quite full, because no packing fills every rank.
    batch_of = (np.cumsum(lengths[order]) - 1) // int(FILL * MICRO_BATCHES * capacity)
    planner = _Planner(lengths, levels, model)
    for start, end in zip(*_bounds(batch_of), strict=True):
        planner.add_batch(order[start:end])
    return FlexSPPlan(
        levels=levels,
        world_size=model.world_size,
        lengths=lengths,
        groups=Ragged(np.concatenate(planner.members), offsets_of(np.array([len(m) for m in planner.members]))),
        level_of_group=np.array(planner.level_of_group, np.int64),
        micro_batch_of_group=np.array(planner.micro_batch_of_group, np.int64),
        micro_batches=planner.micro_batches,
    )


def _bounds(values: IntArray) -> tuple[IntArray, IntArray]:
    """Return starts and ends of the runs of equal neighbors."""
    ends = np.cumsum(runs(values)[1])
    return np.concatenate([[0], ends[:-1]]), ends


class _Planner:
    """Planner of one global batch after another, which collects their groups."""

    def __init__(self, lengths: IntArray, levels: Sequence[Level], model: TimeModel) -> None:
        self.lengths, self.model = lengths, model
        self.degrees = [level.cp_degree for level in levels]
        self.capacities = [level.max_tokens for level in levels]
        # The grid contains the capacities, so that rounding up never exceeds the level of a sample.
        steps = math.ceil(math.log(max(self.capacities)) / math.log(GRID)) + 1
        grid = np.floor(GRID ** np.arange(steps)).astype(np.int64)
        self.grid = np.unique(np.append(grid[grid <= max(self.capacities)], self.capacities))
        # Rounded up, so that a grouping that fits on the grid fits in reality.
        self.bucket_of = np.searchsorted(self.grid, lengths)
        # Of one sample of each grid length at each degree, [degrees][grid].
        self.seconds = [sample_seconds(model, level, self.grid).tolist() for level in levels]
        self.members: list[IntArray] = []
        self.level_of_group: list[int] = []
        self.micro_batch_of_group: list[int] = []
        self.micro_batches = 0

    def add_batch(self, samples: IntArray) -> None:
        """Sort by length, cut into the fewest micro-batches of equal tokens that can be placed, and place them."""
        # Micro-batches of similar lengths, as in FlexSP.
        samples = samples[np.argsort(-self.lengths[samples], kind="stable")]
        running = np.cumsum(self.lengths[samples])
        num = max(1, math.ceil(int(running[-1]) / (self.model.world_size * max(self._capacity_per_rank()))))
        while True:
            cut_at = np.searchsorted(running, running[-1] * np.arange(1, num) / num, side="right")
            chunks = [chunk for chunk in np.split(samples, cut_at) if len(chunk)]
            placed = [self._place(chunk) for chunk in chunks]
            if all(groups is not None for groups in placed):
                break
            # First-fit may fail on a full micro-batch that an optimal grouping would hold.
            num += 1
        for chunk, groups in zip(chunks, placed, strict=True):
            self._keep(chunk, groups or [])

    def _capacity_per_rank(self) -> list[float]:
        return [capacity / degree for capacity, degree in zip(self.capacities, self.degrees, strict=True)]

    def _place(self, chunk: IntArray) -> list[Group] | None:
        """Return the groups with the shortest makespan that bisection finds, None if the chunk does not fit."""
        buckets, counts = (values.tolist() for values in runs(self.bucket_of[chunk]))
        best = self._attempt(buckets, counts, math.inf)
        if best is None:
            return None
        cheapest = [min(seconds[b] * d for seconds, d in zip(self.seconds, self.degrees, strict=True)) for b in buckets]
        # A lower bound: all work at its cheapest degree, spread over all ranks.
        low = sum(map(float.__mul__, cheapest, map(float, counts))) / self.model.world_size
        high = max(sum(self.seconds[k][b] * n for b, n in taken) for k, taken in best)
        while high > low * (1 + TOLERANCE):
            middle = (low + high) / 2
            groups = self._attempt(buckets, counts, middle)
            if groups is None:
                low = middle
            else:
                best, high = groups, middle
        return best

    def _attempt(self, buckets: list[int], counts: list[int], makespan: float) -> list[Group] | None:
        """Return the groups of first-fit decreasing within `makespan`, None if there are not enough ranks.

        A sample goes to the first open group with capacity, else to a new one of the smallest possible degree.
        """
        groups: list[Group] = []
        free_tokens: list[int] = []
        free_seconds: list[float] = []
        ranks = self.model.world_size
        for bucket, count in zip(buckets, counts, strict=True):
            length = int(self.grid[bucket])
            for g, (k, taken) in enumerate(groups):
                if not count:
                    break
                if free_tokens[g] >= length and free_seconds[g] >= self.seconds[k][bucket]:
                    fit = self._fitting(length, self.seconds[k][bucket], count, free_tokens[g], free_seconds[g])
                    count -= fit
                    free_tokens[g] -= fit * length
                    free_seconds[g] -= fit * self.seconds[k][bucket]
                    taken.append((bucket, fit))
            while count:
                smallest = self._smallest_degree(length, bucket, makespan)
                if smallest is None or self.degrees[smallest] > ranks:
                    return None
                ranks -= self.degrees[smallest]
                fit = self._fitting(length, self.seconds[smallest][bucket], count, self.capacities[smallest], makespan)
                count -= fit
                groups.append((smallest, [(bucket, fit)]))
                free_tokens.append(self.capacities[smallest] - fit * length)
                free_seconds.append(makespan - fit * self.seconds[smallest][bucket])
        return groups

    @staticmethod
    def _fitting(length: int, seconds: float, count: int, free_tokens: int, free_seconds: float) -> int:
        """Return how many of `count` samples fit, at least 1."""
        by_time = count if math.isinf(free_seconds) else max(1, int(free_seconds / seconds))
        return min(count, free_tokens // length, by_time)

    def _smallest_degree(self, length: int, bucket: int, makespan: float) -> int | None:
        for k, capacity in enumerate(self.capacities):
            if length <= capacity and self.seconds[k][bucket] <= makespan:
                return k
        return None

    def _keep(self, chunk: IntArray, groups: list[Group]) -> None:
        """Convert (bucket, count) to samples, which are taken from each bucket in order."""
        names, counts = runs(self.bucket_of[chunk])
        next_of = dict(zip(names.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
        for k, taken in groups:
            ids = []
            for bucket, count in taken:
                ids.append(chunk[next_of[bucket] : next_of[bucket] + count])
                next_of[bucket] += count
            self.members.append(np.concatenate(ids))
            self.level_of_group.append(k)
            self.micro_batch_of_group.append(self.micro_batches)
        self.micro_batches += 1


def sample_seconds(model: TimeModel, level: Level, tokens: IntArray) -> FloatArray:
    """Return the seconds that single samples add to a group of this level, [n], without its fixed parts."""
    loads = np.stack([np.ones(len(tokens)), tokens - 1, model.dims.squares(tokens), np.ones(len(tokens))], axis=1)
    parts = model.parts(level, loads, tokens.astype(float))
    return np.sum([parts[name] for name in ("linear", "attention", "recompute", "sp", "experts")], axis=0)


def replay_concurrent(plan: FlexSPPlan, model: TimeModel) -> Replay:
    """Simulate the plan in FlexSP's form: a micro-batch takes as long as its slowest group; ranks without one wait.

    Groups are not padded, and all ranks take part in the FSDP collectives of each micro-batch.
    """
    tokens = plan.groups.sums(plan.lengths)
    squares = model.dims.squares(plan.lengths, plan.groups)
    counts = plan.groups.counts
    loads = np.stack([np.ones(len(tokens)), tokens - counts, squares, counts], axis=1).astype(float)
    degrees = np.array([level.cp_degree for level in plan.levels])[plan.level_of_group]
    slowest = np.zeros(plan.micro_batches)
    parts = dict.fromkeys(PARTS, 0.0)
    seconds = np.zeros(len(tokens))
    for k, level in enumerate(plan.levels):
        own = np.flatnonzero(plan.level_of_group == k)
        for name, part in model.parts(level, loads[own], tokens[own].astype(float)).items():
            seconds[own] += part
            parts[name] += float(part.sum()) * level.cp_degree / plan.world_size
    np.maximum.at(slowest, plan.micro_batch_of_group, seconds)
    return Replay(
        world_size=plan.world_size,
        micro_batches=plan.micro_batches,
        tokens=int(tokens.sum()),
        cr=float(tokens[degrees > 1].sum() / tokens.sum()),
        parts=parts,
        idle=float(slowest.sum()) - sum(parts.values()),
        steps=model.step_seconds() * plan.micro_batches,
    )
