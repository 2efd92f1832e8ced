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

The audit: was each sample of an epoch trained exactly once, and as planned?

Owns the comparison of the consumed record (data/consumed.py) with the plans of an epoch (data/epoch_parts.py) and with
the token store. What is wrong comes as one line each, with the file and line of the record, or of the data for a
sample.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.epoch import PlanSegment, load_segments, planned_samples
from hbp_titan.packing import Level

FOLDER = "consumed"
NONFINITE = "nonfinite"
_ATTEMPT = re.compile(r"attempt-\d{4,}")
_RANK = re.compile(r"rank-(\d+)\.jsonl")


class SampleLog:
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

        parts: of `epoch`, as from `describe_segments`. data: the store's fingerprint, store: its folder.
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

    epoch, parts: those that it started in; parts as from `describe_segments`, the last is what it trained first.
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


NAMED = 3
"""Samples and packs that one line names; the others are counted."""


class AuditedStore(Protocol):
    """What an audit needs of a token store."""

    fingerprint: str

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The row that a sample comes from, as file:line."""


@dataclass(frozen=True)
class EpochAudit:
    """What was found of one epoch; a right one has no faults. steps_done: of the epoch's num_steps.

    samples, tokens, trained_tokens: of what was trained. skipped: samples of steps that were not applied.
    """

    epoch: int
    steps_done: int
    num_steps: int
    iterations: int
    samples: int
    skipped: int
    tokens: int
    trained_tokens: int
    faults: list[str]

    @property
    def finished(self) -> bool:
        """Whether the whole epoch was trained."""
        return self.steps_done == self.num_steps


class _Found:
    """What the lines of an epoch say: the samples of each pack, [n], trained or skipped, and what is wrong."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.trained = [np.zeros(0, np.int64)]
        self.skipped = [np.zeros(0, np.int64)]


def audit_epoch(
    lines: Sequence[StepLine], parts: Sequence[PlanSegment], steps_done: int, store: AuditedStore
) -> EpochAudit:
    """Compare the record with the plans of an epoch's parts. steps_done: the last step of the run that was done."""
    plan, end = parts[-1].plan, min(steps_done + 1, parts[-1].end)
    ends = [*(part.first_step for part in parts[1:]), end]
    found = _Found()
    found.faults += _check_parts(parts, store)
    iterations = 0
    for part, part_end in zip(parts, ends, strict=True):
        mine = [line for line in lines if part.first_step <= line.step < min(part_end, part.end)]
        last = part.finished_iterations(part_end - 1)
        _audit_part(part, last, mine, found)
        iterations += last
    trained, skipped = np.concatenate(found.trained), np.concatenate(found.skipped)
    found.faults += _count_samples(np.concatenate([trained, skipped]), parts, steps_done, store)
    known = trained[trained < plan.num_samples]
    sums = int(plan.lengths[known].sum()), int(plan.loss_tokens[known].sum())
    done, num_steps = end - parts[0].first_step, parts[-1].end - parts[0].first_step
    return EpochAudit(plan.epoch, done, num_steps, iterations, len(trained), len(skipped), *sums, found.faults)


def _audit_part(part: PlanSegment, last: int, lines: Sequence[StepLine], found: _Found) -> None:
    """Compare the lines of one part's steps with its plan up to iteration `last`."""
    packs: dict[tuple[int, int], str] = {}
    first_of_step: dict[int, StepLine] = {}
    for line in lines:
        first = first_of_step.setdefault(line.step, line)
        if first.skipped != line.skipped:
            found.faults.append(
                f"{line.where}: step {line.step} is {_done(line)} here but {_done(first)} at {first.where}"
            )
        if line.epoch != part.plan.epoch:
            found.faults.append(
                f"{line.where}: epoch {line.epoch} where step {line.step} is of epoch {part.plan.epoch}"
            )
        for pack in line.iterations:
            (found.skipped if line.skipped else found.trained).append(np.array(pack["samples"], np.int64))
            fault = _check_pack(part, line, pack)
            key = (pack["iteration"], pack["dp_rank"])
            if fault is None and key in packs:
                fault = f"was trained before, {packs[key]}"
            packs.setdefault(key, line.where)
            if fault is not None:
                found.faults.append(f"{line.where}: iteration {key[0]}, dp rank {key[1]}: {fault}")
    found.faults += _missing_packs(part, last, packs)


def _done(line: StepLine) -> str:
    return "skipped" if line.skipped else "trained"


def _check_parts(parts: Sequence[PlanSegment], store: AuditedStore) -> Iterator[str]:
    """Whether every part but the first plans exactly what those before it left."""
    epoch = parts[-1].plan.epoch
    for part, after in itertools.pairwise(parts):
        if not part.first_step < after.first_step < part.end:
            yield (
                f"epoch {epoch}: its plan from step {after.first_step} on follows one of steps {part.first_step} to "
                f"{part.end - 1}"
            )
    if len(parts) > 1:
        planned = np.bincount(planned_samples(parts), minlength=len(store))
        for what, wrong in (("by none", planned == 0), ("more than once", planned > 1)):
            ids = np.flatnonzero(wrong)
            if len(ids):
                yield f"epoch {epoch}: {len(ids):,} samples are planned {what}: {_rows(ids, store)}"


def _check_pack(part: PlanSegment, line: StepLine, pack: Mapping[str, Any]) -> str | None:
    """What is wrong with one recorded pack of a step of `part`."""
    plan, step = part.plan, line.step - part.first_step
    first, last = plan.step_offsets[step : step + 2].tolist()
    iteration, dp_rank = pack["iteration"], pack["dp_rank"]
    if not first <= iteration < last:
        return f"the plan's step {line.step} has iterations {first} to {last - 1}"
    level = int(plan.level_of_iteration[iteration])
    if pack["level"] != level:
        return f"level {pack['level']} where the plan has level {level}"
    cp_degree = plan.levels[level].cp_degree
    if dp_rank >= plan.dp_degrees[level] or line.rank != dp_rank * cp_degree:
        return f"recorded by rank {line.rank}, which is not the first of {cp_degree} of that dp rank"
    planned = plan.pack(iteration, dp_rank)
    if planned.tolist() == pack["samples"]:
        return None
    lacking = np.setdiff1d(planned, pack["samples"]).tolist()
    foreign = np.setdiff1d(pack["samples"], planned).tolist()
    return f"not the plan's samples: {_named(lacking)} are lacking, {_named(foreign)} are not planned"


def _missing_packs(part: PlanSegment, last: int, packs: Mapping[tuple[int, int], str]) -> Iterator[str]:
    """Iterations of `part` before `last` that some dp rank did not record."""
    plan = part.plan
    for iteration in range(last):
        dp_ranks = range(plan.dp_degrees[plan.level_of_iteration[iteration]])
        lacking = [dp_rank for dp_rank in dp_ranks if (iteration, dp_rank) not in packs]
        if lacking:
            step = part.first_step + int(plan.step_of_iteration[iteration])
            yield (
                f"epoch {plan.epoch}, iteration {iteration} (step {step}): no record of {len(lacking)} of "
                f"{len(dp_ranks)} dp ranks: {_named(lacking)}"
            )


def _count_samples(
    ids: NDArray[np.int64], parts: Sequence[PlanSegment], steps_done: int, store: AuditedStore
) -> Iterator[str]:
    """What was consumed against what had to be: every sample of the store, or the plans' up to `steps_done`."""
    total, epoch = len(store), parts[-1].plan.epoch
    counts = np.bincount(ids[ids < total], minlength=total)
    wanted = np.arange(total)
    if steps_done + 1 < parts[-1].end:
        wanted = planned_samples(parts, steps_done)
    unknown = np.unique(ids[ids >= total]).tolist()
    missing = np.unique(wanted[counts[wanted] == 0])
    doubled = np.flatnonzero(counts > 1)
    if unknown:
        yield f"epoch {epoch}: samples {_named(unknown)} are none of the store's {total:,}"
    if len(missing):
        yield f"epoch {epoch}: {len(missing):,} samples were not trained: {_rows(missing, store)}"
    if len(doubled):
        yield f"epoch {epoch}: {len(doubled):,} samples were trained more than once: {_rows(doubled, store)}"


def _rows(chosen: NDArray[np.int64], store: AuditedStore) -> str:
    named = ", ".join(f"{store.where(int(index))} (sample {index})" for index in chosen[:NAMED])
    return named + (f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else "")


def _named(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:NAMED])) or "none"
    return shown + (f" and {len(values) - NAMED} more" if len(values) > NAMED else "")


def check_epoch(run_folder: Path, parts: Sequence[PlanSegment], store: AuditedStore) -> str:
    """A line that says how the epoch of these parts went, which is done; RuntimeError where the record differs."""
    plan, last_step = parts[-1].plan, parts[-1].end - 1
    attempts = read_attempts(run_folder, last_step)
    lines, faults = read_record(attempts)
    found = audit_epoch(lines, parts, last_step, store)
    faults += check_data(attempts, store) + found.faults
    if faults:
        raise RuntimeError(f"epoch {plan.epoch} was not trained as planned: " + "; ".join(shown(faults)))
    plans = f" by {len(parts)} plans" if len(parts) > 1 else ""
    skipped = f"; {found.skipped:,} of skipped steps, not trained" if found.skipped else ""
    return f"epoch {plan.epoch}: {found.samples:,} samples, each trained once{plans}{skipped}"


def audit_run(
    run_folder: Path, steps_done: int, attempts: Sequence[Attempt], store: AuditedStore, only: int | None = None
) -> tuple[list[EpochAudit], list[str]]:
    """Every epoch that the run has reached in `steps_done` steps, or epoch `only`; and what is wrong with the record.

    Raises ValueError where a plan file is missing, damaged or of other data, and where the epoch was not reached.
    """
    lines, faults = read_record(attempts)
    faults += check_data(attempts, store)
    audits = []
    epoch, first_step = 0, 1
    while first_step <= steps_done and (only is None or epoch <= only):
        parts = _parts_of(run_folder, attempts, epoch, first_step, store)
        if parts[0].first_step != first_step:
            faults.append(f"epoch {epoch} starts with step {first_step}, its first plan with {parts[0].first_step}")
        if only in (None, epoch):
            audits.append(audit_epoch(lines, parts, steps_done, store))
        first_step = parts[-1].end
        epoch += 1
    if not audits:
        raise ValueError(
            f"{run_folder}: nothing to audit: the run has done {steps_done} steps, up to epoch {epoch - 1}"
        )
    return audits, faults


def _parts_of(
    run_folder: Path, attempts: Sequence[Attempt], epoch: int, first_step: int, store: AuditedStore
) -> list[PlanSegment]:
    """The parts of an epoch: those that the last attempt which started in it named, or the plan of all its samples."""
    started = [a.parts for a in attempts if a.epoch == epoch and a.first_step <= a.last_step]
    described = started[-1] if started else [{"first_step": first_step}]
    return load_segments(run_folder, epoch, described, store.fingerprint)


def check_data(attempts: Sequence[Attempt], store: AuditedStore) -> list[str]:
    """Attempts that count and trained other data than `store`."""
    return [
        f"{attempt.folder}: trained the data {attempt.data[:16]}, not {store.fingerprint[:16]} of this store"
        for attempt in attempts
        if attempt.first_step <= attempt.last_step and attempt.data != store.fingerprint
    ]


def shown(faults: Sequence[str], limit: int = 10) -> list[str]:
    """The first `limit` faults and the number of the others."""
    more = [f"... and {len(faults) - limit:,} more"] if len(faults) > limit else []
    return [*faults[:limit], *more]
