"""Run: everything that a report takes from a run folder, and what of it is missing.

Owns which files of a run folder are read. Files that are missing or damaged leave their part out, with a sentence in
`missing`; a folder without any trace of a run is a user's mistake.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from hbp_titan.packing.level import level_name
from hbp_titan.packing.metrics import Metrics, measure
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.plan_file import load_plan
from hbp_titan.report.step_log import StepLog, read_steps, share_colors

_PLAN = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.safetensors")
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunPlan:
    """A plan of the run: of a whole epoch, or of what was left of it. first_step: of the run, None where unknown."""

    epoch: int
    first_step: int | None
    plan: Plan
    metrics: Metrics

    @property
    def name(self) -> str:
        """Epoch 0, or epoch 0 from step 21."""
        return f"epoch {self.epoch}" + (f" from step {self.first_step}" if self.is_remainder else "")

    @property
    def level_names(self) -> list[str]:
        """The levels as metrics.jsonl names them: 8K/cp2."""
        return [*map(level_name, self.plan.levels)]

    @property
    def is_remainder(self) -> bool:
        """Whether it plans only what was left of its epoch."""
        return len(self.plan.packs.ids) + len(self.plan.skipped) < self.plan.num_samples


@dataclass
class Run:
    """A run folder. starts: those of run.json, oldest first, or what the consumed record tells of them.

    checkpoints: steps of the ones that are there. exported: hf/ is there. written: when metrics.jsonl last was.
    missing: a sentence each for what could not be read.
    """

    folder: Path
    name: str
    log: StepLog
    starts: list[dict[str, Any]] = field(default_factory=list)
    plans: list[RunPlan] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    exported: bool = False
    written: datetime | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def last_start(self) -> dict[str, Any]:
        """The newest start, empty where none is known."""
        return self.starts[-1] if self.starts else {}

    @property
    def resumes(self) -> list[int]:
        """Steps that a later start began with."""
        return [first for start in self.starts[1:] if isinstance(first := start.get("first_step"), int)]

    def setting(self, *keys: str) -> Any:
        """A value of the newest start's configuration, None where there is none."""
        value: Any = self.last_start.get("config")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, with names that tell them apart; ValueError for a folder that is no run."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} is given twice: name each run folder once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in paths]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    share_colors([run.log for run in runs])
    return runs


def read_run(folder: Path, name: str) -> Run:
    """What the folder holds; ValueError where that is no run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the run folder, [job] dump_folder of the run")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() and not (folder / "run.json").exists():
        raise ValueError(
            f"{folder} is no run folder: it has neither metrics.jsonl nor run.json; name the [job] dump_folder of a run"
        )
    run = Run(folder, name, read_steps(metrics))
    run.exported = (folder / "hf").is_dir()
    if not metrics.exists():
        run.missing.append("metrics.jsonl is not there yet: no step has been trained.")
    elif not len(run.log):
        run.missing.append("metrics.jsonl has no step yet.")
    else:
        run.written = datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc)
    if run.log.cut:
        run.missing.append(
            "The last line of metrics.jsonl is half written and left out: the run goes on or was killed."
        )
    if run.log.unreadable:
        run.missing.append(f"{run.log.unreadable:,} lines of metrics.jsonl are not steps and are left out.")
    _read_starts(run)
    _read_plans(run)
    found = (folder / "checkpoint").glob("step-*") if (folder / "checkpoint").is_dir() else ()
    run.checkpoints = sorted(int(match[1]) for path in found if (match := _CHECKPOINT.fullmatch(path.name)))
    return run


def _read_starts(run: Run) -> None:
    path = run.folder / "run.json"
    if path.exists():
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
            run.starts = [start for start in starts if isinstance(start, dict)]
        except (ValueError, KeyError, TypeError):
            run.missing.append("run.json is damaged: what the run is, its versions and starts are not known.")
    else:
        run.missing.append("run.json is not there: what the run is, its versions and starts are not known.")
    if run.starts:
        return
    for attempt in sorted((run.folder / "consumed").glob("attempt-*/attempt.json")):
        try:
            values = json.loads(attempt.read_text(encoding="utf-8"))
            run.starts.append({key: int(values[key]) for key in ("first_step", "world_size")})
        except (ValueError, KeyError, TypeError):
            continue  # a start that the page then does not know of, as it says above


def _read_plans(run: Run) -> None:
    """The plans in training order; the first step of an epoch's plan is the first step that metrics.jsonl has of it."""
    epochs = run.log.column("epoch")
    paths = sorted((run.folder / "plan").glob("epoch-*.safetensors"))
    for path in paths:
        match = _PLAN.fullmatch(path.name)
        if not match:
            continue
        epoch = int(match[1])
        of_epoch = run.log.steps[epochs == epoch]
        first = int(match[2]) if match[2] else int(of_epoch[0]) if len(of_epoch) else None
        try:
            plan = load_plan(path)
        except (ValueError, OSError):
            run.missing.append(f"plan/{path.name} is damaged: its metrics are left out.")
            continue
        if plan.num_iterations:
            # Where an iteration has no token at all, ratios of it are NaN.
            with np.errstate(invalid="ignore"):
                run.plans.append(RunPlan(epoch, first, plan, measure(plan)))
    run.plans.sort(key=lambda part: (part.epoch, part.first_step or 0))
    if not run.plans and not any("plan/" in sentence for sentence in run.missing):
        run.missing.append("plan/ holds no plan: the planned metrics are left out.")
