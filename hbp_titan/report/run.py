"""Everything that a report reads from a run folder: `Run`, and metrics.jsonl as columns in `StepLog`.

Owns which files are read. A missing or damaged file is skipped with a sentence in `Run.missing`; a folder without any
file of a run is a user error. No key of metrics.jsonl is assumed to exist: runs of other versions lack keys, killed
ones end in half a line, and a value of the wrong type counts as missing.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.level import level_name
from hbp_titan.packing.metrics import Metrics, measure
from hbp_titan.packing.plan import Plan, load_plan
from hbp_titan.report.methods import Compared, with_baselines

_LEVEL = re.compile(r"(\d{1,12})(K?)/cp(\d{1,9})")

Floats = NDArray[np.float64]
Key = tuple[str, ...]
Columns = dict[Key, tuple["array[int]", "array[float]"]]
"""(lines, values) of each key, filled while a file is read."""


@dataclass
class ExpertTables:
    """Tokens of each expert by layer: of evenly spaced steps, at most MAX_TABLES, and of the newest step that has them.

    layers: names of the layers with experts. kept: (step, float32 [L, E]), ascending; newest: the same of one step.
    """

    MAX_TABLES = 96

    layers: list[str] = field(default_factory=list)
    kept: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    newest: tuple[int, NDArray[np.float32]] | None = None
    _stride: int = 1
    _skip: int = 0

    @property
    def all(self) -> list[tuple[int, NDArray[np.float32]]]:
        """The kept tables and the newest one."""
        extra = [] if self.newest is None or (self.kept and self.kept[-1][0] == self.newest[0]) else [self.newest]
        return [*self.kept, *extra]

    def add(self, step: int, value: object) -> None:
        """Add what a line has at tokens_per_expert; what is not a table of the same layers and experts is ignored."""
        if not isinstance(value, dict) or not value:
            return
        rows = list(value.values())
        if not all(isinstance(row, list) and len(row) == len(rows[0]) and all(map(_is_number, row)) for row in rows):
            return
        table = np.array(rows, np.float32).reshape(len(rows), -1)
        # A corrupt file may have any numbers.
        if table.size == 0 or table.min() < 0 or not np.all((table.sum(1) > 0) & np.isfinite(table.sum(1))):
            return
        if self.newest and (list(value) != self.layers or table.shape != self.newest[1].shape):
            return
        self.layers, self.newest = list(value), (step, table)
        # A resumed run returns to an earlier step.
        self.kept = [(old, kept) for old, kept in self.kept if old < step]
        if self._skip:
            self._skip -= 1
            return
        self.kept.append(self.newest)
        if len(self.kept) > self.MAX_TABLES:
            self.kept, self._stride = self.kept[::2], 2 * self._stride
        self._skip = self._stride - 1


@dataclass
class StepLog:
    """The steps of a run in ascending order; of a step that occurs twice the last line counts.

    steps: int64 [n]. level_names: level of each step, "1K/cp1+8K/cp2" if it mixes levels. skipped: reason by step.
    work_by_rank: (step, seconds of each rank) of the timing checks. experts: tokens of each expert by layer.
    unreadable: number of lines that are not JSON objects with a step. cut: whether the last line is incomplete.
    palette: level names in the order of their colors [the log's own levels]. columns: (rows, values) of every key that
    has a number or null (NaN) in some step.
    """

    steps: NDArray[np.int64]
    level_names: list[str] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    work_by_rank: list[tuple[int, list[float]]] = field(default_factory=list)
    experts: ExpertTables = field(default_factory=ExpertTables)
    unreadable: int = 0
    cut: bool = False
    palette: list[str] = field(default_factory=list)
    columns: dict[Key, tuple[NDArray[np.int64], Floats]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, *key: str) -> Floats:
        """Return the values of a key, or of a key in nested objects, float64 [n]; NaN in steps without it."""
        values = np.full(len(self), np.nan)
        if key in self.columns:
            rows, found = self.columns[key]
            values[rows] = found
        return values

    def present(self, *key: str) -> NDArray[np.bool_]:
        """Return which steps have the key or any key nested in it, also as null, bool [n]."""
        found = np.zeros(len(self), bool)
        for name, (rows, _) in self.columns.items():
            if name[: len(key)] == key:
                found[rows] = True
        return found

    def names(self, *key: str) -> list[str]:
        """Return the names in an object in order of first appearance, as in names("sources")."""
        depth = len(key)
        return list(dict.fromkeys(name[depth] for name in self.columns if len(name) > depth and name[:depth] == key))

    def has(self, *key: str) -> bool:
        """Return whether any step has a number at the key."""
        return key in self.columns and bool(np.isfinite(self.columns[key][1]).any())

    @cached_property
    def levels(self) -> list[str]:
        """Return the names of the trained levels, shortest first."""
        return sorted(self.names("loss_by_level"), key=_level_key)

    def color(self, level: str) -> int:
        """Return the color of a level or a combination of levels, the same in every plot."""
        known = self.palette or self.levels
        if level in known:
            return known.index(level)
        # Combinations of levels come after the levels, so that adding one changes no level's color.
        others = sorted({*self.level_names, level} - set(known))
        return len(known) + others.index(level)


def share_colors(logs: Sequence[StepLog]) -> None:
    """Give a level the same color in all of these logs."""
    palette = sorted({level for log in logs for level in log.levels}, key=_level_key)
    for log in logs:
        log.palette = palette


def _level_key(level: str) -> tuple[int, int, str]:
    """Return the sort key of a level name: 1K/cp1 before 8K/cp1 before 8K/cp2, other names last."""
    match = _LEVEL.fullmatch(level)
    if not match:
        return (1 << 60, 0, level)
    return (int(match[1]) * (1024 if match[2] else 1), int(match[3]), level)


def read_steps(path: Path) -> StepLog:
    """Return the log in metrics.jsonl at `path`, without steps if there is no such file."""
    log = StepLog(np.zeros(0, np.int64))
    # By key, not by line: dicts of 100,000 steps would take gigabytes.
    columns: Columns = {}
    steps: list[int] = []
    names: list[str] = []
    if not path.exists():
        return log
    # As bytes: the last line of a killed run may end within a character.
    with path.open("rb") as file:
        for raw in file:
            values = _parse(raw)
            if values is None:
                log.cut = not raw.endswith(b"\n")
                log.unreadable += not log.cut
                continue
            _read_events(log, values)
            _add(columns, len(steps), values)
            steps.append(values["step"])
            names.append(str(values.get("level_name") or ""))
    # A run that resumed from an earlier checkpoint repeats steps.
    last_line = {step: line for line, step in enumerate(steps)}
    log.steps = np.array(sorted(last_line), np.int64)
    log.level_names = [names[last_line[step]] for step in log.steps.tolist()]
    # -1 drops lines whose step was repeated later.
    row_of = np.full(len(steps), -1, np.int64)
    row_of[[last_line[step] for step in log.steps.tolist()]] = np.arange(len(log))
    for key, (lines, found) in columns.items():
        rows = row_of[np.array(lines)]
        log.columns[key] = (rows[rows >= 0], np.array(found)[rows >= 0])
    # Through a dict: of a repeated step the last check counts.
    log.work_by_rank = sorted(dict(log.work_by_rank).items())
    return log


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(raw)
    # RecursionError: a corrupt line may be thousands of brackets.
    except (ValueError, RecursionError):
        return None
    # type(), not isinstance(): true is an int.
    is_step = isinstance(values, dict) and type(values.get("step")) is int and 0 <= values["step"] < 1 << 62
    return values if is_step else None


def _read_events(log: StepLog, values: dict[str, Any]) -> None:
    """Move from a line into the log what does not belong in a column."""
    step = values["step"]
    reason = values.pop("skipped", None)
    # A repeated step may have been skipped the first time only.
    log.skipped.pop(step, None)
    if reason:
        log.skipped[step] = str(reason)
    check = values.get("timing_check")
    work = check.get("work_by_rank") if isinstance(check, dict) else None
    if isinstance(work, list) and work and all(_is_number(value) for value in work):
        log.work_by_rank.append((step, [float(value) for value in work]))
    log.experts.add(step, values.pop("tokens_per_expert", None))


def _add(columns: Columns, line: int, values: dict[str, Any], above: Key = ()) -> None:
    """Add every number of an object, and of the objects in it, to the columns; null becomes NaN."""
    for name, value in values.items():
        kind = type(value)
        if kind is dict:
            # Deeper than any key that the trainer writes: bounds the work on a corrupt file.
            if len(above) < 4:
                _add(columns, line, value, (*above, name))
            continue
        if kind is float or kind is int:
            # Infinity and NaN, which json accepts, and numbers whose sums overflow; the negation catches NaN.
            if not abs(value) < 1e300:
                continue
        elif value is None:
            value = math.nan
        else:
            continue
        key = (*above, name)
        column = columns.get(key)
        if column is None:
            column = columns[key] = (array("q"), array("d"))
        column[0].append(line)
        column[1].append(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


_PLAN = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.safetensors")
_CHECKPOINT = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunPlan:
    """A plan of a whole epoch or of its remainder. first_step: step of the run, None if unknown."""

    epoch: int
    first_step: int | None
    plan: Plan
    metrics: Metrics

    @property
    def name(self) -> str:
        """Return "epoch 0", or "epoch 0 from step 21"."""
        return f"epoch {self.epoch}" + (f" from step {self.first_step}" if self.is_remainder else "")

    @property
    def level_names(self) -> list[str]:
        """Return the names of the levels as in metrics.jsonl: 8K/cp2."""
        return [*map(level_name, self.plan.levels)]

    @property
    def is_remainder(self) -> bool:
        """Return whether the plan covers only the remainder of its epoch."""
        return len(self.plan.packs.ids) + len(self.plan.skipped) < self.plan.num_samples


@dataclass
class Run:
    """A run folder. starts: those of run.json, oldest first, or those of the sample log.

    checkpoints: their steps. exported: whether hf/ exists. written: modification time of metrics.jsonl. missing: one
    sentence per file or part that could not be read.
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
    _compared: list[Compared] = field(default_factory=list, repr=False)

    @property
    def last_start(self) -> dict[str, Any]:
        """Return the newest start, empty if none is known."""
        return self.starts[-1] if self.starts else {}

    def compared(self) -> list[Compared]:
        """Return the first plan and the baselines' plans of the same samples, empty if the run has no plan."""
        if not self._compared and self.plans:
            self._compared = with_baselines(self.plans[0].plan)
        return self._compared

    def setting(self, *keys: str) -> Any:
        """Return a value of the newest start's configuration, None if there is none."""
        value: Any = self.last_start.get("config")
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders, with unique names; ValueError for a folder that is not a run."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} is given twice; pass each run folder once")
    depth = 1
    # As many parent folders as make the names unique.
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in paths]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    share_colors([run.log for run in runs])
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Return the run in the folder; ValueError if it is not one."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory; pass the job.dump_folder of the run")
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() and not (folder / "run.json").exists():
        raise ValueError(
            f"{folder} is not a run folder: no metrics.jsonl and no run.json; pass the job.dump_folder of a run"
        )
    run = Run(folder, name, read_steps(metrics))
    run.exported = (folder / "hf").is_dir()
    if not metrics.exists():
        run.missing.append("metrics.jsonl does not exist yet: no step has been trained.")
    elif not len(run.log):
        run.missing.append("metrics.jsonl has no step yet.")
    else:
        # Shows whether a run that has no export is still going.
        run.written = datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc)
    if run.log.cut:
        run.missing.append(
            "The last line of metrics.jsonl is incomplete and ignored: the run is in progress or was killed."
        )
    if run.log.unreadable:
        run.missing.append(f"{run.log.unreadable:,} lines of metrics.jsonl are not steps and are ignored.")
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
            run.missing.append("run.json is corrupt: settings, versions and starts of the run are not known.")
    else:
        run.missing.append("run.json does not exist: settings, versions and starts of the run are not known.")
    # Without run.json the sample log still has the first step and the ranks of each start.
    if run.starts:
        return
    for start in sorted((run.folder / "sample_log").glob("start-*/start.json")):
        try:
            values = json.loads(start.read_text(encoding="utf-8"))
            run.starts.append({key: int(values[key]) for key in ("first_step", "world_size")})
        except (ValueError, KeyError, TypeError):
            continue  # unreadable, like run.json, which is noted above


def _read_plans(run: Run) -> None:
    """Read the plans in training order; an epoch's plan begins at the first step of it in metrics.jsonl."""
    epochs = run.log.column("epoch")
    paths = sorted((run.folder / "plan").glob("epoch-*.safetensors"))
    for path in paths:
        match = _PLAN.fullmatch(path.name)
        if not match:
            continue
        epoch = int(match[1])
        of_epoch = run.log.steps[epochs == epoch]
        # A remainder has its step in its name; a whole epoch begins with its first recorded step.
        first = int(match[2]) if match[2] else int(of_epoch[0]) if len(of_epoch) else None
        try:
            plan = load_plan(path)
        # A plan that is being written, or was when the run was killed.
        except (ValueError, OSError):
            run.missing.append(f"plan/{path.name} is corrupt: no planned metrics of it.")
            continue
        if plan.num_iterations:
            # Ratios of a micro-batch without tokens are NaN.
            with np.errstate(invalid="ignore"):
                run.plans.append(RunPlan(epoch, first, plan, measure(plan)))
    run.plans.sort(key=lambda part: (part.epoch, part.first_step or 0))
    if not run.plans and not any("plan/" in sentence for sentence in run.missing):
        run.missing.append("plan/ contains no plan: no planned metrics.")
