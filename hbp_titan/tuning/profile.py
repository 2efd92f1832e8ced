"""Profile: which levels fit and how long their iterations take, measured on this machine (paper: FindBestSpCkpt).

Owns the procedure. For each candidate form (length, cp degree, style):

1. Memory. Without checkpointing where that fits. Else, for "full" and for "keep_attention", the peak at two depths
   gives the bytes that a layer saves and so the fewest layers to checkpoint (GreedyProfileCkpt), with a margin; the
   peak at that depth is then measured too. What an estimate (memory_estimate.py) puts clearly beyond the limit is not
   run. Out of memory is a result.
2. Time. Iterations on packs drawn from the user's lengths, light ones and heavy ones, round robin over all levels that
   fit, so that the machine's drift meets each alike. All data-parallel ranks have packs with the same documents: FSDP
   makes ranks wait for each other within an iteration, so only then is its time that of one pack. A LevelTimeModel is
   fitted to each level's.

The engine as a profile uses it: any level at any depth, iterations timed, peaks measured, out of memory survived.

Owns what one measured iteration is, what is held beside it, and what happens when memory does not suffice.

Packs for a profile: drawn from the user's real lengths, light ones and heavy ones, filled with random tokens.

Owns which samples a timed pack holds. The batch itself is the trainer's (data/batch.py). All data-parallel ranks get
packs with the same documents, so that an iteration's time is that of its load and of no other.

The levels that a profile tries unless told otherwise.

Owns the choice of lengths, cp degrees, styles and policies, and its bound: a profile has to end in minutes.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.components.oom import OutOfMemory, device_memory, is_out_of_memory, measure_memory
from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm
from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.distributed.world import World, all_reduce_values, any_rank, barrier, ranks_per_node
from hbp_titan.engine import Engine, level_meshes
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.packing.ragged import IntArray
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory, fewest_layers
from hbp_titan.tuning.profile_file import Measurement, Profile, fit_level_time, profile_key
from hbp_titan.tuning.search import Candidate


class RandomSamples:
    """Samples with given lengths and numbers of trained tokens; their tokens are random, the last ones are trained."""

    def __init__(self, lengths: IntArray, loss_tokens: IntArray, vocab_size: int) -> None:
        self.lengths, self.loss_tokens, self.vocab_size = lengths, loss_tokens, vocab_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [len] and loss mask [len]."""
        length = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, length)
        return tokens, np.arange(length) >= length - int(self.loss_tokens[index])


@dataclass(frozen=True)
class Packs:
    """Packs of one length, lightest first; loads: float64 [n, 4] as from pack_loads."""

    plan: Plan
    chosen: list[int]
    loads: FloatArray
    max_documents: int
    samples: RandomSamples

    @classmethod
    def draw(cls, max_tokens: int, lengths: IntArray, loss_tokens: IntArray, count: int, vocab_size: int) -> Packs:
        """`count` packs of the samples that fit, at even distances from the least attention to the most.

        Best-fit decreasing packs samples of like length together, so that packs differ as much as the data allow.
        Where there are fewer packs, some are taken more than once.
        """
        plan = build_plan(lengths, [Level(max_tokens)], 1, "flat_sorted", loss_tokens=loss_tokens, overlong="skip")
        order = np.argsort(plan.pack_sum_sq, kind="stable")
        # What was left over at the end may be nearly empty packs.
        half_full = order[2 * plan.pack_tokens[order] >= max_tokens]
        order = half_full if len(half_full) else order
        chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist()
        documents = max(int(plan.packs.counts[pack]) for pack in chosen)
        samples = RandomSamples(plan.lengths, plan.loss_tokens, vocab_size)
        return cls(plan, chosen, pack_loads(plan)[chosen], documents, samples)

    @property
    def heaviest(self) -> int:
        """The pack with the most attention."""
        return len(self.chosen) - 1

    @property
    def max_loss_tokens(self) -> int:
        """Most trained tokens of a pack."""
        return int(self.loads[:, 1].max())

    def batch(self, number: int, level: Level, level_index: int, args: ModelArgs, rank: int) -> PackedBatch:
        """This rank's shard of pack `number` at a level of this length; its loss is a mean over trained tokens."""
        samples = self.plan.pack(self.chosen[number], 0)
        weights = np.full(len(samples), 1.0 / max(float(self.loads[number, 1]), 1.0))
        whole = make_batch(self.samples, samples, level, level_index, self.max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        return shard_batch(whole, rank % level.cp_degree, level.cp_degree, gather_degree)


T = TypeVar("T")

ALONE_SECONDS = 60
"""How long a rank out of memory waits for the others, which run out at the same operator if they do."""


def available_memory(world: World) -> int:
    """Bytes that a rank can use, the least over all ranks: of its GPU what others leave, of a machine its share."""
    own = device_memory(world.device, ranks_per_node(world.size))
    return int(-all_reduce_values([-float(own)], "max", world.device)[0])


class ProfileEngine:
    """At most one engine with its optimizer, made when it is first needed.

    Out of memory ends the iteration on the rank where it is raised. Every rank runs the same shapes on packs with the
    same documents, so ranks run out together, at the same operator; they then agree in the control group, and the
    engine is built again, because FSDP's state is not to be trusted after a broken iteration. The groups that compute
    carry no agreement: NCCL would pair it with the next collective of a rank that goes on. Where one rank alone runs
    out (GPUs of a job differ by what else is on them), the others wait for it in such a collective, which cannot be
    taken back: the rank ends the run after ALONE_SECONDS. An estimate keeps what surely does not fit from being tried.
    """

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, levels: Sequence[Level]) -> None:
        self.config = copy.deepcopy(config)
        self.config.levels = list(levels)
        # Weights do not matter to time or memory.
        self.config.checkpoint.initial_load_path = ""
        self.args, self.world = args, world
        self._engine: Engine | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def clear(self) -> None:
        """Free the engine."""
        self._engine = self._optimizer = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, level: Level, packs: Packs) -> int | None:
        """The most that a rank holds during an iteration on the heaviest pack; None where memory does not suffice.

        Gradients and optimizer state are there before, as in every step but a run's first.
        """

        def measured() -> int:
            if self.config.compile.enable:
                self._iterate(level, packs, packs.heaviest)  # compilation has a peak of its own
            held = self.held_bytes()
            with measure_memory(self.world.device) as use:
                self._iterate(level, packs, packs.heaviest)
            return held + use.peak_bytes

        peak = self._attempt(measured)
        return None if peak is None else int(all_reduce_values([float(peak)], "max", self.world.device)[0])

    def seconds(self, level: Level, packs: Packs, number: int) -> float | None:
        """Time of an iteration, from when all ranks are ready to when the slowest is done; None: out of memory."""

        def timed() -> float:
            batch = packs.batch(number, level, self._index(level), self.args, self.world.rank)
            self._wait()
            started = time.perf_counter()
            self.engine.forward_backward(batch)
            self._wait_for_device()
            return time.perf_counter() - started

        taken = self._attempt(timed)
        return None if taken is None else all_reduce_values([taken], "max", self.world.device)[0]

    def step_seconds(self, repeats: int = 3) -> float:
        """Time of clipping, the optimizer's step and the reduction of the losses; the median of a few."""
        engine, taken = self.engine, []
        assert self._optimizer is not None
        for _ in range(repeats):
            self._wait()
            started = time.perf_counter()
            float(clip_grad_norm(engine.model, self.config.training.max_norm))
            all_reduce_values([0.0] * len(self.config.levels), "sum", self.world.device)
            self._optimizer.step()
            self._wait_for_device()
            taken.append(time.perf_counter() - started)
        return all_reduce_values([sorted(taken)[repeats // 2]], "max", self.world.device)[0]

    def held_bytes(self) -> int:
        """What a rank holds between iterations."""
        parameters = list(self.engine.model.parameters())
        if self.world.device.type == "cuda":
            return torch.cuda.memory_allocated(self.world.device)
        assert self._optimizer is not None
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        held: list[Tensor] = [*parameters, *(p.grad for p in parameters if p.grad is not None), *states]
        return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in held)

    @property
    def engine(self) -> Engine:
        """The engine, with gradients of zero and the optimizer's state."""
        if self._engine is None:
            # Graphs of an earlier engine would count towards the compiler's limit.
            torch._dynamo.reset()
            self._engine = Engine(self.config, self.args, self.world)
            self._optimizer = build_optimizer(self._engine.model, self.config.optimizer)
            for parameter in self._engine.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return self._engine

    def _index(self, level: Level) -> int:
        """Where the engine has `level`; another depth or policy of a level that it was made with is added."""
        runtime = self.engine.runtime
        if level not in runtime.levels:
            shape = level.cp_shape(self.args.num_kv_heads)
            same = [k for k, other in enumerate(runtime.levels) if other.cp_shape(self.args.num_kv_heads) == shape]
            runtime.levels = (*runtime.levels, level)
            runtime.meshes.append(runtime.meshes[same[0]])
        return runtime.levels.index(level)

    def _iterate(self, level: Level, packs: Packs, number: int) -> None:
        self.engine.forward_backward(packs.batch(number, level, self._index(level), self.args, self.world.rank))

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None on every rank where any ran out of memory."""
        result, failed = None, False
        try:
            result = work()
        except RuntimeError as error:
            if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
            failed = True
        # Here the exception is gone, and the tensors that its traceback held.
        if self._any_rank(failed):
            self.clear()
            return None
        return result

    def _any_rank(self, failed: bool) -> bool:
        """Whether any rank failed; ValueError on one that did where others do not come within ALONE_SECONDS."""
        try:
            return any_rank(failed, timeout_seconds=ALONE_SECONDS if failed else None)
        except RuntimeError:
            if not failed:
                raise
            raise ValueError(
                f"rank {self.world.rank}: out of memory while levels are measured, on this rank alone: end other "
                "processes on its GPU (nvidia-smi), or name [[levels]] blocks that need less"
            ) from None

    def _wait(self) -> None:
        self._wait_for_device()
        barrier()

    def _wait_for_device(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


ROUNDS = 2
"""How often each pack is timed; the least counts, because what disturbs a machine only adds time."""
ESTIMATE_TOLERANCE = 1.15
"""An estimate beyond the limit by this factor settles that a level does not fit."""


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
    ac_layers do not count. memory_limit: bytes of a rank; what the device has unless given. margin: share of it that
    stays free. iterations: packs that each level is timed on, ROUNDS times each. The key is that of `profile_key` with
    candidates (a list), memory_limit, margin and iterations as its settings.
    Raises ValueError where no candidate, or a margin outside [0, 1), is given.
    """
    if not candidates:
        raise ValueError("no candidate level is given to profile")
    if not 0 <= margin < 1 or iterations < 1:
        raise ValueError(f"profile: margin={margin} must lie in [0, 1) and iterations={iterations} be at least 1")
    if memory_limit is None:
        # First, because their communicators take memory of each GPU that levels cannot have.
        level_meshes(config, args, world, world.device, candidates)
    limit = available_memory(world) if memory_limit is None else memory_limit
    lengths, loss_tokens = np.asarray(lengths, np.int64), np.asarray(loss_tokens, np.int64)
    settings = {
        "candidates": list(candidates),
        "memory_limit": memory_limit,
        "margin": margin,
        "iterations": iterations,
    }
    key = profile_key(config, args, world, lengths, loss_tokens, **settings)
    run = _Run(config, args, world, candidates, int(limit * (1 - margin)))
    for max_tokens in sorted({level.max_tokens for level in candidates}):
        run.packs[max_tokens] = Packs.draw(max_tokens, lengths, loss_tokens, iterations, args.vocab_size)
    fitting = run.find_fitting()
    results = run.time(fitting, iterations)
    if any(result.fits for result in results):
        resident, step_seconds = run.engine.held_bytes(), run.engine.step_seconds()
    else:
        # Not even the parameters may fit.
        resident, step_seconds = run.estimate(run.candidates[0]).resident_bytes, 0.0
    run.engine.clear()
    return Profile(key, limit, resident, step_seconds, run.measurements, [*results, *run.beyond])


@dataclass(frozen=True)
class _Fitting:
    """A complete level whose memory suffices."""

    level: Level
    peak_bytes: int


class _Run:
    """One profile in the making."""

    def __init__(
        self, config: JobConfig, args: ModelArgs, world: World, candidates: Sequence[Level], limit: int
    ) -> None:
        self.config, self.args, self.world, self.limit = config, args, world, limit
        self.candidates = list(dict.fromkeys(replace(level, ac_layers=None) for level in candidates))
        self.engine = ProfileEngine(config, args, world, self.candidates)
        self.order: list[int] = []
        self.packs: dict[int, Packs] = {}
        self.measurements: list[Measurement] = []
        self.beyond: list[Candidate] = []

    def find_fitting(self) -> list[_Fitting]:
        """The levels whose memory suffices, each with as few checkpointed layers as possible."""
        forms: dict[Level, list[str]] = {}
        for level in self.candidates:
            forms.setdefault(replace(level, ac_policy="none"), []).append(level.ac_policy)
        fitting = []
        for form, policies in forms.items():
            # No policy is faster than none where nothing has to be recomputed.
            plain = self._within(form)
            if plain is not None:
                fitting.append(_Fitting(form, plain))
                continue
            if "none" in policies:
                self.beyond.append(Candidate(form, None, self._last_peak()))
            for policy in policies:
                if policy != "none":
                    found = self._fewest(replace(form, ac_policy=policy))
                    fitting += [found] if found else []
        return fitting

    def _fewest(self, level: Level) -> _Fitting | None:
        """`level` with the fewest checkpointed layers that memory allows; None where all of them do not suffice."""
        every = self.args.num_layers
        peak_all = self._within(replace(level, ac_layers=every))
        if peak_all is None:
            self.beyond.append(Candidate(replace(level, ac_layers=every), None, self._last_peak()))
            return None
        estimates = [self.estimate(replace(level, ac_layers=depth)).peak_bytes for depth in (every, 0)]
        guess = fewest_layers(estimates[0], estimates[1], every, 0, self.limit)
        # The second depth: near where the answer is expected, so that little is left to extrapolation.
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
                return _Fitting(replace(level, ac_layers=candidate), peak)
        return _Fitting(replace(level, ac_layers=every), peak_all)

    def _within(self, level: Level) -> int | None:
        """The measured peak of `level` where it is within the limit; not run where the estimate is clearly beyond."""
        estimate = self.estimate(level)
        if estimate.peak_bytes > self.limit * ESTIMATE_TOLERANCE:
            self.measurements.append(Measurement(level, estimate.peak_bytes, out_of_memory=True, estimated=True))
            return None
        peak = self._peak(level)
        return peak if peak is not None and peak <= self.limit else None

    def _peak(self, level: Level) -> int | None:
        peak = self.engine.peak_bytes(level, self.packs[level.max_tokens])
        self.measurements.append(Measurement(level, peak, out_of_memory=peak is None or peak > self.limit))
        return peak

    def _last_peak(self) -> int | None:
        return self.measurements[-1].peak_bytes

    def estimate(self, level: Level) -> MemoryEstimate:
        """What `level` takes, with as many trained tokens as the packs that are timed."""
        return estimate_memory(
            self.args,
            level,
            self.config,
            self.world.size,
            device_type=self.world.device.type,
            loss_tokens=self.packs[level.max_tokens].max_loss_tokens,
        )

    def time(self, fitting: list[_Fitting], iterations: int) -> list[Candidate]:
        """Time the levels round robin; one that runs out of memory after all is left out, the others go on."""
        seconds: dict[Level, list[float]] = {found.level: [] for found in fitting}
        # Not from light to heavy: what drifts over the rounds would look like the packs' work.
        generator = np.random.default_rng(0)
        self.order = [pack for _ in range(ROUNDS) for pack in generator.permutation(iterations).tolist()]
        for number, pack in enumerate(self.order):
            start = number % max(len(seconds), 1)
            levels = list(seconds)
            for level in levels[start:] + levels[:start]:
                taken = self.engine.seconds(level, self.packs[level.max_tokens], pack)
                if taken is None:
                    taken_before = seconds.pop(level)
                    loads = self._loads(level)[: len(taken_before)].tolist()
                    self.measurements.append(Measurement(level, out_of_memory=True, loads=loads, seconds=taken_before))
                else:
                    seconds[level].append(taken)
        return [self._candidate(found, seconds.get(found.level)) for found in fitting]

    def _loads(self, level: Level) -> FloatArray:
        """What the packs hold that `level` is timed on, in the order of their rounds."""
        return self.packs[level.max_tokens].loads[self.order]

    def _candidate(self, found: _Fitting, seconds: list[float] | None) -> Candidate:
        if seconds is None:
            return Candidate(found.level, None, found.peak_bytes)
        loads = self._loads(found.level)
        order, least = np.array(self.order), np.array(seconds)
        packs = np.unique(order)
        time, error = fit_level_time(
            self.packs[found.level.max_tokens].loads[packs], np.array([least[order == pack].min() for pack in packs])
        )
        self.measurements.append(
            Measurement(found.level, found.peak_bytes, loads=loads.tolist(), seconds=seconds, error=error)
        )
        return Candidate(found.level, time, found.peak_bytes)


MAX_LENGTHS = 6
POLICIES = ("none", "full", "keep_attention")


def default_candidates(longest: int, world_size: int, args: ModelArgs, *, median: int = 1) -> list[Level]:
    """Every length with every form of context parallelism and every policy; ac_layers is the profile's to find.

    longest, median: tokens of samples. Lengths are powers of two, from the one that holds the longest sample down to
    about the median, at most MAX_LENGTHS. cp degrees are powers of two that divide world_size: without (1), by heads
    where the heads allow it ("ulysses"), else "hybrid", and by gathered keys ("allgather") beside both.
    """
    largest = 1 << max(longest - 1, 0).bit_length()
    lengths = [largest >> k for k in range(MAX_LENGTHS) if largest >> k >= median] or [largest]
    candidates = []
    for max_tokens in reversed(lengths):
        for cp_degree, style in _forms(world_size, args):
            if max_tokens % cp_degree == 0:
                candidates += [Level(max_tokens, cp_degree, style, policy) for policy in POLICIES]
    return candidates


def _forms(world_size: int, args: ModelArgs) -> list[tuple[int, str]]:
    forms = [(1, "ulysses")]
    cp_degree = 2
    while world_size % cp_degree == 0 and cp_degree <= world_size:
        kv = args.num_kv_heads
        by_heads = args.num_heads % cp_degree == 0 and (kv % cp_degree == 0 or cp_degree % kv == 0)
        forms.append((cp_degree, "ulysses" if by_heads else "hybrid"))
        # With one kv head hybrid is allgather.
        if by_heads or kv > 1:
            forms.append((cp_degree, "allgather"))
        cp_degree *= 2
    return forms
