"""The audit: was each sample of an epoch trained exactly once, and as planned?

Owns the comparison of the consumed record (data/consumed.py) with the plan and with the token store. What is wrong
comes as one line each, with the file and line of the record, or of the data for a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.consumed import Attempt, StepLine, read_attempts, read_record
from hbp_titan.packing import Plan
from hbp_titan.packing.plan_file import load_plan

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
    """What was found of one epoch; a right one has no faults. steps_done: of the epoch's num_steps."""

    epoch: int
    steps_done: int
    num_steps: int
    iterations: int
    samples: int
    tokens: int
    trained_tokens: int
    faults: list[str]

    @property
    def finished(self) -> bool:
        """Whether the whole epoch was trained."""
        return self.steps_done == self.num_steps


def audit_epoch(
    lines: Sequence[StepLine], plan: Plan, first_step: int, steps_done: int, store: AuditedStore
) -> EpochAudit:
    """Compare the record with `plan`, the epoch's. Steps count over the run: its first, and the last that was done."""
    done = min(steps_done - first_step + 1, plan.num_steps)
    faults: list[str] = []
    packs: dict[tuple[int, int], str] = {}
    consumed = [np.zeros(0, np.int64)]
    for line in lines:
        if not first_step <= line.step < first_step + done:
            continue
        if line.epoch != plan.epoch:
            faults.append(f"{line.where}: epoch {line.epoch} where step {line.step} is of epoch {plan.epoch}")
        for pack in line.iterations:
            consumed.append(np.array(pack["samples"], np.int64))
            fault = _check_pack(plan, line, line.step - first_step, pack)
            key = (pack["iteration"], pack["dp_rank"])
            if fault is None and key in packs:
                fault = f"was trained before, {packs[key]}"
            packs.setdefault(key, line.where)
            if fault is not None:
                faults.append(f"{line.where}: iteration {key[0]}, dp rank {key[1]}: {fault}")
    last = int(plan.step_offsets[done])
    faults += _missing_packs(plan, last, packs, first_step)
    ids = np.concatenate(consumed)
    faults += _count_samples(ids, plan, last, store)
    known = ids[ids < plan.num_samples]
    sums = int(plan.lengths[known].sum()), int(plan.loss_tokens[known].sum())
    return EpochAudit(plan.epoch, done, plan.num_steps, last, len(ids), *sums, faults)


def _check_pack(plan: Plan, line: StepLine, step: int, pack: Mapping[str, Any]) -> str | None:
    """What is wrong with one recorded pack of step `step` of the epoch."""
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


def _missing_packs(plan: Plan, last: int, packs: Mapping[tuple[int, int], str], first_step: int) -> Iterator[str]:
    """Iterations before `last` that some dp rank did not record."""
    for iteration in range(last):
        dp_ranks = range(plan.dp_degrees[plan.level_of_iteration[iteration]])
        lacking = [dp_rank for dp_rank in dp_ranks if (iteration, dp_rank) not in packs]
        if lacking:
            step = first_step + int(plan.step_of_iteration[iteration])
            yield (
                f"epoch {plan.epoch}, iteration {iteration} (step {step}): no record of {len(lacking)} of "
                f"{len(dp_ranks)} dp ranks: {_named(lacking)}"
            )


def _count_samples(ids: NDArray[np.int64], plan: Plan, last: int, store: AuditedStore) -> Iterator[str]:
    """What was consumed against what had to be: every sample of the store, or the plan's up to iteration `last`."""
    total = len(store)
    finished = last == plan.num_iterations
    wanted = np.arange(total) if finished else plan.samples_of(0, last)
    counts = np.bincount(ids[ids < total], minlength=total)

    def rows(chosen: NDArray[np.int64]) -> str:
        named = ", ".join(f"{store.where(int(index))} (sample {index})" for index in chosen[:NAMED])
        return named + (f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else "")

    unknown = np.unique(ids[ids >= total]).tolist()
    missing = np.unique(wanted[counts[wanted] == 0])
    doubled = np.flatnonzero(counts > 1)
    if unknown:
        yield f"epoch {plan.epoch}: samples {_named(unknown)} are none of the store's {total:,}"
    if len(missing):
        yield f"epoch {plan.epoch}: {len(missing):,} samples were not trained: {rows(missing)}"
    if len(doubled):
        yield f"epoch {plan.epoch}: {len(doubled):,} samples were trained more than once: {rows(doubled)}"


def _named(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:NAMED])) or "none"
    return shown + (f" and {len(values) - NAMED} more" if len(values) > NAMED else "")


def confirm_epoch(run_folder: Path, plan: Plan, last_step: int, store: AuditedStore) -> str:
    """A line that says how the epoch went which ended with step `last_step`; RuntimeError where the record differs."""
    attempts = read_attempts(run_folder, last_step)
    lines, faults = read_record(attempts)
    found = audit_epoch(lines, plan, last_step - plan.num_steps + 1, last_step, store)
    faults += check_data(attempts, store) + found.faults
    if faults:
        raise RuntimeError(f"epoch {plan.epoch} was not trained as planned: " + "; ".join(shown(faults)))
    return f"epoch {plan.epoch}: {found.samples:,} samples, each trained once"


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
        plan = load_plan(plan_path(run_folder, epoch), expect={"data": store.fingerprint})
        if only in (None, epoch):
            audits.append(audit_epoch(lines, plan, first_step, steps_done, store))
        first_step += plan.num_steps
        epoch += 1
    if not audits:
        raise ValueError(
            f"{run_folder}: nothing to audit: the run has done {steps_done} steps, up to epoch {epoch - 1}"
        )
    return audits, faults


def plan_path(run_folder: Path, epoch: int) -> Path:
    """Where a run keeps the plan of an epoch."""
    return run_folder / "plan" / f"epoch-{epoch}.safetensors"


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
