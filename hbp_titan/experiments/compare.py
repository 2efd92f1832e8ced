"""Comparison of packing methods by training the same samples with each, through the trainer itself.

Owns the measurements and the table of ratios. Each run starts from the same weights and trains one epoch; compilation
and validation are not counted. The order of the runs rotates from round to round, so that drift of the machine affects
all of them equally.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hbp_titan.components.timing import ComputeTimer, pack_loads
from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World, all_reduce_values
from hbp_titan.packing import METHODS, Level, Plan, parse_levels
from hbp_titan.packing.level import format_level
from hbp_titan.train import Trainer


@dataclass(frozen=True)
class Run:
    """A method on levels; methods of one length use only the last level."""

    method: str
    levels: tuple[Level, ...]

    def __str__(self) -> str:
        return f"{self.method}@{','.join(map(_short, self.levels))}"


def _short(level: Level) -> str:
    # The full short form for what has a place after ac_layers in it.
    plain = Level(level.max_tokens, level.cp_degree, level.cp_style, level.ac_policy, level.ac_layers)
    if level != plain:
        return format_level(level)
    fields = [str(level.max_tokens), str(level.cp_degree)]
    if level.cp_degree > 1 or level.ac_policy != "none":
        fields.append(level.cp_style)
    if level.ac_policy != "none":
        fields.append(level.ac_policy)
        if level.ac_layers is not None:
            fields.append(str(level.ac_layers))
    return ":".join(fields)


def parse_runs(text: str) -> tuple[Run, ...]:
    """Return the runs in "isf@8192:1;hbp@1024:1,8192:2": packing.METHODS on levels in their short form."""
    runs = []
    for part in text.split(";"):
        method, at, levels = part.strip().partition("@")
        if method not in METHODS or not at:
            raise ValueError(f"--runs {text!r}: {part!r} must be method@levels, with a method of {', '.join(METHODS)}")
        runs.append(Run(method, parse_levels(levels)))
    return tuple(runs)


@dataclass(frozen=True)
class Outcome:
    """One trained epoch.

    seconds: all optimizer steps, slowest rank. iteration_seconds [micro-batches]: forward and backward. loads
    [micro-batches, ranks, 4]: pack_loads of each rank's pack. level_of_iteration [micro-batches]. idle [ranks]: share
    of the time that a rank waits for the slowest one of a micro-batch. loss: per token of the validation samples after
    the epoch, None without any. train_loss: of the last tenth of the steps.
    """

    run: Run
    seconds: float
    steps: int
    tokens: int
    iteration_seconds: np.ndarray
    loads: np.ndarray
    level_of_iteration: np.ndarray
    idle: np.ndarray
    loss: float | None
    train_loss: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the levels of the run in addition to its name."""
        plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return {**plain, "run": str(self.run), "levels": [dataclasses.asdict(level) for level in self.run.levels]}


class TimedTrainer(Trainer):
    """A Trainer that prints nothing and keeps its measurements."""

    def __init__(self, config: JobConfig, world: World) -> None:
        super().__init__(config, world)
        # Several runs in one process would print their summaries into the table.
        self.is_log_rank = False
        self.log = _TimerLog(ComputeTimer(self.model, world.device))
        self.timing = self.log  # type: ignore[assignment]
        self.records: list[dict[str, Any]] = []

    def train_step(self, plan: Plan, step: int, batches: Iterator[Any]) -> Callable[[], dict[str, Any]]:
        record = super().train_step(plan, step, batches)
        # At once: the trainer itself computes a step's metrics during the next one.
        self.records.append(record())
        return record

    def _check_trained_samples(self, write: Callable[[str], None]) -> None:
        """Do nothing: each rank has its own folder, so no sample log covers all ranks."""


class _TimerLog:
    """Replacement of the TimingMonitor that times every micro-batch and reports nothing."""

    def __init__(self, timer: ComputeTimer) -> None:
        self.timer = timer
        self.seconds: list[tuple[float, float]] = []

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        with self.timer.micro_batch():
            yield

    def pop(self) -> list[tuple[float, float]]:
        """Return the new measurements and keep them."""
        seconds = self.timer.pop()
        self.seconds += seconds
        return seconds

    def report(self, plan: Plan, steps_done: int) -> None:
        return None


def train_once(config: JobConfig, world: World, run: Run) -> Outcome:
    """Train one epoch of `run`; a collective. config: everything except method and levels."""
    config = copy.deepcopy(config)
    config.packing.method, config.packing.auto_levels, config.levels = run.method, False, list(run.levels)
    config.training.epochs, config.training.steps = 1, 0
    # Their time would be part of the epoch.
    config.checkpoint.enable = config.checkpoint.export_hf = config.metrics.enable_tensorboard = False
    # Only at the last step.
    config.validation.interval, config.validation.at_start = 1 << 40, False
    config.metrics.report = False
    with tempfile.TemporaryDirectory() as folder:
        # A folder for each rank and run, so that none resumes another.
        config.job.dump_folder = str(Path(folder) / "run")
        trainer = TimedTrainer(config, world)
        trainer.train()
    plan = trainer.plans.plan_for(0)
    wall_IR, work_IR = _gather(trainer.log.seconds, world)
    records = trainer.records
    (seconds,) = all_reduce_values([sum(record["step_seconds"] for record in records)], "max", world.device)
    last = records[-max(len(records) // 10, 1) :]
    return Outcome(
        run=run,
        seconds=seconds,
        steps=len(records),
        tokens=sum(record["tokens"] for record in records),
        iteration_seconds=wall_IR.max(1),
        loads=loads_of_ranks(plan),
        level_of_iteration=plan.level_of_iteration,
        idle=1 - work_IR.sum(0) / work_IR.max(1).sum(),
        loss=trainer.validator.latest["loss"] if trainer.validator and trainer.validator.latest else None,
        train_loss=sum(r["loss"] * r["trained_tokens"] for r in last) / sum(r["trained_tokens"] for r in last),
    )


def loads_of_ranks(plan: Plan) -> np.ndarray:
    """Return pack_loads of each rank's pack, [micro-batches, ranks, 4]; ranks of a cp group are adjacent."""
    loads = pack_loads(plan)
    return np.repeat(loads, plan.pack_degrees, axis=0).reshape(plan.num_iterations, plan.world_size, 4)


def _gather(measured: Sequence[tuple[float, float]], world: World) -> np.ndarray:
    """Return (wall, work) seconds of every micro-batch and rank, [2, micro-batches, ranks]."""
    own = torch.tensor(measured, dtype=torch.float64, device=world.device)
    parts = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(parts, own)
    return torch.stack(parts, dim=1).cpu().numpy().transpose(2, 0, 1)


def compare(config: JobConfig, world: World, runs: Sequence[Run], repeats: int) -> Iterator[Outcome]:
    """Train every run `repeats` times, each round in a different order."""
    for number in range(repeats):
        # Another run is first in each round: the first one finds a cooler machine.
        first = number % len(runs)
        for run in (*runs[first:], *runs[:first]):
            yield train_once(config, world, run)


def table(outcomes: Sequence[Outcome], runs: Sequence[Run]) -> str:
    """Return one Markdown row per run: epoch time, ratio to the first run with its range, idle share, loss."""
    base = [o.seconds for o in outcomes if o.run == runs[0]]
    lines = [
        f"| run | epoch s | speed-up over {runs[0].method} (range) | tokens/s | micro-batches | steps | idle per "
        "rank | loss after | train loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        own = [o for o in outcomes if o.run == run]
        # Within a round: the load of the machine changes more between rounds.
        ratios = [a / o.seconds for a, o in zip(base, own, strict=True)]
        seconds = median(o.seconds for o in own)
        idle = np.median([o.idle for o in own], axis=0)
        loss = "-" if own[0].loss is None else f"{median(o.loss or 0.0 for o in own):.4f}"
        lines.append(
            f"| {run} | {seconds:.1f} | {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | "
            f"{own[0].tokens / seconds:,.0f} | {len(own[0].iteration_seconds)} | {own[0].steps} | "
            f"{' '.join(f'{share:.1%}' for share in idle)} | {loss} | {median(o.train_loss for o in own):.4f} |"
        )
    return "\n".join(lines)
