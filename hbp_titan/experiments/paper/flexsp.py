"""A planner in the manner of FlexSP (arXiv 2412.01523): groups of differing SP degree work side by side.

Owns our re-implementation, for comparison alone. FlexSP sorts each global batch by length, cuts it into micro-batches,
and solves a mixed-integer program for each: which groups of ranks, of which degree, take which samples, so that the
slowest group ends as early as possible. Here a heuristic takes the solver's place: MULTIFIT (Coffman, Garey, Johnson
1978), that is bisection of the makespan, each attempt a first-fit decreasing into groups that are opened as needed.
Lengths are rounded up to a geometric grid, as FlexSP buckets them, so that an attempt handles equal lengths at once.

Two figures come of a plan: `replay_concurrent` is FlexSP's own, with groups side by side and no padding; `as_plan`
turns the same groups into iterations of one level each, which is what our runtime could train of it.
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

# Share of the memory that a global batch is drawn to fill, and its micro-batches.
FILL, MICRO_BATCHES = 0.95, 4
# Neighbours on the grid of lengths differ by 2.2%; the bisection ends at 1%.
GRID = 2 ** (1 / 32)
TOLERANCE = 0.01

# A group in the making: its level, and what it takes as (bucket, count).
Group = tuple[int, list[tuple[int, int]]]


@dataclass(frozen=True)
class FlexSPPlan:
    """levels: one for each degree, ascending. groups: the samples of each group, in training order.

    level_of_group, micro_batch_of_group: int64 [num_groups]; the groups of a micro-batch run side by side, the sum of
    their degrees is at most the world size. micro_batches: their number.
    """

    levels: tuple[Level, ...]
    world_size: int
    lengths: IntArray
    groups: Ragged
    level_of_group: IntArray
    micro_batch_of_group: IntArray
    micro_batches: int

    def as_plan(self) -> Plan:
        """The same groups as packs of a Plan: those of one degree, in their order, fill iterations of one level.

        The last iteration of a level is completed with empty packs. Levels follow one another.
        """
        parts, level_of = [], []
        for k, level in enumerate(self.levels):
            mine = self.groups.take(np.flatnonzero(self.level_of_group == k))
            dp = level.dp_degree(self.world_size)
            missing = round_up(mine.num_rows, dp) - mine.num_rows
            parts.append(Ragged(mine.ids, np.append(mine.offsets, np.full(missing, mine.offsets[-1]))))
            level_of += [k] * (parts[-1].num_rows // dp)
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
            level_of_iteration=np.array(level_of, np.int64),
            step_offsets=np.arange(len(level_of) + 1),
        )


def plan_flexsp(lengths: ArrayLike, levels: Sequence[Level], model: TimeModel, seed: int = 0) -> FlexSPPlan:
    """Plan one epoch. levels: one for each degree, ascending in both degree and max_tokens (what its ranks can hold).

    Raises ValueError for a sample that the largest level cannot hold, and for levels that do not suit the world.
    """
    lengths = np.asarray(lengths, np.int64)
    levels = tuple(levels)
    check_levels(levels, model.world_size)
    if lengths.max() > levels[-1].max_tokens:
        raise ValueError(f"a sample has {lengths.max()} tokens, more than max_tokens={levels[-1].max_tokens}")
    order = shuffled(len(lengths), seed, 0)
    room = max(level.max_tokens * level.dp_degree(model.world_size) for level in levels)
    batch_of = (np.cumsum(lengths[order]) - 1) // int(FILL * MICRO_BATCHES * room)
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
    """Starts and ends of the runs of equal neighbours."""
    ends = np.cumsum(runs(values)[1])
    return np.concatenate([[0], ends[:-1]]), ends


class _Planner:
    """Plans one global batch after another; collects their groups."""

    def __init__(self, lengths: IntArray, levels: Sequence[Level], model: TimeModel) -> None:
        self.lengths, self.model = lengths, model
        self.degrees = [level.cp_degree for level in levels]
        self.rooms = [level.max_tokens for level in levels]
        # Grid points a sample may be rounded up to, the degrees' rooms among them: nothing grows beyond its level.
        steps = math.ceil(math.log(max(self.rooms)) / math.log(GRID)) + 1
        grid = np.floor(GRID ** np.arange(steps)).astype(np.int64)
        self.grid = np.unique(np.append(grid[grid <= max(self.rooms)], self.rooms))
        self.bucket_of = np.searchsorted(self.grid, lengths)
        # Seconds of one sample of each grid length at each degree: [degrees][grid].
        self.seconds = [sample_seconds(model, level, self.grid).tolist() for level in levels]
        self.members: list[IntArray] = []
        self.level_of_group: list[int] = []
        self.micro_batch_of_group: list[int] = []
        self.micro_batches = 0

    def add_batch(self, samples: IntArray) -> None:
        """Sort by length, cut into the fewest micro-batches of equal tokens that can all be placed, place them."""
        samples = samples[np.argsort(-self.lengths[samples], kind="stable")]
        running = np.cumsum(self.lengths[samples])
        num = max(1, math.ceil(int(running[-1]) / (self.model.world_size * max(self._room_per_rank()))))
        while True:
            cut_at = np.searchsorted(running, running[-1] * np.arange(1, num) / num, side="right")
            chunks = [chunk for chunk in np.split(samples, cut_at) if len(chunk)]
            placed = [self._place(chunk) for chunk in chunks]
            if all(groups is not None for groups in placed):
                break
            num += 1
        for chunk, groups in zip(chunks, placed, strict=True):
            self._keep(chunk, groups or [])

    def _room_per_rank(self) -> list[float]:
        return [room / degree for room, degree in zip(self.rooms, self.degrees, strict=True)]

    def _place(self, chunk: IntArray) -> list[Group] | None:
        """Groups of the shortest makespan that bisection finds, None where memory does not suffice for the chunk."""
        buckets, counts = (values.tolist() for values in runs(self.bucket_of[chunk]))
        best = self._attempt(buckets, counts, math.inf)
        if best is None:
            return None
        cheapest = [min(seconds[b] * d for seconds, d in zip(self.seconds, self.degrees, strict=True)) for b in buckets]
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
        """First-fit decreasing: into the first open group with room, else into a new one of the least degree that can
        hold the sample in time; None where no ranks are left."""
        groups: list[Group] = []
        token_room: list[int] = []
        time_room: list[float] = []
        ranks = self.model.world_size
        for bucket, count in zip(buckets, counts, strict=True):
            length = int(self.grid[bucket])
            for g, (k, taken) in enumerate(groups):
                if not count:
                    break
                if token_room[g] >= length and time_room[g] >= self.seconds[k][bucket]:
                    fit = self._fitting(length, self.seconds[k][bucket], count, token_room[g], time_room[g])
                    count -= fit
                    token_room[g] -= fit * length
                    time_room[g] -= fit * self.seconds[k][bucket]
                    taken.append((bucket, fit))
            while count:
                least = self._least_degree(length, bucket, makespan)
                if least is None or self.degrees[least] > ranks:
                    return None
                ranks -= self.degrees[least]
                fit = self._fitting(length, self.seconds[least][bucket], count, self.rooms[least], makespan)
                count -= fit
                groups.append((least, [(bucket, fit)]))
                token_room.append(self.rooms[least] - fit * length)
                time_room.append(makespan - fit * self.seconds[least][bucket])
        return groups

    @staticmethod
    def _fitting(length: int, seconds: float, count: int, token_room: int, time_room: float) -> int:
        """How many of `count` samples fit; at least one is known to."""
        by_time = count if math.isinf(time_room) else max(1, int(time_room / seconds))
        return min(count, token_room // length, by_time)

    def _least_degree(self, length: int, bucket: int, makespan: float) -> int | None:
        for k, room in enumerate(self.rooms):
            if length <= room and self.seconds[k][bucket] <= makespan:
                return k
        return None

    def _keep(self, chunk: IntArray, groups: list[Group]) -> None:
        """Turn (bucket, count) into samples: each bucket's samples are dealt out in their order."""
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
    """What lone samples add to a group of this level, [n]: all parts that grow with them, none that is fixed."""
    loads = np.stack([np.ones(len(tokens)), tokens - 1, tokens.astype(float) ** 2, np.ones(len(tokens))], axis=1)
    parts = model.parts(level, loads, tokens.astype(float))
    return np.sum([parts[name] for name in ("linear", "attention", "recompute", "sp", "experts")], axis=0)


def replay_concurrent(plan: FlexSPPlan, model: TimeModel) -> Replay:
    """FlexSP's own form: a micro-batch takes as long as its slowest group; ranks without a group wait.

    Groups are not padded. Each micro-batch is an iteration, and all ranks take part in FSDP's collectives.
    """
    tokens = plan.groups.sums(plan.lengths)
    squares = plan.groups.sums_of_squares(plan.lengths).astype(float)
    counts = plan.groups.counts
    loads = np.stack([np.ones(len(tokens)), tokens - counts, squares, counts], axis=1).astype(float)
    degrees = np.array([level.cp_degree for level in plan.levels])[plan.level_of_group]
    slowest = np.zeros(plan.micro_batches)
    parts = dict.fromkeys(PARTS, 0.0)
    seconds = np.zeros(len(tokens))
    for k, level in enumerate(plan.levels):
        mine = np.flatnonzero(plan.level_of_group == k)
        for name, part in model.parts(level, loads[mine], tokens[mine].astype(float)).items():
            seconds[mine] += part
            parts[name] += float(part.sum()) * level.cp_degree / plan.world_size
    np.maximum.at(slowest, plan.micro_batch_of_group, seconds)
    return Replay(
        world_size=plan.world_size,
        iterations=plan.micro_batches,
        tokens=int(tokens.sum()),
        cr=float(tokens[degrees > 1].sum() / tokens.sum()),
        parts=parts,
        idle=float(slowest.sum()) - sum(parts.values()),
        steps=model.step_seconds() * plan.micro_batches,
    )
