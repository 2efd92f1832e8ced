"""TimingMonitor: the measured time of iterations against the plan's model, per level and rank, while training runs.

Owns what is compared, when it is said that the two part, and the advice. Every rank measures (work_clock.py); all ranks
gather at the same steps and see the same report.

ComputeTimer: how long each iteration of this rank took, and how much of that it worked rather than waited.

Owns the reading of both on a CPU and on a GPU. Ranks wait for each other inside collectives, so wall time is the same
on all of them and says nothing of who was slow. On a CPU a waiting thread sleeps: its own CPU time is its work. On a
GPU a waiting collective spins: the work is taken between a block's parameters being there and its output, on the
stream, over all blocks' forward passes, which is in proportion to the whole. Work is compared between ranks only.

LevelTimeModel: the seconds of an iteration from what the packs of a plan hold, and the epoch that follows from them.

Owns the form of the time model that measurement, estimate, selection and simulation share. A level's batch has a
static shape, so padding costs what tokens cost: the linear layers, the collectives and the launches are one constant a
level. What differs between packs of a level is attention (squared document lengths), the loss head (trained tokens)
and, on a CPU, the number of documents. Data-parallel ranks wait for the slowest (paper section 2.1).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hbp_titan.distributed.world import World
from hbp_titan.models.decoder import Decoder
from hbp_titan.packing import Plan


class ComputeTimer:
    """Made after the model is parallelized, so that its hooks lie inside FSDP's: those wait, these do not."""

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._cpu: list[tuple[float, float]] = []
        # For each iteration the events at its two ends, then those around each block's forward.
        self._gpu: list[list[torch.cuda.Event]] = []
        self._blocks: list[torch.cuda.Event] | None = None
        if self.on_gpu:
            for block in model.blocks():
                block.register_forward_pre_hook(self._mark)
                block.register_forward_hook(self._mark, prepend=True)

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one forward and backward."""
        if self.on_gpu:
            self._blocks = []
            start = _recorded()
            yield
            self._gpu.append([start, _recorded(), *self._blocks])
            self._blocks = None
        else:
            wall, work = time.perf_counter(), time.thread_time()
            yield
            self._cpu.append((time.perf_counter() - wall, time.thread_time() - work))

    def read(self) -> list[tuple[float, float]]:
        """(wall, work) in seconds of each iteration since the last call; on a GPU waits for the last to end."""
        if self.on_gpu:
            torch.cuda.synchronize()
            read = [_seconds(events) for events in self._gpu]
        else:
            read = self._cpu
        self._cpu, self._gpu = [], []
        return read

    def _mark(self, *_: Any) -> None:
        # Validation and the probe run the blocks too, outside of any iteration.
        if self._blocks is not None:
            self._blocks.append(_recorded())


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(events: list[torch.cuda.Event]) -> tuple[float, float]:
    start, end, *marks = events
    work = sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True))
    return start.elapsed_time(end) / 1000, work / 1000


FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LevelTimeModel:
    """Seconds of one iteration on one data-parallel rank (all of its cp ranks together work on one pack).

    base: whatever the pack holds. per_loss_token: for each trained token. per_square: for each squared token of a
    document, summed over documents. per_document: for each document.
    """

    base: float
    per_loss_token: float = 0.0
    per_square: float = 0.0
    per_document: float = 0.0

    def seconds(self, loads: FloatArray) -> FloatArray:
        """Seconds of packs; loads: as from pack_loads, [n, 4] -> float64 [n]."""
        return loads @ np.array(dataclasses.astuple(self))


def pack_loads(plan: Plan) -> FloatArray:
    """Features of each pack for LevelTimeModel: 1, trained tokens, squared tokens, documents; float64 [packs, 4]."""
    documents = np.diff(plan.packs.offsets)
    columns = [np.ones(len(documents)), plan.packs.sums(plan.loss_tokens), plan.pack_sum_sq, documents]
    return np.stack(columns, axis=1).astype(np.float64)


@dataclass(frozen=True)
class EpochTime:
    """Predicted seconds of each iteration of a plan: slowest and mean data-parallel rank, [iterations]; of all steps.

    steps: what the optimizer steps take beside their iterations.
    """

    slowest: FloatArray
    mean: FloatArray
    steps: float

    @property
    def seconds(self) -> float:
        """The whole epoch."""
        return float(self.slowest.sum()) + self.steps

    @property
    def idle(self) -> float:
        """Share of the iterations' rank time that is spent waiting for the slowest rank."""
        return 1.0 - float(self.mean.sum() / self.slowest.sum())


def predict_epoch(plan: Plan, times: Sequence[LevelTimeModel], step_seconds: float = 0.0) -> EpochTime:
    """Predict an epoch; times: one a level, step_seconds: clipping, optimizer and bookkeeping of one step."""
    assert len(times) == len(plan.levels)
    loads, levels = pack_loads(plan), plan.pack_levels
    seconds = np.zeros(len(loads))
    for k, level_time in enumerate(times):
        seconds[levels == k] = level_time.seconds(loads[levels == k])
    starts = plan.pack_offsets[:-1]
    counts = np.diff(plan.pack_offsets)
    return EpochTime(
        slowest=np.maximum.reduceat(seconds, starts),
        mean=np.add.reduceat(seconds, starts) / counts,
        steps=step_seconds * plan.num_steps,
    )


DRIFT_THRESHOLD = 0.2
"""How far time, waiting or a rank's speed may be from the plan's model before a warning."""


@dataclass(frozen=True)
class LevelCheck:
    """One level since the last report.

    ratio: measured / modelled seconds of its iterations, the median. waiting: share of the ranks' time spent waiting
    for the slowest of the iteration, as measured; planned: by the model.
    """

    iterations: int
    ratio: float
    waiting: float
    planned: float


@dataclass(frozen=True)
class Report:
    """levels: by index, those that ran. slowest: (rank, its work per modelled work / that of the median rank). work:
    seconds of work of each rank."""

    levels: dict[int, LevelCheck]
    slowest: tuple[int, float]
    work: tuple[float, ...]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For metrics.jsonl; names: one a level."""
        checks = {names[k]: vars(check) for k, check in self.levels.items()}
        rank, ratio = self.slowest
        return {"levels": checks, "slowest_rank": rank, "slowest_ratio": ratio, "work_by_rank": list(self.work)}

    def line(self, names: Sequence[str]) -> str:
        """For the console."""
        parts = [
            f"{names[k]} {check.ratio:.2f}x the modelled time, waiting {check.waiting:.1%} (plan {check.planned:.1%})"
            for k, check in self.levels.items()
        ]
        rank, ratio = self.slowest
        return f"live check  {'; '.join(parts)}; slowest rank {rank}, {ratio:.2f}x the median's time for its work"

    def warnings(self, names: Sequence[str]) -> list[str]:
        """One line for each thing that parts from the model by more than DRIFT_THRESHOLD, with what to do about it."""
        lines = []
        for k, check in self.levels.items():
            if abs(check.ratio - 1) > DRIFT_THRESHOLD:
                lines.append(
                    f"level {names[k]} takes {check.ratio:.2f}x its modelled time: the levels were chosen for another "
                    "speed; look for other work on the machine, or choose anew with scripts/select_levels.py"
                )
            if check.waiting - check.planned > DRIFT_THRESHOLD:
                lines.append(
                    f"level {names[k]}: ranks wait {check.waiting:.0%} of the time, the plan has {check.planned:.0%}: "
                    'the cost model does not fit this machine; measure it ([packing] levels = "auto")'
                )
        rank, ratio = self.slowest
        if ratio > 1 + DRIFT_THRESHOLD:
            lines.append(
                f"rank {rank} needs {ratio:.2f}x the median rank's time for its work and holds up the others: check "
                "its node for other work, heat or a lower clock"
            )
        return [f"warning: {line}" for line in lines]


class TimingMonitor:
    """`iteration` goes around each forward and backward, `report` after each optimizer step.

    times: measured, one a level; None takes the plan's cost models, which know no unit: the first report of each level
    then sets it, and later ones tell drift. interval: steps between reports; 0 measures nothing.
    """

    def __init__(self, model: Decoder, world: World, times: Sequence[LevelTimeModel] | None, interval: int) -> None:
        self.world = world
        self.times = times
        self.interval = interval
        self.clock = ComputeTimer(model, world.device)
        self._units: dict[int, float] = {}
        self._indices: list[int] = []
        self._seconds: list[tuple[float, float]] = []

    @contextmanager
    def iteration(self, index: int) -> Iterator[None]:
        """Measure iteration `index` of the plan."""
        if not self.interval:
            yield
            return
        with self.clock.iteration():
            yield
        self._indices.append(index)

    def pop(self) -> list[tuple[float, float]]:
        """(wall, work) in seconds of this rank's iterations since the last call; none where interval is 0.

        On a GPU it waits for the last of them to end.
        """
        seconds = self.clock.read() if self.interval else []
        self._seconds += seconds
        return seconds

    def report(self, plan: Plan, steps_done: int) -> Report | None:
        """What the iterations since the last report showed, after every interval and at the end of the epoch.

        steps_done: optimizer steps of `plan` so far. A collective: every rank calls it after each step and its `take`.
        """
        if not self.interval or (steps_done % self.interval and steps_done < plan.num_steps):
            return None
        mine = torch.tensor(self._seconds, dtype=torch.float64, device=self.world.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(gathered, mine)
        wall_RI, work_RI = torch.stack(gathered).cpu().numpy().transpose(2, 0, 1)
        indices = np.array(self._indices)
        self._indices, self._seconds = [], []
        model_RI = self._modelled(plan, indices)
        levels = plan.level_of_iteration[indices]
        for k in np.unique(levels).tolist():
            if self.times is None and k not in self._units:
                of = levels == k
                self._units[k] = float(np.median(wall_RI[:, of].max(0) / model_RI[:, of].max(0)))
        units = np.array([self._units.get(k, 1.0) for k in levels.tolist()])
        return compare(levels, wall_RI, work_RI, model_RI * units)

    def _modelled(self, plan: Plan, indices: np.ndarray) -> FloatArray:
        """Modelled time of each rank in each iteration, [ranks, iterations]; cp ranks are adjacent."""
        loads = pack_loads(plan)
        columns = []
        for index in indices.tolist():
            of = slice(*plan.pack_offsets[index : index + 2])
            k = int(plan.level_of_iteration[index])
            level = plan.levels[k]
            if self.times is None:
                # Padding is computed like tokens.
                tokens = np.full(of.stop - of.start, level.max_tokens)
                seconds = plan.costs[k].cost(tokens, plan.pack_sum_sq[of])
            else:
                seconds = self.times[k].seconds(loads[of])
            columns.append(np.repeat(seconds, level.cp_degree))
        return np.stack(columns, axis=1)


def compare(levels: np.ndarray, wall_RI: FloatArray, work_RI: FloatArray, model_RI: FloatArray) -> Report:
    """The report of iterations I on ranks R; levels: of each iteration, [I]; all seconds [R, I]."""
    checks = {}
    paces = np.ones_like(work_RI)
    for k in np.unique(levels).tolist():
        of = levels == k
        wall, work, model = wall_RI[:, of], work_RI[:, of], model_RI[:, of]
        checks[k] = LevelCheck(
            iterations=int(of.sum()),
            ratio=float(np.median(wall.max(0) / model.max(0))),
            waiting=1 - float(work.mean(0).sum() / work.max(0).sum()),
            planned=1 - float(model.mean(0).sum() / model.max(0).sum()),
        )
        # Work has a unit of its own: what counts is a rank's beside the others'.
        paces[:, of] = work / model / np.median(work / model)
    pace_R = (paces * model_RI).sum(1) / model_RI.sum(1)
    slowest = int(pace_R.argmax())
    return Report(checks, (slowest, float(pace_R[slowest] / np.median(pace_R))), tuple(work_RI.sum(1).tolist()))
