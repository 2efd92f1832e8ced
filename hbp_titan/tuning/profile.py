"""Profile: which levels fit and how long their micro-batches take, measured on this machine (paper: FindBestSpCkpt).

Owns the procedure, the candidates that it tries by default, and the packs that it times. For each candidate form
(length, cp degree, style):

1. Memory. Without checkpointing if that fits. Otherwise, for each policy, the peaks at two depths give the bytes that
   a layer saves, and so the fewest layers to checkpoint (GreedyProfileCkpt), with a margin; the peak at that depth is
   then measured too. A level whose estimate is clearly above the limit is not run.
2. Time. Micro-batches on light and heavy packs of the user's lengths, round robin over all levels that fit, so that
   drift of the machine affects all alike. A LevelTimeModel is fitted per level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hbp_titan.components.oom import device_memory
from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.distributed.world import World, all_reduce_values, ranks_per_node
from hbp_titan.engine import level_meshes
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.packing.ragged import IntArray
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.measured_engine import MeasuredEngine
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory, fewest_layers, with_policy
from hbp_titan.tuning.profile_file import Measurement, Profile, fit_level_time, profile_key
from hbp_titan.tuning.search import Candidate

ROUNDS = 2
"""How often each pack is timed; the minimum counts, because disturbances only add time."""
ESTIMATE_TOLERANCE = 1.15
"""A level is not run if its estimate exceeds the limit by this factor."""
MAX_LENGTHS = 6
"""Lengths among the default candidates, so that a profile ends in minutes."""


def profile_levels(
    config: JobConfig,
    args: ModelArgs,
    world: World,
    lengths: IntArray,
    loss_tokens: IntArray,
    candidates: Sequence[Level],
    *,
    memory_limit: int | None = None,
    margin: float = 0.05,
    iterations: int = 6,
) -> Profile:
    """Measure `candidates` on this machine; every rank calls it and gets the same Profile.

    lengths, loss_tokens: tokens and trained tokens of the user's samples, int64 [N]. candidates: in any order; their
    ac_layers and offload_layers are ignored. memory_limit: bytes per rank; by default what the device has. margin:
    share of it that stays free. iterations: packs that each level is timed on, ROUNDS times each. The profile's key is
    that of `profile_key` with candidates (a list), memory_limit, margin and iterations as its settings.
    Raises ValueError if no candidate is given or margin is outside [0, 1).
    """
    if not candidates:
        raise ValueError("profile: there is no candidate level; pass at least one")
    if not 0 <= margin < 1 or iterations < 1:
        raise ValueError(f"profile: margin={margin} must be in [0, 1) and iterations={iterations} at least 1")
    if memory_limit is None:
        # Their communicators take memory of each GPU that levels cannot have, so they must exist before the look at it.
        level_meshes(config, args, world, world.device, candidates)
    limit = available_memory(world) if memory_limit is None else memory_limit
    lengths, loss_tokens = np.asarray(lengths, np.int64), np.asarray(loss_tokens, np.int64)
    settings = {"memory_limit": memory_limit, "margin": margin, "iterations": iterations}
    key = profile_key(config, args, world, lengths, loss_tokens, candidates=list(candidates), **settings)
    run = _ProfileRun(config, args, world, candidates, int(limit * (1 - margin)))
    for max_tokens in sorted({level.max_tokens for level in candidates}):
        run.packs[max_tokens] = Packs.draw(max_tokens, lengths, loss_tokens, iterations, args)
    results = run.time(run.find_fitting(), iterations)
    if any(result.fits for result in results):
        resident, step_seconds = run.measured.held_bytes(), run.measured.step_seconds()
    else:
        # Possibly not even the parameters fit.
        resident, step_seconds = run.estimate(run.candidates[0]).resident_bytes, 0.0
    run.measured.clear()
    return Profile(key, limit, resident, step_seconds, run.measurements, [*results, *run.too_large])


def available_memory(world: World) -> int:
    """Return the bytes that a rank can use, the minimum over all ranks: free memory of its GPU, or a share of RAM."""
    own = device_memory(world.device, ranks_per_node(world.size))
    return int(-all_reduce_values([-float(own)], "max", world.device)[0])


class _ProfileRun:
    """State of one profile: the engine, the packs by length, and what was found so far."""

    def __init__(
        self, config: JobConfig, args: ModelArgs, world: World, candidates: Sequence[Level], limit: int
    ) -> None:
        self.config, self.args, self.world, self.limit = config, args, world, limit
        self.candidates = list(dict.fromkeys(with_policy(level, level.ac_policy) for level in candidates))
        self.measured = MeasuredEngine(config, args, world, self.candidates, accumulate=True)
        self.order: list[int] = []
        self.packs: dict[int, Packs] = {}
        self.measurements: list[Measurement] = []
        self.too_large: list[Candidate] = []

    def find_fitting(self) -> dict[Level, int]:
        """Return the peak bytes of each level that fits, each with as few checkpointed layers as possible."""
        forms: dict[Level, list[str]] = {}
        for level in self.candidates:
            forms.setdefault(with_policy(level, "none"), []).append(level.ac_policy)
        fitting: dict[Level, int] = {}
        for form, policies in forms.items():
            # If nothing has to be recomputed, no policy is faster than none.
            plain = self._peak_within_limit(form)
            if plain is not None:
                fitting[form] = plain
                continue
            if "none" in policies:
                self._add_too_large(form)
            for policy in policies:
                if policy != "none":
                    fitting |= self._fewest_checkpointed(with_policy(form, policy))
        return fitting

    def _fewest_checkpointed(self, level: Level) -> dict[Level, int]:
        """Return `level` with the fewest checkpointed layers that fit, and its peak bytes; {} if all are not enough."""
        every = self.args.num_layers
        complete = replace(level, ac_layers=every)
        # All layers first: if that does not fit, no depth does.
        peak_all = self._peak_within_limit(complete)
        if peak_all is None:
            self._add_too_large(complete)
            return {}
        estimates = [self.estimate(replace(level, ac_layers=depth)).peak_bytes for depth in (every, 0)]
        guess = fewest_layers(estimates[0], estimates[1], every, 0, self.limit)
        # The second depth is near the expected answer, so that the extrapolation is short.
        fewer = every // 2 if guess is None else min(guess, every - 1)
        depth, peaks = every, {every: peak_all}
        peak_fewer = self._peak(replace(level, ac_layers=fewer))
        if peak_fewer is not None:
            peaks[fewer] = peak_fewer
            depth = fewest_layers(peak_all, peak_fewer, every, fewer, self.limit) or 0
        elif every - fewer > 1:
            depth = fewer + 1
        for candidate in range(depth, every):
            peak = peaks.get(candidate) or self._peak(replace(level, ac_layers=candidate))
            if peak is not None and peak <= self.limit:
                return {replace(level, ac_layers=candidate): peak}
        return {complete: peak_all}

    def _peak_within_limit(self, level: Level) -> int | None:
        """Return the measured peak of `level` if it is within the limit; a clearly larger estimate is not run."""
        estimate = self.estimate(level)
        if estimate.peak_bytes > self.limit * ESTIMATE_TOLERANCE:
            self.measurements.append(Measurement(level, estimate.peak_bytes, out_of_memory=True, estimated=True))
            return None
        peak = self._peak(level)
        return peak if peak is not None and peak <= self.limit else None

    def _peak(self, level: Level) -> int | None:
        packs = self.packs[level.max_tokens]
        peak = self.measured.peak_bytes(self._batch(level, packs.heaviest), warm_up=False)
        self.measurements.append(Measurement(level, peak, out_of_memory=peak is None or peak > self.limit))
        return peak

    def _add_too_large(self, level: Level) -> None:
        self.too_large.append(Candidate(level, None, self.measurements[-1].peak_bytes))

    def _batch(self, level: Level, pack: int) -> PackedBatch:
        packs = self.packs[level.max_tokens]
        return packs.batch(pack, level, self.measured.level_index(level), self.args, self.world.rank)

    def estimate(self, level: Level) -> MemoryEstimate:
        """Return the estimate of `level` with as many trained tokens as the timed packs have."""
        return estimate_memory(
            self.args,
            level,
            self.config,
            self.world.size,
            device_type=self.world.device.type,
            loss_tokens=self.packs[level.max_tokens].max_loss_tokens,
        )

    def time(self, fitting: dict[Level, int], iterations: int) -> list[Candidate]:
        """Time the levels round robin; one that runs out of memory after all is dropped, the others continue."""
        seconds: dict[Level, list[float]] = {level: [] for level in fitting}
        # Random order: from light to heavy, drift of the machine would look like the cost of the packs.
        generator = np.random.default_rng(0)
        self.order = [pack for _ in range(ROUNDS) for pack in generator.permutation(iterations).tolist()]
        for number, pack in enumerate(self.order):
            start = number % max(len(seconds), 1)
            levels = list(seconds)
            for level in levels[start:] + levels[:start]:
                taken = self.measured.seconds([self._batch(level, pack)])
                if taken is None:
                    taken_before = seconds.pop(level)
                    loads = self._loads(level)[: len(taken_before)].tolist()
                    self.measurements.append(Measurement(level, out_of_memory=True, loads=loads, seconds=taken_before))
                else:
                    seconds[level].append(taken)
        return [self._candidate(level, peak, seconds.get(level)) for level, peak in fitting.items()]

    def _loads(self, level: Level) -> FloatArray:
        """Return the loads of the packs that `level` is timed on, in timed order."""
        return self.packs[level.max_tokens].loads[self.order]

    def _candidate(self, level: Level, peak_bytes: int, seconds: list[float] | None) -> Candidate:
        if seconds is None:
            return Candidate(level, None, peak_bytes)
        order, taken = np.array(self.order), np.array(seconds)
        packs = np.unique(order)
        least = np.array([taken[order == pack].min() for pack in packs])
        time, error = fit_level_time(self.packs[level.max_tokens].loads[packs], least)
        loads = self._loads(level).tolist()
        self.measurements.append(Measurement(level, peak_bytes, loads=loads, seconds=seconds, error=error))
        return Candidate(level, time, peak_bytes)


@dataclass(frozen=True)
class Packs:
    """Packs of one length, lightest first. loads: float64 [n, 4] as from pack_loads."""

    plan: Plan
    chosen: list[int]
    loads: FloatArray
    max_documents: int
    samples: RandomSamples

    @classmethod
    def draw(cls, max_tokens: int, lengths: IntArray, loss_tokens: IntArray, count: int, args: ModelArgs) -> Packs:
        """Return `count` packs of the samples that fit, evenly spaced from the least attention to the most.

        If there are fewer packs, some are used more than once.
        """
        # Best-fit decreasing packs samples of similar length together, so that packs differ as much as the data allow.
        plan = build_plan(
            lengths,
            [Level(max_tokens)],
            1,
            "flat_sorted",
            loss_tokens=loss_tokens,
            cost=cost_model(args),
            overlong="skip",
        )
        order = np.argsort(plan.pack_sum_sq, kind="stable")
        # The last packs may be nearly empty.
        half_full = order[2 * plan.pack_tokens[order] >= max_tokens]
        order = half_full if len(half_full) else order
        chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist()
        documents = max(int(plan.packs.counts[pack]) for pack in chosen)
        samples = RandomSamples(plan.lengths, plan.loss_tokens, args.vocab_size)
        return cls(plan, chosen, pack_loads(plan)[chosen], documents, samples)

    @property
    def heaviest(self) -> int:
        """The index of the pack with the most attention."""
        return len(self.chosen) - 1

    @property
    def max_loss_tokens(self) -> int:
        """The most trained tokens of any pack."""
        return int(self.loads[:, 1].max())

    def batch(self, number: int, level: Level, level_index: int, args: ModelArgs, rank: int) -> PackedBatch:
        """Return this rank's shard of pack `number` at a level of this length; its loss is a mean over trained tokens.

        All data-parallel ranks get the same documents: FSDP makes ranks wait for each other within a micro-batch, so
        only then is its time that of one pack.
        """
        samples = self.plan.pack(self.chosen[number], 0)
        weights = np.full(len(samples), 1.0 / max(float(self.loads[number, 1]), 1.0))
        whole = make_batch(self.samples, samples, level, level_index, self.max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        return shard_batch(whole, rank % level.cp_degree, level.cp_degree, gather_degree, args.sliding_window)


class RandomSamples:
    """Samples with given lengths and numbers of trained tokens, which are the last; tokens are random."""

    def __init__(self, lengths: IntArray, loss_tokens: IntArray, vocab_size: int) -> None:
        self.lengths, self.loss_tokens, self.vocab_size = lengths, loss_tokens, vocab_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [len] and the loss mask [len] of sample `index`."""
        length = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, length)
        return tokens, np.arange(length) >= length - int(self.loss_tokens[index])


def default_forms(longest: int, world_size: int, args: ModelArgs, *, median: int = 1) -> list[Level]:
    """Return every length with every form of context parallelism; checkpointing is left to `needed_plans`.

    longest, median: tokens of samples. Lengths are powers of two, from the one that holds the longest sample down to
    about the median, at most MAX_LENGTHS, adapted to the world size and the model's limit (`_capacity`). cp degrees are
    all divisors of world_size, each in every style of `cp_styles`.
    """
    largest = 1 << max(longest - 1, 0).bit_length()
    powers = [largest >> k for k in range(MAX_LENGTHS) if largest >> k >= median] or [largest]
    limit = args.max_position_embeddings
    lengths = [_capacity(power, longest, world_size, limit) for power in reversed(powers)]
    cp_degrees = [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
    return [
        Level(max_tokens - max_tokens % cp_degree, cp_degree, style)
        for max_tokens in lengths
        for cp_degree in cp_degrees
        if max_tokens % cp_degree == 0 or cp_degree <= limit == max_tokens
        for style in cp_styles(cp_degree, args)
    ]


def cp_styles(cp_degree: int, args: ModelArgs) -> list[str]:
    """Return the styles that divide the model's heads over `cp_degree` ranks, "ulysses" or else "hybrid" first."""
    heads, kv_heads = args.num_heads, args.num_kv_heads
    if heads % cp_degree == 0 and (kv_heads % cp_degree == 0 or cp_degree % kv_heads == 0):
        # Beyond the kv heads "ulysses" sends copies of them; "hybrid" gathers them once, from other nodes.
        hybrid = ["hybrid"] if cp_degree > kv_heads > 1 else []
        return ["ulysses"] if cp_degree == 1 else ["ulysses", *hybrid, "allgather"]
    # Without a common divisor "hybrid" is the same as "allgather".
    return ["hybrid", "allgather"] if math.gcd(cp_degree, kv_heads) > 1 else ["allgather"]


def _capacity(power: int, longest: int, world_size: int, limit: int) -> int:
    """Return a length near `power` that every cp degree divides, at most `limit`.

    If no such length holds `longest`, the limit itself, which only some cp degrees may divide.
    """
    # The odd part of the world size times a power of two that costs at most 1/64 of the length. Shards of a power of
    # two suit the kernels, and a world of a power of two keeps lengths of powers of two.
    unit = world_size // (world_size & -world_size)
    while 2 * unit <= power // 64:
        unit *= 2
    capacity = -(-power // unit) * unit
    if capacity > limit:
        capacity = limit - limit % world_size
    return limit if capacity < min(longest, power) else capacity
