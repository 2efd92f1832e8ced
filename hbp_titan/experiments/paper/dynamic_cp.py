"""Megatron-style dynamic context parallelism, re-implemented for comparison: a cp degree per pack in one micro-batch.

Megatron-LM's scheduler `default_dynamic_cp` (megatron/core/datasets/data_schedule_utils.py of its dev branch, August
2026) sorts a global batch by length and forms micro-batches from the longest sample down. A sample goes to the group of
ranks, existing or new, of the least power of two that holds it or a larger one, where the slowest rank stays fastest by
len^2 / cp; a group holds `tokens_per_rank` tokens per rank. Groups of a micro-batch run side by side, and ranks that
stay empty join the smallest groups. `schedule_micro_batch` makes the same decisions, `replay_dynamic_cp` times them.

Ranks do not wait for each other after a micro-batch, because parameters are not sharded between steps (Megatron's
distributed optimizer, ZeRO-1): a group starts when all its ranks are free, and all ranks meet at the end of the step.
In return each rank holds all parameters and gradients, so larger models need tensor parallelism (see `Megatron`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hbp_titan.components.timing import FloatArray
from hbp_titan.packing import Level
from hbp_titan.packing.ragged import IntArray, Ragged, offsets_of, runs, shuffled
from hbp_titan.tuning.simulate import Replay
from hbp_titan.tuning.time_model import PARTS, Sharding, TimeModel

# Tokens of a global batch over those that all ranks hold at once: NVIDIA's benchmark of the scheduler has 8
# micro-batches per step. Not quite full, because no packing fills every rank.
MICRO_BATCHES, FILL = 8, 0.95
CAP_SLACK = 0.05
"""Megatron's slack of the work per rank over tokens_per_rank times the longest sample."""
TENSOR_EXPOSED = 0.5
"""Assumed share of tensor parallelism's collectives that products do not hide."""
PARAM_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
"""Of ZeRO-1: bf16 parameters and fp32 gradients on each rank; fp32 parameters and two moments sharded."""

Group = tuple[int, list[int]]
"""A group of adjacent ranks: its cp degree and the samples of its pack, as positions in the given lengths."""


@dataclass(frozen=True)
class DynamicCPPlan:
    """Packs with a cp degree each, in training order; the packs of a micro-batch lie on adjacent ranks in this order.

    lengths: int64 [num_samples]. packs: sample ids by pack. cp_degrees, micro_batch_of: int64 [num_packs]; the degrees
    of a micro-batch sum up to the number of ranks. step_of: optimizer step of each micro-batch, int64 [micro_batches].
    """

    ranks: int
    lengths: IntArray
    packs: Ragged
    cp_degrees: IntArray
    micro_batch_of: IntArray
    step_of: IntArray


class _Groups:
    """The groups of one cp degree of a micro-batch while they are filled."""

    def __init__(self, degree: int, ranks: int) -> None:
        self.degree, self.count = degree, 0
        self.work = np.zeros(ranks // degree)
        self.tokens = np.zeros(ranks // degree)
        self.numbers: list[int] = []  # of the groups of the micro-batch

    def best(self, length: int, capacity: float, slowest: float) -> tuple[float, int]:
        """Return (work of the slowest rank afterwards, index of the first group that keeps it lowest)."""
        if not self.count:
            return math.inf, -1
        work = np.maximum(self.work[: self.count] + length * length / self.degree, slowest)
        work[self.tokens[: self.count] + length / self.degree > capacity] = math.inf
        index = int(work.argmin())
        return float(work[index]), index


def needed_degree(length: int, tokens_per_rank: int) -> int:
    """Return the least power of two of ranks that hold a sample."""
    return 1 << max(0, (-(-length // tokens_per_rank) - 1).bit_length())


def schedule_micro_batch(lengths: IntArray, ranks: int, tokens_per_rank: int) -> list[Group]:
    """Return the groups of one micro-batch from samples by descending length, int64 [n]; the others stay.

    ranks: a power of two. Raises ValueError for a sample that all ranks together do not hold.
    """
    if ranks & (ranks - 1):
        raise ValueError(f"dynamic context parallelism needs a power of two of ranks, not {ranks}")
    if needed_degree(int(lengths[0]), tokens_per_rank) > ranks:
        raise ValueError(f"a sample has {lengths[0]} tokens, but {ranks} ranks hold {tokens_per_rank} each; use more")
    filler = _Filler(ranks, tokens_per_rank, int(lengths[0]))
    distinct, counts = (values.tolist() for values in runs(lengths))
    start = 0
    for length, count in zip(distinct, counts, strict=True):
        # Most samples of a full micro-batch fail here, which keeps the loop short.
        if length <= filler.longest_that_fits():
            filler.place(length, range(start, start + count))
        start += count
    return _without_empty_ranks(filler.groups, ranks)


@dataclass
class _Choice:
    """A group for a sample: number `index` of `groups`, a new one if there are as many.

    work: of the slowest rank afterwards. below, most: what other choices give; a later sample of the same length makes
    the same choice if it leaves the work below the first and at most the second.
    """

    work: float
    groups: _Groups
    index: int
    below: float
    most: float


class _Filler:
    """Placement of samples, longest first, into the groups of one micro-batch."""

    def __init__(self, ranks: int, tokens_per_rank: int, longest: int) -> None:
        self.capacity, self.free = tokens_per_rank, ranks
        # No rank may have more work than packs of samples as long as the longest would give it.
        self.cap = longest * tokens_per_rank * (1 + CAP_SLACK)
        self.slowest = 0.0
        self.by_degree = [_Groups(1 << k, ranks) for k in range(ranks.bit_length())]
        self.groups: list[Group] = []

    def longest_that_fits(self) -> float:
        """Return the longest sample that some group, or a new one, has tokens for."""
        room = [g.degree * (self.capacity - float(g.tokens[: g.count].min())) for g in self.by_degree if g.count]
        return max(room, default=0.0) if not self.free else math.inf

    def place(self, length: int, samples: Sequence[int]) -> None:
        """Place samples of one length until no group takes the next."""
        at = 0
        while at < len(samples):
            found = self.choose(length)
            if found.work > self.cap:
                return
            if found.index == found.groups.count:
                self._open(found.groups)
            # In both cases also the samples after the first for which the choice is known.
            if found.work > self.slowest and len(self.groups) > 1:
                at += self._spread(found, length, samples[at:])
            else:
                at += self._add(found, length, samples[at:])

    def choose(self, length: int) -> _Choice:
        """Return the group, existing or new, with which the slowest rank stays fastest; infinite work if none."""
        smallest = needed_degree(length, self.capacity).bit_length() - 1
        # The first sample, the longest, gets the ranks that it needs; its work is what the others are held to.
        candidates = self.by_degree[smallest:] if self.groups else self.by_degree[smallest : smallest + 1]
        best = _Choice(math.inf, candidates[0], -1, math.inf, math.inf)
        for groups in candidates:
            work, index = groups.best(length, self.capacity, self.slowest)
            opened = max(self.slowest, length * length / groups.degree) if self.free >= groups.degree else math.inf
            other = max(work, opened)
            if opened < work:
                work, index = opened, groups.count
            if work < best.work:
                best = _Choice(work, groups, index, best.work, min(other, self.cap))
            else:
                best.most = min(best.most, work)
            # Nothing is below the slowest rank, and of equal choices the first one wins.
            if best.work <= self.slowest:
                break
        return best

    def _spread(self, found: _Choice, length: int, samples: Sequence[int]) -> int:
        """Add the first of `samples`, and one sample each to the groups that take the next; return their number.

        Each raises the work of the slowest rank.
        """
        groups = found.groups
        share, cost = length / groups.degree, length * length / groups.degree
        work = groups.work[: groups.count] + cost
        work[groups.tokens[: groups.count] + share > self.capacity] = math.inf
        order = np.argsort(work, kind="stable")[: len(samples)]
        # A group comes again only after all that its new work exceeds.
        taken = order[(work[order] < min(found.below, found.work + cost)) & (work[order] <= found.most)]
        for place, sample in zip(taken.tolist(), samples, strict=False):
            self.groups[groups.numbers[place]][1].append(sample)
        groups.tokens[taken] += share
        groups.work[taken] = work[taken]
        self.slowest = float(work[taken[-1]])
        return len(taken)

    def _open(self, groups: _Groups) -> None:
        groups.numbers.append(len(self.groups))
        groups.count += 1
        self.groups.append((groups.degree, []))
        self.free -= groups.degree

    def _add(self, found: _Choice, length: int, samples: Sequence[int]) -> int:
        """Add the first of `samples` to a group, and the next to it and later ones that stay below the slowest rank.

        Returns their number. Samples that leave the slowest rank as it is go to the first group with room for them.
        """
        groups, index = found.groups, found.index
        share, cost = length / groups.degree, length * length / groups.degree
        own = slice(index, groups.count)
        fit = np.minimum((self.capacity - groups.tokens[own]) // share, (self.slowest - groups.work[own]) // cost)
        # The first may raise the slowest rank, if it is the first of its group.
        fit[0] = max(fit[0], 1)
        before = np.cumsum(np.maximum(fit, 0)) - np.maximum(fit, 0)
        numbers = np.clip(len(samples) - before, 0, np.maximum(fit, 0)).astype(np.int64)
        groups.tokens[own] += numbers * share
        groups.work[own] += numbers * cost
        start = 0
        for place in np.flatnonzero(numbers).tolist():
            self.groups[groups.numbers[index + place]][1].extend(samples[start : start + int(numbers[place])])
            start += int(numbers[place])
        self.slowest = max(self.slowest, float(groups.work[own].max()))
        return start


def _without_empty_ranks(groups: list[Group], ranks: int) -> list[Group]:
    """Return the groups after empty ranks joined: the first of the smallest groups doubles until none is empty."""
    degrees = [degree for degree, _ in groups]
    while sum(degrees) < ranks:
        degrees[degrees.index(min(degrees))] *= 2
    return [(degree, samples) for degree, (_, samples) in zip(degrees, groups, strict=True)]


def plan_dynamic_cp(
    lengths: ArrayLike, ranks: int, tokens_per_rank: int, seed: int = 0, max_steps: int | None = None
) -> DynamicCPPlan:
    """Plan one epoch, or its first `max_steps` optimizer steps, in random global batches of about equal tokens.

    Raises ValueError for a number of ranks that is no power of two and for a sample that the ranks do not hold.
    """
    lengths = np.asarray(lengths, np.int64)
    order = shuffled(len(lengths), seed, 0)
    batch_of = (np.cumsum(lengths[order]) - 1) // int(FILL * MICRO_BATCHES * tokens_per_rank * ranks)
    packs: list[IntArray] = []
    degrees: list[int] = []
    micro_batch_of: list[int] = []
    step_of: list[int] = []
    for step in range(int(batch_of[-1]) + 1 if max_steps is None else min(max_steps, int(batch_of[-1]) + 1)):
        left = order[batch_of == step]
        left = left[np.argsort(-lengths[left], kind="stable")]
        while len(left):
            groups = schedule_micro_batch(lengths[left], ranks, tokens_per_rank)
            placed = np.concatenate([np.array(samples) for _, samples in groups])
            packs += [left[samples] for _, samples in groups]
            degrees += [degree for degree, _ in groups]
            micro_batch_of += [len(step_of)] * len(groups)
            step_of.append(step)
            left = np.delete(left, placed)
    rows = Ragged(np.concatenate(packs), offsets_of(np.array([len(pack) for pack in packs])))
    return DynamicCPPlan(ranks, lengths, rows, np.array(degrees), np.array(micro_batch_of), np.array(step_of))


@dataclass(frozen=True)
class Megatron:
    """Megatron's parallelism: `tensor_parallel` GPUs of a node work as one rank of data and context parallelism.

    model: TimeModel of ranks that are `tensor_parallel` times as fast and as large as a GPU. tensor_exposed: share of
    tensor parallelism's collectives that products do not hide.
    """

    model: TimeModel
    tensor_parallel: int = 1
    tensor_exposed: float = TENSOR_EXPOSED

    @classmethod
    def of(cls, gpus: TimeModel, tensor_parallel: int, tensor_exposed: float = TENSOR_EXPOSED) -> Megatron:
        """Return the parallelism on the GPUs of a TimeModel, with its model and FP8 products."""
        t, gpu = tensor_parallel, gpus.hardware
        rank = dataclasses.replace(
            gpu,
            peak_flops=t * gpu.peak_flops,
            memory_bytes=t * gpu.memory_bytes,
            memory_bandwidth=t * gpu.memory_bandwidth,
            intra_node_bandwidth=t * gpu.intra_node_bandwidth,
            inter_node_bandwidth=t * gpu.inter_node_bandwidth,
            pcie_bandwidth=t * gpu.pcie_bandwidth,
            host_bandwidth=t * gpu.host_bandwidth,
            gpus_per_node=gpu.gpus_per_node // t,
        )
        float8 = gpus.float8 and dataclasses.replace(gpus.float8, hardware=rank)
        sharding = Sharding(reshard_after_forward=False)
        model = TimeModel(gpus.dims, rank, gpus.world_size // t, sharding, float8=float8)
        return cls(model, t, tensor_exposed)

    def state_bytes(self) -> int:
        """Return the bytes of parameters, gradients and optimizer state of a rank."""
        params = self.model.dims.params
        return params * (PARAM_BYTES + GRADIENT_BYTES) + params * OPTIMIZER_BYTES // self.model.world_size

    def tensor_seconds(self, level: Level, tokens: FloatArray) -> FloatArray:
        """Return the exposed seconds of tensor parallelism's collectives for packs on level.cp_degree ranks, [n].

        tokens: of each pack. With sequence parallelism a layer gathers and scatters its hidden states twice in forward
        and twice in backward, and twice more if it is recomputed.
        """
        t, d, hardware = self.tensor_parallel, self.model.dims, self.model.hardware
        recomputed = 0 if level.ac_policy == "none" else d.num_layers if level.ac_layers is None else level.ac_layers
        passes = 8 * d.num_layers + 4 * recomputed
        sent = tokens / level.cp_degree * d.hidden_size * self.model.sharding.param_bytes * (t - 1) / t
        return self.tensor_exposed * passes * sent / (hardware.intra_node_bandwidth / t * hardware.gather_efficiency)

    def step_seconds(self, level: Level) -> float:
        """Return the seconds of an optimizer step: AdamW, and the traffic that a full pack of `level` does not hide."""
        tokens = float(level.max_tokens)
        parts = self.model.parts(level, np.array([[1.0, tokens, tokens * 1000.0, tokens / 1000]]))
        return self.model.step_seconds() + float(parts["fsdp"][0])


def replay_dynamic_cp(plan: DynamicCPPlan, megatron: Megatron, level_of: Callable[[int], Level]) -> Replay:
    """Simulate the plan; level_of returns the level, with its memory plan, of a cp degree."""
    model = megatron.model
    assert plan.ranks == model.world_size
    levels = {degree: level_of(degree) for degree in np.unique(plan.cp_degrees).tolist()}
    seconds, parts = np.zeros(plan.packs.num_rows), dict.fromkeys(PARTS, 0.0)
    counts, squares = plan.packs.counts, model.dims.squares(plan.lengths, plan.packs)
    for degree, level in levels.items():
        own = np.flatnonzero(plan.cp_degrees == degree)
        # Each sample is padded to two chunks per rank, which balance a causal mask.
        padded = plan.lengths + -plan.lengths % (2 * degree * megatron.tensor_parallel if degree > 1 else 1)
        tokens = plan.packs.sums(padded)[own].astype(float)
        trained = (plan.packs.sums(plan.lengths) - counts)[own]
        loads = np.stack([np.ones(len(own)), trained, squares[own], counts[own]], axis=1).astype(float)
        found = model.parts(level, loads, tokens)
        found["sp"] = found["sp"] + megatron.tensor_seconds(level, tokens)
        # Parameters are gathered once per step, not per micro-batch.
        del found["fsdp"]
        for name, part in found.items():
            seconds[own] += part
            parts[name] += float(part.sum()) * degree / plan.ranks
    total = _wall_seconds(plan, seconds)
    pack_tokens = plan.packs.sums(plan.lengths)
    num_tokens = int(pack_tokens.sum())
    smallest = levels[min(levels)]
    return Replay(
        world_size=plan.ranks * megatron.tensor_parallel,
        micro_batches=len(plan.step_of),
        tokens=num_tokens,
        cr=float(pack_tokens[plan.cp_degrees > 1].sum() / num_tokens),
        parts=parts,
        idle=max(0.0, total - sum(parts.values())),
        steps=megatron.step_seconds(smallest) * (int(plan.step_of[-1]) + 1),
    )


def _wall_seconds(plan: DynamicCPPlan, seconds: FloatArray) -> float:
    """Return the time until all ranks have run all micro-batches; they meet only at the end of each step.

    A group starts when its last rank is free, because its ranks exchange keys and values.
    """
    total, free_at = 0.0, np.zeros(plan.ranks)
    bounds = np.searchsorted(plan.micro_batch_of, np.arange(len(plan.step_of) + 1))
    for micro_batch, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        degrees = plan.cp_degrees[start:end]
        begin = np.maximum.reduceat(free_at, offsets_of(degrees)[:-1])
        free_at = np.repeat(begin + seconds[start:end], degrees)
        last = micro_batch + 1 == len(plan.step_of) or plan.step_of[micro_batch + 1] != plan.step_of[micro_batch]
        if last:
            total += float(free_at.max())
            free_at = np.zeros(plan.ranks)
    return total
