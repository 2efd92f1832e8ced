"""The audit on made-up runs: a right record passes, and every kind of wrong one is named with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data.epoch import PlanSegment, plan_path
from hbp_titan.data.sample_log import audit_run, check_epoch, read_attempts, shown
from hbp_titan.data.store_summary import check_totals
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.packing.plan import save_plan

LEVELS = (Level(16, 1), Level(64, 2))
LENGTHS = np.array([3, 60, 7, 16, 9, 33, 2, 5, 11, 40, 8, 4])
RANKS = 2


class Store:
    """Sample i is line i + 1 of data.jsonl."""

    fingerprint = "f" * 64

    def __len__(self) -> int:
        return len(LENGTHS)

    def where(self, index: int) -> str:
        return f"data.jsonl:{index + 1}"


def make_plan(epoch: int) -> Plan:
    return build_plan(LENGTHS, LEVELS, RANKS, epoch=epoch, global_batch_tokens=64)


def planned_line(plan: Plan, step: int, rank: int, first_step: int) -> dict[str, Any]:
    """What `rank` records of `step`, written out independently of the trainer's writer."""
    iterations = []
    for i in range(int(plan.step_offsets[step - first_step]), int(plan.step_offsets[step - first_step + 1])):
        level = int(plan.level_of_iteration[i])
        dp_rank, cp_rank = divmod(rank, plan.levels[level].cp_degree)
        if cp_rank == 0:
            samples = plan.iteration(i).packs[dp_rank].tolist()
            iterations.append({"iteration": i, "level": level, "dp_rank": dp_rank, "samples": samples})
    return {"step": step, "epoch": plan.epoch, "iterations": iterations}


class Run:
    """A run folder with the plans of two epochs and what ranks record of their steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plans = [make_plan(0), make_plan(1)]
        self.epoch_steps = self.plans[0].num_steps
        assert self.epoch_steps >= 3
        for plan in self.plans:
            save_plan(plan, plan_path(folder, plan.epoch), inputs={"data": Store.fingerprint})

    def lines(self, first: int, last: int, rank: int) -> list[dict[str, Any]]:
        found = []
        for step in range(first, last + 1):
            epoch = (step - 1) // self.epoch_steps
            found.append(planned_line(self.plans[epoch], step, rank, 1 + epoch * self.epoch_steps))
        return found

    def attempt(self, number: int, first: int, last: int) -> None:
        folder = self.folder / "consumed" / f"attempt-{number:04}"
        folder.mkdir(parents=True)
        epoch = (first - 1) // self.epoch_steps
        parts = [{"first_step": 1 + epoch * self.epoch_steps, "plan": self.plans[epoch].fingerprint}]
        values = {"first_step": first, "epoch": epoch, "parts": parts, "world_size": RANKS}
        values |= {"data": Store.fingerprint, "store": "store"}
        (folder / "attempt.json").write_text(json.dumps(values))
        for rank in range(RANKS):
            lines = self.lines(first, last, rank)
            (folder / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def change(self, attempt: int, rank: int, change: Callable[[list[str]], list[str]]) -> None:
        """Rewrite a rank's lines."""
        path = self.folder / "consumed" / f"attempt-{attempt:04}" / f"rank-{rank}.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    def audit(self, steps_done: int) -> list[str]:
        """All faults, without the folder's name."""
        attempts = read_attempts(self.folder, steps_done)
        audits, faults = audit_run(self.folder, steps_done, attempts, Store())
        faults += [fault for found in audits for fault in found.faults]
        return [fault.replace(f"{self.folder}/consumed/", "") for fault in faults]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_whole_epoch_passes_with_its_totals(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps)
    assert run.audit(run.epoch_steps) == []
    line = check_epoch(run.folder, [PlanSegment(1, run.plans[0])], Store())
    assert line == "epoch 0: 12 samples, each trained once"
    attempts = read_attempts(run.folder, run.epoch_steps)
    (found,), _ = audit_run(run.folder, run.epoch_steps, attempts, Store())
    assert (found.samples, found.tokens, found.finished) == (12, 198, True)


def test_an_epoch_in_progress_passes_up_to_the_last_step_done(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps + 2)
    assert run.audit(run.epoch_steps + 2) == []
    assert run.audit(run.epoch_steps + 1) == []  # the last one is in flight, on one rank or on both
    run.change(1, 1, lambda lines: lines[:-1])
    assert run.audit(run.epoch_steps + 1) == []


def test_the_latest_attempt_that_trained_a_step_counts(run: Run) -> None:
    last = 2 * run.epoch_steps
    run.attempt(1, 1, 3)
    run.attempt(2, 3, run.epoch_steps + 1)
    run.attempt(3, 3, 3)  # killed again before a checkpoint
    run.attempt(4, 3, last)
    # Of the second attempt nothing counts any more, of the first two steps.
    run.change(2, 0, lambda lines: ['{"step": 3, "epoch": 0, "iterations": []}\n', *lines[1:]])
    assert run.audit(last) == []
    run.change(1, 0, lambda lines: [lines[0], '{"step": 2, "epoch": 0, "iterations": []}\n', *lines[2:]])
    assert "no record of" in run.audit(last)[0]


def _cut(line: str) -> str:
    return line[: len(line) // 2]


def test_a_line_cut_by_a_kill_is_forgiven_where_its_step_was_trained_again_or_not_done(run: Run) -> None:
    run.attempt(1, 1, 3)
    run.change(1, 1, lambda lines: [*lines[:2], _cut(lines[2])])
    assert run.audit(2) == []  # in flight when the run was killed
    run.attempt(2, 3, run.epoch_steps)
    assert run.audit(run.epoch_steps) == []  # trained again


def test_a_cut_line_of_a_step_that_counts_is_named(run: Run) -> None:
    run.attempt(1, 1, 3)
    run.attempt(2, 3, run.epoch_steps)
    run.change(1, 1, lambda lines: [lines[0], _cut(lines[1])])
    assert run.audit(run.epoch_steps)[0] == (
        "attempt-0001/rank-1.jsonl:2: not a line of a consumed record, where step 2 is expected"
    )
    run.change(1, 1, lambda lines: ["\n", *lines])
    assert run.audit(run.epoch_steps)[0].startswith("attempt-0001/rank-1.jsonl:1: not a line of")


def test_a_missing_line_is_named_with_its_step_and_its_samples(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps)
    lost = [i for pack in run.lines(2, 2, 0)[0]["iterations"] for i in pack["samples"]]
    run.change(1, 0, lambda lines: [lines[0], *lines[2:]])
    first, *others = run.audit(run.epoch_steps)
    assert first == "attempt-0001/rank-0.jsonl:2: step 3 where step 2 is expected"
    assert any("(step 2): no record of 1 of" in fault for fault in others)
    assert f"epoch 0: {len(lost)} samples were not trained: data.jsonl:" in others[-1]
    with pytest.raises(RuntimeError, match=r"epoch 0 was not trained as planned: .*rank-0.jsonl:2: step 3"):
        check_epoch(run.folder, [PlanSegment(1, run.plans[0])], Store())


def test_a_missing_last_line_is_named(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps)
    run.change(1, 1, lambda lines: lines[:-1])
    last = run.epoch_steps
    assert run.audit(last)[0] == (
        f"attempt-0001/rank-1.jsonl: ends before step {last}, but steps up to {last} were trained"
    )


@pytest.mark.parametrize("number", [0, -1])
def test_a_doubled_line_is_named_with_the_samples_that_it_doubles(run: Run, number: int) -> None:
    run.attempt(1, 1, run.epoch_steps)
    at = range(run.epoch_steps)[number]
    step = at + 1
    doubled = [i for pack in run.lines(step, step, 0)[0]["iterations"] for i in pack["samples"]]
    run.change(1, 0, lambda lines: [*lines[: at + 1], lines[at], *lines[at + 1 :]])
    faults = run.audit(run.epoch_steps)
    assert faults[0] == f"attempt-0001/rank-0.jsonl:{step + 1}: step {step} where step {step + 1} is expected"
    assert "was trained before" in faults[1]
    assert f"{len(doubled)} samples were trained more than once: data.jsonl:{min(doubled) + 1} " in faults[-1]


def _swap_a_sample(value: dict[str, Any]) -> None:
    value["iterations"][0]["samples"][0] = 99


def _wrong_level(value: dict[str, Any]) -> None:
    value["iterations"][0]["level"] ^= 1


def _wrong_epoch(value: dict[str, Any]) -> None:
    value["epoch"] = 1


def _other_step(value: dict[str, Any]) -> None:
    value["iterations"][0]["iteration"] += 50


def _other_rank(value: dict[str, Any]) -> None:
    value["iterations"][0]["dp_rank"] += 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_swap_a_sample, r"not the plan's samples: \d+ are lacking, 99 are not planned"),
        (_swap_a_sample, r"samples 99 are none of the store's 12"),
        (_wrong_level, r"level \d where the plan has level \d"),
        (_wrong_epoch, r"epoch 1 where step 1 is of epoch 0"),
        (_other_step, r"the plan's step 1 has iterations 0 to"),
        (_other_rank, r"recorded by rank 0, which is not the first of"),
    ],
)
def test_a_pack_that_is_not_the_plans_is_named(run: Run, spoil: Callable[[Any], None], message: str) -> None:
    run.attempt(1, 1, run.epoch_steps)

    def change(lines: list[str]) -> list[str]:
        value = json.loads(lines[0])
        spoil(value)
        return [json.dumps(value) + "\n", *lines[1:]]

    run.change(1, 0, change)
    assert any(re.search(message, fault) for fault in run.audit(run.epoch_steps))


def test_skipped_steps_are_told_apart_and_ranks_must_agree(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps)
    skipped = [i for rank in range(RANKS) for pack in run.lines(2, 2, rank)[0]["iterations"] for i in pack["samples"]]

    def skip(lines: list[str], reason: str = "nonfinite") -> list[str]:
        return [lines[0], json.dumps({**json.loads(lines[1]), "skipped": reason}) + "\n", *lines[2:]]

    run.change(1, 0, skip)
    assert run.audit(run.epoch_steps) == [
        "attempt-0001/rank-1.jsonl:2: step 2 is trained here but skipped at attempt-0001/rank-0.jsonl:2"
    ]
    run.change(1, 1, skip)
    assert run.audit(run.epoch_steps) == []
    (found,), _ = audit_run(run.folder, run.epoch_steps, read_attempts(run.folder, run.epoch_steps), Store())
    assert (found.samples, found.skipped) == (12 - len(skipped), len(skipped))
    assert found.tokens == 198 - int(LENGTHS[skipped].sum())
    line = check_epoch(run.folder, [PlanSegment(1, run.plans[0])], Store())
    assert (
        line == f"epoch 0: {12 - len(skipped)} samples, each trained once; {len(skipped)} of skipped steps, not trained"
    )
    run.change(1, 1, lambda lines: skip(lines, "other"))
    assert "rank-1.jsonl:2: not a line of a consumed record" in run.audit(run.epoch_steps)[0]


def test_lost_files_attempts_and_foreign_data_are_named(run: Run) -> None:
    run.attempt(1, 1, 2)
    run.attempt(2, 2, run.epoch_steps)
    (run.folder / "consumed/attempt-0002/rank-1.jsonl").rename(run.folder / "consumed/attempt-0002/rank-5.jsonl")
    faults = run.audit(run.epoch_steps)
    assert "attempt-0002/rank-5.jsonl: the attempt had 2 ranks" in faults
    assert "attempt-0002/rank-1.jsonl is missing" in faults
    (run.folder / "consumed/attempt-0001").rename(run.folder / "consumed/lost")
    assert run.audit(run.epoch_steps)[0].endswith("no attempt recorded steps 1 to 1")
    values = json.loads((run.folder / "consumed/attempt-0002/attempt.json").read_text())
    (run.folder / "consumed/attempt-0002/attempt.json").write_text(json.dumps({**values, "data": "0" * 64}))
    assert any("trained the data 0000000000000000, not ffffffffffffffff" in f for f in run.audit(run.epoch_steps))


def test_lines_beyond_the_step_in_flight_are_named(run: Run) -> None:
    run.attempt(1, 1, run.epoch_steps)
    assert run.audit(run.epoch_steps - 1) == []
    assert run.audit(run.epoch_steps - 2)[0] == (
        f"attempt-0001/rank-0.jsonl:{run.epoch_steps}: step {run.epoch_steps}, but the run has done "
        f"{run.epoch_steps - 2} steps"
    )


def test_a_folder_without_record_or_plan_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="no consumed record here"):
        run.audit(1)
    run.attempt(1, 1, 1)
    with pytest.raises(ValueError, match="nothing to audit: the run has done 0 steps"):
        run.audit(0)
    save_plan(run.plans[0], plan_path(run.folder, 0), inputs={"data": "other"})
    with pytest.raises(ValueError, match="the plan was made from other inputs: data"):
        run.audit(1)


def test_totals_that_do_not_add_up_are_reported() -> None:
    totals = {"rows": 9, "whole": 5, "truncated": 1, "split": 1, "excluded: empty": 2, "not_chosen": 0}
    totals |= {
        "samples_made": 8,
        "duplicate": 1,
        "not drawn": 0,
        "held out": 0,
        "not held out": 0,
        "trained": 7,
        "copies": 7,
        "samples": 14,
    }
    lines, faults = check_totals(totals, 14)
    assert lines[0] == "accounting: 9 rows = 5 whole + 1 truncated + 1 split + 2 excluded: empty"
    assert lines[2] == "accounting: 14 samples = 7 trained + 7 copies"
    assert faults == []
    assert check_totals({**totals, "whole": 4}, 13)[1] == [
        "accounting: 9 rows != 4 whole + 1 truncated + 1 split + 2 excluded: empty",
        "accounting: 14 samples, but the store has 13",
    ]


def test_ten_faults_are_shown_and_the_others_counted() -> None:
    assert shown([str(i) for i in range(12)]) == [*map(str, range(10)), "... and 2 more"]
    assert len(shown([""] * 10)) == 10
