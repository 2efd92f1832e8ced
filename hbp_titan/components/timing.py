"""Timing: how long micro-batches take on each rank, what the plan's model predicts, and where the two drift apart.

ComputeTimer     wall time of each micro-batch, and the part of it that the rank computed rather than waited
LevelTimeModel   seconds of a micro-batch from what its pack holds; predict_epoch for a whole plan
TimingMonitor    compares both during training and warns about drift and stragglers

Ranks wait for each other inside collectives, so wall time is the same on all of them and does not show which one is
slow. On a CPU a waiting thread sleeps: its thread time is its work. On a GPU a waiting collective spins, so work is
taken between the arrival of a block's parameters and its output, summed over the forward passes of all blocks, which is
proportional to the whole. Work is compared between ranks only.

Shape suffixes: R ranks, I micro-batches.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Level, Plan
from hbp_titan.utils import human_seconds

FloatArray = NDArray[np.float64]
LEVEL_TIMES = "level_times.json"
"""File of the run folder with the measured time models of automatically chosen levels."""
DRIFT_THRESHOLD = 0.2
"""Relative deviation of time, waiting or a rank's speed from the plan's model above which a warning is printed."""


class ComputeTimer:
    """Measures (wall, work) of micro-batches.

    Made after the model is parallelized, so that its hooks run inside FSDP's: those wait for parameters, these do not.
    """

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._cpu: list[tuple[float, float]] = []
        # Per micro-batch the events at its two ends, then those around each block's forward.
        self._gpu: list[list[torch.cuda.Event]] = []
        self._blocks: list[torch.cuda.Event] | None = None
        if self.on_gpu:
            # Forward only: hooks on backward would cut the compiled graph of a block.
            for block in model.blocks():
                block.register_forward_pre_hook(self._mark)
                block.register_forward_hook(self._mark, prepend=True)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Measure one forward and backward."""
        if self.on_gpu:
            self._blocks = []
            start = _recorded_event()
            yield
            self._gpu.append([start, _recorded_event(), *self._blocks])
            self._blocks = None
        else:
            wall, work = time.perf_counter(), time.thread_time()
            yield
            self._cpu.append((time.perf_counter() - wall, time.thread_time() - work))

    def pop(self) -> list[tuple[float, float]]:
        """Return (wall, work) in seconds of each micro-batch since the last call; waits for the GPU."""
        if self.on_gpu:
            # elapsed_time needs finished events; the step's results are about to be read anyway.
            torch.cuda.synchronize()
            measured = [_seconds(events) for events in self._gpu]
        else:
            measured = self._cpu
        self._cpu, self._gpu = [], []
        return measured

    def _mark(self, *_: Any) -> None:
        # Validation and the warm-up run the blocks too, outside of any micro-batch.
        if self._blocks is not None:
            self._blocks.append(_recorded_event())


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(events: list[torch.cuda.Event]) -> tuple[float, float]:
    start, end, *marks = events
    # marks alternate: a block's parameters are gathered, its output is computed.
    work = sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True))
    return start.elapsed_time(end) / 1000, work / 1000


@dataclass(frozen=True)
class LevelTimeModel:
    """Seconds of one micro-batch of a level on one data-parallel rank (its cp ranks together work on one pack).

    A level's batch has a static shape, so padding costs what tokens cost: linear layers, collectives and launches are
    one constant, `base`. What differs between packs is the head (per_loss_token), attention (per_square: per squared
    token of a document, summed over documents) and, on a CPU, the number of documents (per_document).
    """

    base: float
    per_loss_token: float = 0.0
    per_square: float = 0.0
    per_document: float = 0.0

    def seconds(self, loads: FloatArray) -> FloatArray:
        """Return the seconds of packs, float64 [n]. loads: of pack_loads, [n, 4]."""
        return loads @ np.array(dataclasses.astuple(self))


def pack_loads(plan: Plan) -> FloatArray:
    """Return LevelTimeModel's features of each pack: 1, trained tokens, squared tokens, documents; [packs, 4]."""
    documents = np.diff(plan.packs.offsets)
    columns = [np.ones(len(documents)), plan.packs.sums(plan.loss_tokens), plan.pack_sum_sq, documents]
    return np.stack(columns, axis=1).astype(np.float64)


@dataclass(frozen=True)
class EpochTime:
    """Predicted seconds of an epoch.

    slowest, mean: of each micro-batch, over the ranks, [I]. steps: what optimizer steps take in addition.
    """

    slowest: FloatArray
    mean: FloatArray
    steps: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole epoch: ranks wait for the slowest in every micro-batch (paper section 2.1)."""
        return float(self.slowest.sum()) + self.steps

    @property
    def idle(self) -> float:
        """Share of rank time spent waiting for the slowest rank."""
        return 1.0 - float(self.mean.sum() / self.slowest.sum())


def predict_epoch(plan: Plan, times: Sequence[LevelTimeModel], step_seconds: float = 0.0) -> EpochTime:
    """Predict an epoch. times: one per level; step_seconds: clipping, optimizer and bookkeeping of one step."""
    assert len(times) == len(plan.levels)
    loads, levels = pack_loads(plan), plan.pack_levels
    seconds = np.zeros(len(loads))
    for k, level_time in enumerate(times):
        seconds[levels == k] = level_time.seconds(loads[levels == k])
    mean, slowest = plan.over_ranks(seconds)
    return EpochTime(slowest=slowest, mean=mean, steps=step_seconds * plan.num_steps)


def load_level_times(folder: Path, levels: Sequence[Level]) -> tuple[LevelTimeModel, ...] | None:
    """Return the measured time model of each level; None if the run folder has none for these levels.

    Raises ValueError for a corrupt file.
    """
    path = folder / LEVEL_TIMES
    if not path.exists():
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        known = {Level(**entry["level"]): LevelTimeModel(**entry["time"]) for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a file of level times; delete it") from None
    # The user may have edited the levels since they were measured.
    return tuple(known[level] for level in levels) if set(levels) <= set(known) else None


def predicted_time(
    config: JobConfig,
    args: ModelArgs,
    plan: Plan,
    first_step: int,
    steps: int,
    device: torch.device,
    measured: Sequence[LevelTimeModel] | None,
    warmup_seconds: Sequence[float],
) -> str:
    """Return the predicted time of the next `steps` optimizer steps, and what the prediction is based on.

    Best first: measured level times, an estimate for a known GPU, the warm-up. plan: of the current epoch, at its step
    first_step; later epochs are assumed to be like it. warmup_seconds: of each level's heaviest micro-batch.
    """
    times, step_seconds, origin = [LevelTimeModel(base=seconds) for seconds in warmup_seconds], 0.0, ""
    if measured is not None:
        times, origin = [*measured], "from the levels' measured times"
    elif device.type == "cuda":
        # Not at the top: a run that needs no estimate does not load the performance model.
        from hbp_titan.tuning.hardware import hardware_of
        from hbp_titan.tuning.time_model import time_model

        hardware = hardware_of(device)
        if hardware is not None:
            model = time_model(args, config, hardware, plan.world_size)
            times = [model.level_time(level) for level in config.levels]
            step_seconds, origin = model.step_seconds(), f"estimated for {hardware.name}"
    origin = origin or "from the warm-up of each level" + ", compilation included" * config.compile.enable
    epoch = predict_epoch(plan, times, step_seconds)
    left = min(steps, plan.num_steps - first_step)
    begin, end = plan.step_offsets[[first_step, first_step + left]]
    seconds = float(epoch.slowest[begin:end].sum()) + left * step_seconds
    seconds += (steps - left) * epoch.seconds / plan.num_steps
    return f"{human_seconds(seconds)} for {steps:,} steps, {origin}"


@dataclass(frozen=True)
class LevelCheck:
    """Comparison of one level since the last report.

    ratio: median of measured / modelled seconds. waiting: measured share of rank time spent waiting for the slowest
    rank; planned: the same by the model.
    """

    micro_batches: int
    ratio: float
    waiting: float
    planned: float


@dataclass(frozen=True)
class TimingReport:
    """levels: by index, those that ran. slowest: (rank, its pace over the median rank's). work: seconds per rank."""

    levels: dict[int, LevelCheck]
    slowest: tuple[int, float]
    work: tuple[float, ...]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the entry of metrics.jsonl. names: one per level."""
        checks = {names[k]: vars(check) for k, check in self.levels.items()}
        rank, ratio = self.slowest
        return {"levels": checks, "slowest_rank": rank, "slowest_ratio": ratio, "work_by_rank": list(self.work)}

    def line(self, names: Sequence[str]) -> str:
        """Return the console line."""
        parts = [
            f"{names[k]} {check.ratio:.2f}x of predicted, waiting {check.waiting:.1%} (plan {check.planned:.1%})"
            for k, check in self.levels.items()
        ]
        rank, ratio = self.slowest
        return f"timing check: {'; '.join(parts)}; slowest rank {rank}, {ratio:.2f}x the median"

    def warnings(self, names: Sequence[str]) -> list[str]:
        """Return one line per deviation above DRIFT_THRESHOLD, with what to do about it."""
        lines = []
        for k, check in self.levels.items():
            if abs(check.ratio - 1) > DRIFT_THRESHOLD:
                pace = f"{check.ratio:.2f}x slower" if check.ratio > 1 else f"{1 / check.ratio:.2f}x faster"
                lines.append(
                    f"level {names[k]} runs {pace} than predicted; check for other jobs on this node, or rerun "
                    "scripts/select_levels.py"
                )
            if check.waiting - check.planned > DRIFT_THRESHOLD:
                lines.append(
                    f"level {names[k]}: ranks wait {check.waiting:.0%} of the time, the plan predicts "
                    f"{check.planned:.0%}; the cost model does not fit this machine: set packing.auto_levels = true"
                )
        rank, ratio = self.slowest
        if ratio > 1 + DRIFT_THRESHOLD:
            lines.append(
                f"straggler: rank {rank} is {ratio:.2f}x slower than the median; check its node for other jobs or "
                "thermal throttling"
            )
        return [f"warning: {line}" for line in lines]


class TimingMonitor:
    """Measures each micro-batch and reports every `interval` optimizer steps; 0 measures nothing.

    times: measured time models, one per level. None takes the plan's cost models, which have no unit: the median
    micro-batch of each level so far sets it, and reports show drift from that.
    """

    def __init__(self, model: Decoder, world: World, times: Sequence[LevelTimeModel] | None, interval: int) -> None:
        self.world = world
        self.times = times
        self.interval = interval
        self.timer = ComputeTimer(model, world.device)
        self._ratios: dict[int, list[float]] = {}
        self._indices: list[int] = []
        self._seconds: list[tuple[float, float]] = []

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Measure the forward and backward of micro-batch `index` of the plan."""
        if not self.interval:
            yield
            return
        with self.timer.micro_batch():
            yield
        self._indices.append(index)

    def pop(self) -> list[tuple[float, float]]:
        """Return (wall, work) in seconds of this rank's micro-batches since the last call; waits for the GPU."""
        seconds = self.timer.pop() if self.interval else []
        self._seconds += seconds
        return seconds

    def report(self, plan: Plan, steps_done: int) -> TimingReport | None:
        """Return the report of the micro-batches since the last one, every interval and at the end of an epoch.

        A collective: every rank calls it after each step and its `pop`. steps_done: optimizer steps of `plan` so far.
        """
        if not self.interval or (steps_done % self.interval and steps_done < plan.num_steps):
            return None
        # At the interval only: the gather is small, but its wait is one more synchronization.
        own = torch.tensor(self._seconds, dtype=torch.float64, device=self.world.device)
        gathered = [torch.empty_like(own) for _ in range(self.world.size)]
        dist.all_gather(gathered, own)
        wall_RI, work_RI = torch.stack(gathered).cpu().numpy().transpose(2, 0, 1)
        indices = np.array(self._indices)
        self._indices, self._seconds = [], []
        slots_RI = indices * plan.world_size + np.arange(plan.world_size)[:, None]
        packs_RI = np.searchsorted(plan.rank_slots, slots_RI, side="right") - 1
        levels_RI, model_RI = plan.pack_levels[packs_RI], self._modelled(plan, packs_RI)
        if plan.level_order == "parallel":
            # Levels side by side share the wall time; what each of them takes shows in the work of its ranks.
            wall_RI = work_RI * (wall_RI.max(0).sum() / work_RI.max(0).sum())
        for k in np.unique(levels_RI).tolist():
            # Cost models count FLOPs. All micro-batches so far measure the machine's speed: the first ones are slow.
            if self.times is None:
                self._ratios.setdefault(k, []).extend(_ratios(wall_RI, model_RI, levels_RI == k))
        units = np.array([np.median(self._ratios.get(k, 1.0)) for k in range(len(plan.levels))])
        return compare(levels_RI, wall_RI, work_RI, model_RI * units[levels_RI])

    def _modelled(self, plan: Plan, packs_RI: np.ndarray) -> FloatArray:
        """Return the modelled seconds of each rank for its packs, [R, I]."""
        packs, where = np.unique(packs_RI, return_inverse=True)
        seconds, level_of = np.zeros(len(packs)), plan.pack_levels[packs]
        loads = pack_loads(plan)[packs]
        for k in np.unique(level_of).tolist():
            of, level = level_of == k, plan.levels[k]
            if self.times is None:
                # Padding is computed like tokens; the ranks of a pack share it.
                tokens = np.full(int(of.sum()), level.max_tokens)
                seconds[of] = plan.costs[k].cost(tokens, plan.pack_sum_sq[packs[of]]) / level.cp_degree
            else:
                seconds[of] = self.times[k].seconds(loads[of])
        return seconds[where].reshape(packs_RI.shape)


def _ratios(wall_RI: FloatArray, model_RI: FloatArray, of_RI: np.ndarray) -> list[float]:
    """Return measured / modelled seconds of each micro-batch that has any of the chosen ranks, bool [R, I]."""
    used = of_RI.any(0)
    longest = [np.where(of_RI, seconds, 0.0).max(0)[used] for seconds in (wall_RI, model_RI)]
    return (longest[0] / longest[1]).tolist()


def compare(levels_RI: np.ndarray, wall_RI: FloatArray, work_RI: FloatArray, model_RI: FloatArray) -> TimingReport:
    """Return the report of micro-batches I on ranks R, all in seconds. levels_RI: level index, int [R, I]."""
    checks = {}
    paces = np.ones_like(work_RI)
    longest_work, longest_model = (np.broadcast_to(x.max(0), x.shape) for x in (work_RI, model_RI))
    for k in np.unique(levels_RI).tolist():
        of = levels_RI == k
        checks[k] = LevelCheck(
            micro_batches=int(of.any(0).sum()),
            ratio=float(np.median(_ratios(wall_RI, model_RI, of))),
            waiting=1 - float(work_RI[of].sum() / longest_work[of].sum()),
            planned=1 - float(model_RI[of].sum() / longest_model[of].sum()),
        )
        # Work has a unit of its own, so only a rank's ratio to the other ranks is meaningful.
        paces[of] = (work_RI / model_RI)[of] / np.median((work_RI / model_RI)[of])
    # Weighted by modelled time, so that a level of few short micro-batches does not decide.
    pace_R = (paces * model_RI).sum(1) / model_RI.sum(1)
    slowest = int(pace_R.argmax())
    return TimingReport(checks, (slowest, float(pace_R[slowest] / np.median(pace_R))), tuple(work_RI.sum(1).tolist()))
