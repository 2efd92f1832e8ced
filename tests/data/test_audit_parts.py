"""The audit of an epoch in several parts: a right record passes, what is lost or doubled between plans is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hbp_titan.data.epoch import PlanSegment, describe_segments, plan_path, save_segment
from hbp_titan.data.sample_log import audit_run, check_epoch, read_attempts
from hbp_titan.packing import CostModel, Level, replan, save_plan
from tests.data.test_audit import LEVELS, RANKS, Run, Store, make_plan, planned_line


class ElasticRun(Run):
    """An epoch in three parts: two steps on two ranks, one on one rank with a level less, the rest on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        whole = make_plan(0)
        second = replan(whole, int(whole.step_offsets[2]), world_size=1, levels=[Level(64)], cost=CostModel())
        assert second.num_steps >= 2
        third = replan(second, int(second.step_offsets[1]), world_size=RANKS, levels=LEVELS, cost=CostModel())
        self.parts = [PlanSegment(1, whole), PlanSegment(3, second), PlanSegment(4, third)]
        self.last = self.parts[-1].end - 1
        for number in range(3):
            save_segment(folder, self.parts[: number + 1], Store.fingerprint)
        for number, last in enumerate((2, 3, self.last)):
            self.record(number + 1, self.parts[: number + 1], self.parts[number].first_step, last)

    def record(self, attempt: int, parts: list[PlanSegment], first: int, last: int) -> None:
        part = parts[-1]
        folder = self.folder / "consumed" / f"attempt-{attempt:04}"
        folder.mkdir(parents=True)
        values = {"first_step": first, "epoch": 0, "parts": describe_segments(parts)}
        values |= {"world_size": part.plan.world_size, "data": Store.fingerprint, "store": "store"}
        (folder / "attempt.json").write_text(json.dumps(values))
        for rank in range(part.plan.world_size):
            lines = [planned_line(part.plan, step, rank, part.first_step) for step in range(first, last + 1)]
            (folder / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def elastic(tmp_path: Path) -> ElasticRun:
    return ElasticRun(tmp_path)


def test_an_epoch_of_three_plans_passes_whole_and_up_to_each_step(elastic: ElasticRun) -> None:
    assert elastic.audit(elastic.last) == []
    line = check_epoch(elastic.folder, elastic.parts, Store())
    assert line == "epoch 0: 12 samples, each trained once by 3 plans"
    attempts = read_attempts(elastic.folder, elastic.last)
    (found,), _ = audit_run(elastic.folder, elastic.last, attempts, Store())
    assert (found.steps_done, found.num_steps, found.samples, found.tokens) == (elastic.last, elastic.last, 12, 198)
    # As it was in the middle of the third part, and of the second.
    elastic.change(3, 0, lambda lines: lines[:1])
    elastic.change(3, 1, lambda lines: lines[:1])
    assert elastic.audit(4) == []
    shutil.rmtree(elastic.folder / "consumed/attempt-0003")
    assert elastic.audit(3) == []


def test_a_missing_and_a_doubled_line_of_a_part_are_named(elastic: ElasticRun) -> None:
    lost = [i for pack in planned_line(elastic.parts[1].plan, 3, 0, 3)["iterations"] for i in pack["samples"]]
    path = elastic.folder / "consumed/attempt-0002/rank-0.jsonl"
    (line,) = path.read_text().splitlines(keepends=True)
    path.write_text("")
    faults = elastic.audit(elastic.last)
    assert faults[0] == "attempt-0002/rank-0.jsonl: ends before step 3, but steps up to 3 were trained"
    assert "(step 3): no record of 1 of 1 dp ranks: 0" in faults[1]
    assert f"epoch 0: {len(lost)} samples were not trained: data.jsonl:" in faults[-1]
    path.write_text(line * 2)
    faults = elastic.audit(elastic.last)
    assert faults[0] == "attempt-0002/rank-0.jsonl:2: step 3 where step 4 is expected"
    assert f"epoch 0: {len(lost)} samples were trained more than once: data.jsonl:" in faults[-1]


def test_a_part_that_follows_another_plan_loses_and_doubles_samples(elastic: ElasticRun) -> None:
    # The third part as if the second had not been trained: its step's samples come twice.
    twice = elastic.parts[1].plan.samples_of(0, int(elastic.parts[1].plan.step_offsets[1]))
    whole = elastic.parts[0].plan
    for finished, what, count in ((2, "more than once", len(twice)), (whole.num_steps - 1, "by none", None)):
        third = replan(whole, int(whole.step_offsets[finished]), cost=CostModel())
        shutil.rmtree(elastic.folder / "consumed/attempt-0003", ignore_errors=True)
        elastic.parts[2] = PlanSegment(4, third)
        save_segment(elastic.folder, elastic.parts, Store.fingerprint)
        elastic.record(3, elastic.parts, 4, 4)
        (fault,) = [fault for fault in elastic.audit(4) if f"are planned {what}" in fault]
        assert fault.startswith(f"epoch 0: {count or ''}")


def test_parts_that_are_missing_or_of_another_resumption_are_refused(elastic: ElasticRun) -> None:
    second = plan_path(elastic.folder, 0, 3)
    save_plan(elastic.parts[2].plan, second, inputs={"data": Store.fingerprint})
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors is not the plan that was trained"):
        elastic.audit(elastic.last)
    second.unlink()
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors is missing: the plan of .* from 3 on"):
        elastic.audit(elastic.last)


def test_parts_of_a_stretch_that_was_lost_do_not_count(elastic: ElasticRun) -> None:
    # A start from step 2 again on two ranks: neither the second nor the third part was trained.
    whole = elastic.parts[0]
    elastic.record(4, [whole], 3, whole.plan.num_steps)
    assert elastic.audit(whole.plan.num_steps) == []
