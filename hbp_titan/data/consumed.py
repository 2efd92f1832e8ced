"""The consumed record: which samples each optimizer step really trained, written as it happens.

Owns the files of `consumed/` in a run folder, their writing by the ranks and their reading. Each start of a run is an
attempt:

    attempt-0001/attempt.json     first_step, epoch, parts (of that epoch: data/epoch_parts.py), world_size, data (the
                                  store's fingerprint), store (its folder)
    attempt-0001/rank-0.jsonl     a line for every optimizer step, in order; of each pack its first cp rank keeps record
        {"step": 7, "epoch": 0, "iterations": [{"iteration": 12, "level": 1, "dp_rank": 0, "samples": [4, 17]}]}

A step that was skipped (training.on_nonfinite) has "skipped": "nonfinite" in its line: its samples were not trained.
Steps count from 1 over the whole run, iterations from 0 in each part of an epoch. A step counts as the latest attempt
recorded it: an attempt that resumes after step 10 has first_step 11, and what an earlier one did from step 11 on was
lost with it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from hbp_titan.data.batch import PackedBatch
from hbp_titan.packing import Level

FOLDER = "consumed"
NONFINITE = "nonfinite"
_ATTEMPT = re.compile(r"attempt-\d{4,}")
_RANK = re.compile(r"rank-(\d+)\.jsonl")


class ConsumedRecord:
    """A rank's side of the record: batches are added as they are trained and written when their step is done.

    broadcast: returns rank 0's value on every rank (`world.broadcast_value`).
    """

    def __init__(self, run_folder: Path, rank: int, levels: Sequence[Level], broadcast: Callable[[int], int]) -> None:
        self.folder = run_folder / FOLDER
        self.rank = rank
        self.levels = tuple(levels)
        self.broadcast = broadcast
        self._trained: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def start(self, first_step: int, epoch: int, parts: list[dict[str, Any]], data: str, store: Path) -> None:
        """Begin a new attempt; every rank calls it.

        parts: of `epoch`, as from `describe_parts`. data: the store's fingerprint, store: its folder.
        """
        number = 0
        if self.rank == 0:
            earlier = attempt_folders(self.folder)
            number = 1 + (_number(earlier[-1]) if earlier else 0)
            values = {
                "first_step": first_step,
                "epoch": epoch,
                "parts": parts,
                "world_size": dist.get_world_size(),
                "data": data,
                "store": str(store.resolve()),
            }
            partial = self.folder / "attempt.partial"
            partial.mkdir(parents=True, exist_ok=True)
            with (partial / "attempt.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.folder / f"attempt-{number:04}")
        path = self.folder / f"attempt-{self.broadcast(number):04}" / f"rank-{self.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def add(self, iteration: int, batch: PackedBatch) -> None:
        """Note that `batch` was trained in `iteration` of the plan; kept until `commit`."""
        dp_rank, cp_rank = divmod(self.rank, self.levels[batch.level].cp_degree)
        if cp_rank == 0:
            ids = batch.sample_ids.tolist()
            pack = {"iteration": iteration, "level": batch.level, "dp_rank": dp_rank, "samples": ids}
            self._trained.append(pack)

    def commit(self, step: int, epoch: int, skipped: bool = False) -> None:
        """Write what was added as optimizer step `step`, which is done; a killed process loses no written step.

        skipped: it was not applied, for want of a finite loss and gradient.
        """
        assert self._file is not None, "start comes first"
        reason = {"skipped": NONFINITE} if skipped else {}
        line = json.dumps({"step": step, "epoch": epoch, **reason, "iterations": self._trained})
        self._file.write(line + "\n")
        self._file.flush()
        self._trained = []

    def sync(self) -> None:
        """Put the record on disk: before a checkpoint, so that not even a lost node makes it fall behind."""
        assert self._file is not None, "start comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Attempt:
    """One start of a run. last_step: up to it the attempt counts; what it did later was lost or is not known done.

    epoch, parts: those that it started in; parts as from `describe_parts`, the last is what it trained first.
    """

    folder: Path
    first_step: int
    last_step: int
    epoch: int
    parts: list[dict[str, Any]]
    world_size: int
    data: str
    store: Path


@dataclass(frozen=True)
class StepLine:
    """One rank's line of one optimizer step. iterations: as in the file; where: file:line.

    skipped: whether the step was not applied.
    """

    step: int
    epoch: int
    rank: int
    iterations: list[dict[str, Any]]
    where: str
    skipped: bool = False


def attempt_folders(folder: Path) -> list[Path]:
    """The attempts in `folder` (the run's `consumed`), in order."""
    return sorted((path for path in folder.glob("attempt-*") if _ATTEMPT.fullmatch(path.name)), key=_number)


def _number(attempt: Path) -> int:
    return int(attempt.name.removeprefix("attempt-"))


def read_attempts(run_folder: Path, steps_done: int) -> list[Attempt]:
    """The attempts of a run that is known to have done `steps_done` steps; ValueError where there is no record."""
    folders = attempt_folders(run_folder / FOLDER)
    if not folders:
        raise ValueError(f"{run_folder / FOLDER}: no consumed record here")
    attempts: list[Attempt] = []
    last_step = steps_done
    for folder in reversed(folders):
        path = folder / "attempt.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            first, epoch, world_size = (int(values[key]) for key in ("first_step", "epoch", "world_size"))
            parts = [{"first_step": int(part["first_step"]), "plan": str(part["plan"])} for part in values["parts"]]
            attempts.append(
                Attempt(folder, first, last_step, epoch, parts, world_size, values["data"], Path(values["store"]))
            )
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not an attempt of a consumed record: move it away") from None
        last_step = min(last_step, first - 1)
    return attempts[::-1]


def read_record(attempts: Sequence[Attempt]) -> tuple[list[StepLine], list[str]]:
    """The lines that count, and what is wrong with the files, a line each."""
    lines: list[StepLine] = []
    faults: list[str] = []
    first = min(attempt.first_step for attempt in attempts)
    if first > 1:
        faults.append(f"{attempts[0].folder.parent}: no attempt recorded steps 1 to {first - 1}")
    for attempt in attempts:
        if attempt.first_step > attempt.last_step:
            continue
        ranks = {int(match[1]) for path in attempt.folder.iterdir() if (match := _RANK.fullmatch(path.name))}
        for rank in sorted(ranks - set(range(attempt.world_size))):
            faults.append(f"{attempt.folder}/rank-{rank}.jsonl: the attempt had {attempt.world_size} ranks")
        for rank in range(attempt.world_size):
            if rank not in ranks:
                faults.append(f"{attempt.folder}/rank-{rank}.jsonl is missing")
                continue
            lines += _read_rank(attempt, rank, attempt is attempts[-1], faults)
    return lines, faults


def _read_rank(attempt: Attempt, rank: int, is_last: bool, faults: list[str]) -> Iterator[StepLine]:
    """The lines of one file that count. They must be consecutive; only what a kill leaves behind is forgiven."""
    path = attempt.folder / f"rank-{rank}.jsonl"
    expected = attempt.first_step
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = _parse(raw, rank, where)
            if line is None:
                # A kill cuts the last line, of a step that was not done or was done again later.
                cut = not raw.endswith(b"\n") and expected > attempt.last_step
                if not cut:
                    faults.append(f"{where}: not a line of a consumed record, where step {expected} is expected")
                expected += 1
                continue
            if line.step != expected:
                faults.append(f"{where}: step {line.step} where step {expected} is expected")
            elif is_last and line.step > attempt.last_step + 1:
                # One step may be recorded and not yet known as done; ranks cannot be further apart.
                faults.append(f"{where}: step {line.step}, but the run has done {attempt.last_step} steps")
            if attempt.first_step <= line.step <= attempt.last_step:
                yield line
            expected = line.step + 1
    if expected <= attempt.last_step:
        faults.append(f"{path}: ends before step {expected}, but steps up to {attempt.last_step} were trained")


def _parse(raw: bytes, rank: int, where: str) -> StepLine | None:
    """The line, None where it is none."""
    if not raw.endswith(b"\n"):
        return None
    try:
        values = json.loads(raw)
        skipped = values.get("skipped")
        if skipped not in (None, NONFINITE):
            return None
        line = StepLine(values["step"], values["epoch"], rank, values["iterations"], where, skipped == NONFINITE)
        numbers = [line.step, line.epoch]
        for pack in line.iterations:
            numbers += [pack["iteration"], pack["level"], pack["dp_rank"], *pack["samples"]]
    except (ValueError, KeyError, TypeError):
        return None
    return line if all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) else None
