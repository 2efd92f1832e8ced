"""Profile: which levels fit and how long their iterations take, measured on this machine (paper: FindBestSpCkpt).

Owns the procedure. For each candidate form (length, cp degree, style):

1. Memory. Without checkpointing where that fits. Else, for "full" and for "keep_attention", the peak at two depths
   gives the bytes that a layer saves and so the fewest layers to checkpoint (GreedyProfileCkpt), with a margin; the
   peak at that depth is then measured too. What an estimate (memory_estimate.py) puts clearly beyond the limit is not
   run. Out of memory is a result.
2. Time. Iterations on packs drawn from the user's lengths, light ones and heavy ones, round robin over all levels that
   fit, so that the machine's drift meets each alike. All data-parallel ranks have packs with the same documents: FSDP
   makes ranks wait for each other within an iteration, so only then is its time that of one pack. A LevelTime is
   fitted to each level's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World
from hbp_titan.levels.candidate import Candidate
from hbp_titan.levels.engine import level_meshes
from hbp_titan.levels.level_time import FloatArray
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.arrays import IntArray
from hbp_titan.selection.memory_estimate import MemoryEstimate, estimate_memory, fewest_layers
from hbp_titan.selection.profile_engine import ProfileEngine, available_memory
from hbp_titan.selection.profile_file import Measurement, Profile, profile_key
from hbp_titan.selection.profile_packs import Packs
from hbp_titan.selection.time_fit import fit_level_time

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
