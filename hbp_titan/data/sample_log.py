"""The sample log: which samples each optimizer step trained, written as it happens, and its audit against the plans.

Owns `sample_log/` in a run folder. Every start of the run writes a folder of its own:

    start-0001/start.json     first_step, epoch, segments (of that epoch: data/epoch.py), world_size, data (the store's
                              fingerprint), store (its folder)
    start-0001/rank-0.jsonl   one line per optimizer step, in order; each pack is logged by its first cp rank
        {"step": 7, "epoch": 0, "micro_batches": [{"micro_batch": 12, "level": 1, "dp_rank": 0, "samples": [4, 17]}]}

A skipped step (training.on_nonfinite) has "skipped": "nonfinite": its samples were not trained. Steps count from 1 over
the whole run, micro-batches from 0 in each plan. A step counts as the latest start logged it: if a run resumes after
step 10, its first_step is 11, and steps of earlier starts from 11 on are void.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.epoch import PlanSegment, load_segments, planned_samples
from hbp_titan.data.token_store import TokenStore
from hbp_titan.packing import Level
from hbp_titan.utils import first_n

SAMPLE_LOG = "sample_log"
NONFINITE = "nonfinite"
# Samples and packs that one line of the audit names; the others are counted.
MAX_LISTED = 3
MAX_PROBLEMS_SHOWN = 10
_START = re.compile(r"start-\d{4,}")
_RANK = re.compile(r"rank-(\d+)\.jsonl")


class SampleLog:
    """Writer of one rank: batches are added as they are trained, and written when their step is done.

    broadcast: returns rank 0's value on every rank (`world.broadcast_value`).
    """

    def __init__(self, run_folder: Path, rank: int, levels: Sequence[Level], broadcast: Callable[[int], int]) -> None:
        self.folder = run_folder / SAMPLE_LOG
        self.rank = rank
        self.levels = tuple(levels)
        self.broadcast = broadcast
        self._trained: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def start(self, first_step: int, epoch: int, segments: list[dict[str, Any]], data: str, store: Path) -> None:
        """Create the folder of this start; every rank must call it.

        segments: of `epoch`, as from `describe_segments`. data: the store's fingerprint; store: its folder.
        """
        number = 0
        if self.rank == 0:
            earlier = start_folders(self.folder)
            number = 1 + (_number(earlier[-1]) if earlier else 0)
            values = {
                "first_step": first_step,
                "epoch": epoch,
                "segments": segments,
                "world_size": dist.get_world_size(),
                "data": data,
                "store": str(store.resolve()),
            }
            # Renamed when complete: a folder without start.json would make the whole log unreadable.
            partial = self.folder / "start.partial"
            partial.mkdir(parents=True, exist_ok=True)
            with (partial / "start.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.folder / f"start-{number:04}")
        path = self.folder / f"start-{self.broadcast(number):04}" / f"rank-{self.rank}.jsonl"
        # A node without the shared file system has no such folder yet.
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def add(self, micro_batch: int, batch: PackedBatch) -> None:
        """Note that `batch` was trained in `micro_batch` of the plan; kept in memory until `commit`."""
        dp_rank, cp_rank = divmod(self.rank, self.levels[batch.level].cp_degree)
        # The ranks of a cp group hold shards of the same pack: one record is enough.
        if cp_rank == 0:
            samples = batch.sample_ids.tolist()
            pack = {"micro_batch": micro_batch, "level": batch.level, "dp_rank": dp_rank, "samples": samples}
            self._trained.append(pack)

    def commit(self, step: int, epoch: int, skipped: bool = False) -> None:
        """Write the added batches as optimizer step `step`, which is done.

        skipped: the step was not applied, because its loss or gradient was not finite.
        """
        assert self._file is not None, "start comes first"
        reason = {"skipped": NONFINITE} if skipped else {}
        line = json.dumps({"step": step, "epoch": epoch, **reason, "micro_batches": self._trained})
        self._file.write(line + "\n")
        # Flushed per step: a killed process loses no step that it has trained.
        self._file.flush()
        self._trained = []

    def sync(self) -> None:
        """Force the log to disk: called before a checkpoint, which must never be ahead of the log."""
        assert self._file is not None, "start comes first"
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class RunStart:
    """One start of a run. last_step: up to it, its steps count; later ones were lost or are not known to be done.

    epoch, segments: those in which it started; segments as from `describe_segments`, it trained the last one first.
    """

    folder: Path
    first_step: int
    last_step: int
    epoch: int
    segments: list[dict[str, Any]]
    world_size: int
    data: str
    store: Path

    @property
    def counts(self) -> bool:
        """Whether any of its steps count."""
        return self.first_step <= self.last_step


@dataclass(frozen=True)
class StepRecord:
    """One rank's line of one optimizer step. micro_batches: as in the file; where: file:line."""

    step: int
    epoch: int
    rank: int
    micro_batches: list[dict[str, Any]]
    where: str
    skipped: bool = False

    @property
    def verb(self) -> str:
        """What happened to its samples."""
        return "skipped" if self.skipped else "trained"


def start_folders(folder: Path) -> list[Path]:
    """Return the folders of the starts in `folder` (the run's `sample_log`), in order."""
    return sorted((path for path in folder.glob("start-*") if _START.fullmatch(path.name)), key=_number)


def _number(start: Path) -> int:
    return int(start.name.removeprefix("start-"))


def read_starts(run_folder: Path, steps_done: int) -> list[RunStart]:
    """Return the starts of a run that is known to have done `steps_done` steps; ValueError if there is no log."""
    folders = start_folders(run_folder / SAMPLE_LOG)
    if not folders:
        raise ValueError(f"{run_folder / SAMPLE_LOG}: no sample log here; pass the folder of a run that has trained")
    starts: list[RunStart] = []
    last_step = steps_done
    for folder in reversed(folders):
        path = folder / "start.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            first, epoch, world_size = (int(values[key]) for key in ("first_step", "epoch", "world_size"))
            segments = [{"first_step": int(s["first_step"]), "plan": str(s["plan"])} for s in values["segments"]]
            store = Path(values["store"])
            starts.append(RunStart(folder, first, last_step, epoch, segments, world_size, values["data"], store))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged; move it away") from None
        # Steps from the first one of a later start on were trained again.
        last_step = min(last_step, first - 1)
    return starts[::-1]


def read_log(starts: Sequence[RunStart], resumes: bool = False) -> tuple[list[StepRecord], list[str]]:
    """Return the records that count, and one line per problem of the files.

    resumes: whether the run is about to train the steps after the last start's `last_step` again.
    """
    records: list[StepRecord] = []
    problems: list[str] = []
    first = min(start.first_step for start in starts)
    if first > 1:
        problems.append(f"{starts[0].folder.parent}: no start logged steps 1 to {first - 1}")
    for start in starts:
        if not start.counts:
            continue
        ranks = {int(match[1]) for path in start.folder.iterdir() if (match := _RANK.fullmatch(path.name))}
        for rank in sorted(ranks - set(range(start.world_size))):
            problems.append(f"{start.folder}/rank-{rank}.jsonl: unexpected, this start had {start.world_size} ranks")
        for rank in range(start.world_size):
            if rank in ranks:
                records += _read_rank(start, rank, not resumes and start is starts[-1], problems)
            else:
                problems.append(f"{start.folder}/rank-{rank}.jsonl: missing")
    return records, problems


def _read_rank(start: RunStart, rank: int, is_newest: bool, problems: list[str]) -> Iterator[StepRecord]:
    """Yield the records of one file that count. They must be consecutive, except for what a kill leaves behind.

    is_newest: whether no start trains its later steps again, so that there must be none.
    """
    path = start.folder / f"rank-{rank}.jsonl"
    expected = start.first_step
    # As bytes: a node that died may leave half a character, which must not stop the reading.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            record = _parse(raw, rank, where)
            if record is None:
                # A kill cuts the last line, of a step that was not done or was done again later.
                cut = not raw.endswith(b"\n") and expected > start.last_step
                if not cut:
                    problems.append(f"{where}: not a line of a sample log, expected step {expected}")
                expected += 1
                continue
            if record.step != expected:
                problems.append(f"{where}: step {record.step}, expected step {expected}")
            elif is_newest and record.step > start.last_step + 1:
                # One step may be logged and not yet known to be done; ranks cannot be further apart.
                problems.append(f"{where}: step {record.step}, but the run has done {start.last_step} steps")
            if start.first_step <= record.step <= start.last_step:
                yield record
            expected = record.step + 1
    if expected <= start.last_step:
        problems.append(f"{path}: ends before step {expected}, but steps up to {start.last_step} were trained")


def _parse(raw: bytes, rank: int, where: str) -> StepRecord | None:
    """Return the record of a line, None if it is not one."""
    if not raw.endswith(b"\n"):
        return None
    try:
        values = json.loads(raw)
        skipped = values.get("skipped")
        if skipped not in (None, NONFINITE):
            return None
        record = StepRecord(values["step"], values["epoch"], rank, values["micro_batches"], where, skipped is not None)
        numbers = [record.step, record.epoch]
        for pack in record.micro_batches:
            numbers += [pack["micro_batch"], pack["level"], pack["dp_rank"], *pack["samples"]]
    except (ValueError, KeyError, TypeError):
        return None
    # Not isinstance, which accepts true for 1; larger numbers would overflow the arrays of the audit.
    return record if all(type(number) is int and 0 <= number < 1 << 63 for number in numbers) else None


@dataclass(frozen=True)
class EpochAudit:
    """What was found of one epoch; without problems, each sample was trained exactly once and as planned.

    steps_done: of the epoch's num_steps. samples, tokens, trained_tokens: trained. skipped: samples of skipped steps.
    """

    epoch: int
    steps_done: int
    num_steps: int
    micro_batches: int
    samples: int
    skipped: int
    tokens: int
    trained_tokens: int
    problems: list[str]

    @property
    def finished(self) -> bool:
        """Whether the whole epoch was trained."""
        return self.steps_done == self.num_steps


@dataclass
class _Found:
    """The logged samples of an epoch, one array [n] per pack, and one line per problem."""

    problems: list[str] = field(default_factory=list)
    trained: list[NDArray[np.int64]] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    skipped: list[NDArray[np.int64]] = field(default_factory=lambda: [np.zeros(0, np.int64)])


def check_epoch(run_folder: Path, segments: Sequence[PlanSegment], store: TokenStore) -> str:
    """Return a line about a finished epoch; raises RuntimeError if the log differs from the plans."""
    plan, last_step = segments[-1].plan, segments[-1].end - 1
    starts = read_starts(run_folder, last_step)
    # A run killed in the next epoch may resume from the checkpoint of this one's last step.
    records, problems = read_log(starts, resumes=True)
    found = audit_epoch(records, segments, last_step, store)
    problems += check_data(starts, store) + found.problems
    if problems:
        shown = first_n(problems, MAX_PROBLEMS_SHOWN, "; ")
        raise RuntimeError(f"epoch {plan.epoch} was not trained as planned: {shown}")
    plans = f" by {len(segments)} plans" if len(segments) > 1 else ""
    skipped = f"; {found.skipped:,} of skipped steps, not trained" if found.skipped else ""
    return f"epoch {plan.epoch}: {found.samples:,} samples, each trained once{plans}{skipped}"


def audit_run(
    run_folder: Path,
    steps_done: int,
    starts: Sequence[RunStart],
    store: TokenStore,
    only: int | None = None,
    running: bool = False,
) -> tuple[list[EpochAudit], list[str]]:
    """Audit every epoch that the run has reached in `steps_done` steps, or epoch `only`.

    running: whether it may be about to train the steps after `steps_done` again. Also returns one line per problem of
    the log itself. Raises ValueError if a plan file is missing, damaged or of other data, and if the epoch was not
    reached.
    """
    records, problems = read_log(starts, resumes=running)
    problems += check_data(starts, store)
    audits = []
    epoch, first_step = 0, 1
    while first_step <= steps_done and (only is None or epoch <= only):
        segments = _segments_of(run_folder, starts, epoch, first_step, store)
        if segments[0].first_step != first_step:
            problems.append(f"epoch {epoch} starts at step {first_step}, its first plan at {segments[0].first_step}")
        if only in (None, epoch):
            audits.append(audit_epoch(records, segments, steps_done, store))
        first_step = segments[-1].end
        epoch += 1
    if not audits:
        raise ValueError(
            f"{run_folder}: nothing to audit: the run has done {steps_done} steps, up to epoch {epoch - 1}"
        )
    return audits, problems


def _segments_of(
    run_folder: Path, starts: Sequence[RunStart], epoch: int, first_step: int, store: TokenStore
) -> list[PlanSegment]:
    """Load the segments of an epoch: those of the last start within it, or the plan of all its samples."""
    # The last start within an epoch knows all of its segments so far; earlier ones know fewer.
    started = [start.segments for start in starts if start.epoch == epoch and start.counts]
    described = started[-1] if started else [{"first_step": first_step}]
    return load_segments(run_folder, epoch, described, store.fingerprint)


def check_data(starts: Sequence[RunStart], store: TokenStore) -> list[str]:
    """Return one line per start that counts and trained other data than `store`."""
    return [
        f"{start.folder}: trained the data {start.data[:16]}, but this store is {store.fingerprint[:16]}"
        for start in starts
        if start.counts and start.data != store.fingerprint
    ]


def audit_epoch(
    records: Sequence[StepRecord], segments: Sequence[PlanSegment], steps_done: int, store: TokenStore
) -> EpochAudit:
    """Compare the log with the plans of an epoch's segments. steps_done: the last step that the run has done."""
    plan, end = segments[-1].plan, min(steps_done + 1, segments[-1].end)
    ends = [*(segment.first_step for segment in segments[1:]), end]
    found = _Found()
    found.problems += _check_segments(segments, store)
    micro_batches = 0
    for segment, segment_end in zip(segments, ends, strict=True):
        last = segment.finished_micro_batches(segment_end - 1)
        own = [record for record in records if segment.first_step <= record.step < min(segment_end, segment.end)]
        _audit_segment(segment, last, own, found)
        micro_batches += last
    trained, skipped = np.concatenate(found.trained), np.concatenate(found.skipped)
    found.problems += _count_samples(np.concatenate([trained, skipped]), segments, steps_done, store)
    # Unknown samples are problems already; their lengths do not exist.
    known = trained[trained < plan.num_samples]
    sums = int(plan.lengths[known].sum()), int(plan.loss_tokens[known].sum())
    done, num_steps = end - segments[0].first_step, segments[-1].end - segments[0].first_step
    return EpochAudit(plan.epoch, done, num_steps, micro_batches, len(trained), len(skipped), *sums, found.problems)


def _check_segments(segments: Sequence[PlanSegment], store: TokenStore) -> Iterator[str]:
    """Check that every segment but the first plans exactly what the earlier ones left."""
    epoch = segments[-1].plan.epoch
    for segment, after in itertools.pairwise(segments):
        if not segment.first_step < after.first_step < segment.end:
            yield (
                f"epoch {epoch}: its plan from step {after.first_step} follows a plan of steps {segment.first_step} to "
                f"{segment.end - 1}"
            )
    if len(segments) > 1:
        planned = np.bincount(planned_samples(segments), minlength=len(store))
        for what, wrong in (("not planned", planned == 0), ("planned more than once", planned > 1)):
            ids = np.flatnonzero(wrong)
            if len(ids):
                yield f"epoch {epoch}: {len(ids):,} samples are {what}: {_rows(ids, store)}"


def _audit_segment(segment: PlanSegment, last: int, records: Sequence[StepRecord], found: _Found) -> None:
    """Compare the records of one segment's steps with its plan up to micro-batch `last`."""
    packs: dict[tuple[int, int], str] = {}
    first_of_step: dict[int, StepRecord] = {}
    for record in records:
        first = first_of_step.setdefault(record.step, record)
        if first.skipped != record.skipped:
            found.problems.append(
                f"{record.where}: step {record.step} is {record.verb} here but {first.verb} at {first.where}"
            )
        if record.epoch != segment.plan.epoch:
            found.problems.append(
                f"{record.where}: epoch {record.epoch}, but step {record.step} is of epoch {segment.plan.epoch}"
            )
        for pack in record.micro_batches:
            (found.skipped if record.skipped else found.trained).append(np.array(pack["samples"], np.int64))
            problem = _check_pack(segment, record, pack)
            key = (pack["micro_batch"], record.rank)
            if problem is None and key in packs:
                problem = f"was trained before, {packs[key]}"
            # The first record stays, so that a third one names it too.
            packs.setdefault(key, record.where)
            if problem is not None:
                found.problems.append(f"{record.where}: micro-batch {key[0]}, dp rank {pack['dp_rank']}: {problem}")
    found.problems += _missing_packs(segment, last, packs)


def _check_pack(segment: PlanSegment, record: StepRecord, pack: Mapping[str, Any]) -> str | None:
    """Return what is wrong with one logged pack, None if it is as planned."""
    plan, step = segment.plan, record.step - segment.first_step
    first, last = plan.step_offsets[step : step + 2].tolist()
    micro_batch, dp_rank = pack["micro_batch"], pack["dp_rank"]
    if not first <= micro_batch < last:
        return f"the plan's step {record.step} has micro-batches {first} to {last - 1}"
    at = plan.pack_at(micro_batch, record.rank)
    level = int(plan.pack_levels[at])
    if pack["level"] != level:
        return f"level {pack['level']}, but the plan has level {level}"
    cp_degree = plan.levels[level].cp_degree
    if record.rank != dp_rank * cp_degree:
        return f"logged by rank {record.rank}, which is not the first of the {cp_degree} ranks of that dp rank"
    planned = plan.samples_of_pack(at)
    # Without their order: a batch has its documents in descending length, a plan in the order of its method.
    if sorted(planned.tolist()) == sorted(pack["samples"]):
        return None
    missing = np.setdiff1d(planned, pack["samples"]).tolist()
    unplanned = np.setdiff1d(pack["samples"], planned).tolist()
    return f"not the plan's samples: missing {_first(missing)}; not planned {_first(unplanned)}"


def _missing_packs(segment: PlanSegment, last: int, packs: Mapping[tuple[int, int], str]) -> Iterator[str]:
    """Yield one line per micro-batch before `last` of which a pack was not logged. packs: (micro-batch, first rank)."""
    plan = segment.plan
    for micro_batch in range(last):
        ranks = (plan.rank_slots[slice(*plan.pack_offsets[micro_batch : micro_batch + 2])] % plan.world_size).tolist()
        missing = [rank for rank in ranks if (micro_batch, rank) not in packs]
        if missing:
            step = segment.first_step + int(plan.step_of_iteration[micro_batch])
            yield (
                f"epoch {plan.epoch}, micro-batch {micro_batch} (step {step}): {len(missing)} of {len(ranks)} packs "
                f"were not logged by their first rank: {_first(missing)}"
            )


def _count_samples(
    ids: NDArray[np.int64], segments: Sequence[PlanSegment], steps_done: int, store: TokenStore
) -> Iterator[str]:
    """Compare the logged samples with the expected ones: the whole store, or the plans' up to `steps_done`."""
    total, epoch = len(store), segments[-1].plan.epoch
    # bincount allocates up to the largest id; unknown ids are reported below.
    counts = np.bincount(ids[ids < total], minlength=total)
    expected = np.arange(total)
    if steps_done + 1 < segments[-1].end:
        expected = planned_samples(segments, steps_done)
    unknown = np.unique(ids[ids >= total]).tolist()
    missing = np.unique(expected[counts[expected] == 0])
    repeated = np.flatnonzero(counts > 1)
    if unknown:
        yield f"epoch {epoch}: samples {_first(unknown)} do not exist in the store of {total:,}"
    if len(missing):
        yield f"epoch {epoch}: {len(missing):,} samples were not trained: {_rows(missing, store)}"
    if len(repeated):
        yield f"epoch {epoch}: {len(repeated):,} samples were trained more than once: {_rows(repeated, store)}"


def _rows(ids: NDArray[np.int64], store: TokenStore) -> str:
    # Rows are looked up for the listed samples only: each opens a store's memory maps.
    listed = [f"{store.where(int(index))} (sample {index})" for index in ids[:MAX_LISTED]]
    return first_n([*listed, *ids[MAX_LISTED:]], MAX_LISTED)


def _first(values: Sequence[int]) -> str:
    return first_n(values, MAX_LISTED) or "none"
