"""The sample log: what ranks write, and an audit that passes right logs and reports every kind of wrong one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.data.batch import PackedBatch, make_batch
from hbp_titan.data.epoch import PlanSegment, describe_segments, plan_path, save_segment
from hbp_titan.data.sample_log import SampleLog, audit_run, check_epoch, read_starts, start_folders
from hbp_titan.data.store_summary import check_totals
from hbp_titan.distributed.world import broadcast_value, close_world, init_world
from hbp_titan.packing import CostModel, Level, Plan, build_plan, replan
from hbp_titan.packing.plan import save_plan
from tests.data.test_batch import Samples

LEVELS = (Level(16, 1), Level(64, 2))
LENGTHS = np.array([3, 60, 7, 16, 9, 33, 2, 5, 11, 40, 8, 4])
RANKS = 2


# Writing.


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    init_world(60)
    yield
    close_world()


def _batch(samples: list[int], level: int) -> PackedBatch:
    return make_batch(Samples(), samples, Level(8, level + 1), level, max_documents=2)


def _open_log(folder: Path, first_step: int) -> SampleLog:
    log = SampleLog(folder, 0, LEVELS, broadcast_value)
    log.start(first_step, 3, [{"first_step": 1, "plan": "p"}], data="d", store=folder / "store")
    return log


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _pack(micro_batch: int, level: int, dp_rank: int, samples: list[int]) -> dict[str, Any]:
    return {"micro_batch": micro_batch, "level": level, "dp_rank": dp_rank, "samples": samples}


@pytest.mark.usefixtures("world")
def test_a_step_is_written_when_committed_and_not_before(tmp_path: Path) -> None:
    log = _open_log(tmp_path, 1)
    path = tmp_path / "sample_log/start-0001/rank-0.jsonl"
    log.add(4, _batch([2, 0], 0))
    log.add(5, _batch([1], 1))
    assert _lines(path) == []
    log.commit(1, epoch=3)
    # Read while the file is still open: a kill loses nothing in a buffer.
    expected = {"step": 1, "epoch": 3, "micro_batches": [_pack(4, 0, 0, [0, 2]), _pack(5, 1, 0, [1])]}
    assert _lines(path) == [expected]
    log.add(6, _batch([2], 0))
    log.commit(2, epoch=3, skipped=True)
    log.commit(3, epoch=3)
    log.add(7, _batch([1], 0))  # the step fails
    log.close()
    assert _lines(path)[1:] == [
        {"step": 2, "epoch": 3, "skipped": "nonfinite", "micro_batches": [_pack(6, 0, 0, [2])]},
        {"step": 3, "epoch": 3, "micro_batches": []},
    ]


@pytest.mark.usefixtures("world")
def test_every_start_has_its_own_folder(tmp_path: Path) -> None:
    for first_step in (1, 5, 5):
        _open_log(tmp_path, first_step).close()
    folders = start_folders(tmp_path / "sample_log")
    assert [folder.name for folder in folders] == ["start-0001", "start-0002", "start-0003"]
    assert json.loads((folders[1] / "start.json").read_text()) == {
        "first_step": 5,
        "epoch": 3,
        "segments": [{"first_step": 1, "plan": "p"}],
        "world_size": 1,
        "data": "d",
        "store": str((tmp_path / "store").resolve()),
    }


def test_a_pack_is_logged_by_its_first_cp_rank_only(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, 1, LEVELS, broadcast_value)
    log._file = (tmp_path / "rank-1.jsonl").open("w")
    log.add(0, _batch([0], 1))  # cp rank 1 of dp rank 0
    log.add(1, _batch([1], 0))  # dp rank 1
    log.commit(1, epoch=0)
    log.close()
    (line,) = _lines(tmp_path / "rank-1.jsonl")
    assert line["micro_batches"] == [_pack(1, 0, 1, [1])]


# The audit, on made-up runs.


class Store:
    """Sample i is line i + 1 of data.jsonl."""

    fingerprint = "f" * 64

    def __len__(self) -> int:
        return len(LENGTHS)

    def where(self, index: int) -> str:
        return f"data.jsonl:{index + 1}"


def make_plan(epoch: int) -> Plan:
    return build_plan(LENGTHS, LEVELS, RANKS, epoch=epoch, global_batch_tokens=64)


def planned_line(segment: PlanSegment, step: int, rank: int) -> dict[str, Any]:
    """What `rank` logs of `step`, written independently of SampleLog."""
    plan, packs = segment.plan, []
    first, last = plan.step_offsets[step - segment.first_step : step - segment.first_step + 2].tolist()
    for i in range(first, last):
        level = int(plan.level_of_iteration[i])
        dp_rank, cp_rank = divmod(rank, plan.levels[level].cp_degree)
        if cp_rank == 0:
            packs.append(_pack(i, level, dp_rank, plan.iteration(i).packs[dp_rank].tolist()))
    return {"step": step, "epoch": plan.epoch, "micro_batches": packs}


class Run:
    """A run folder with the plans of two epochs and what ranks log of their steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plans = [make_plan(0), make_plan(1)]
        self.epoch_steps = plans[0].num_steps
        assert self.epoch_steps >= 3
        self.segments = [PlanSegment(1 + epoch * self.epoch_steps, plan) for epoch, plan in enumerate(plans)]
        for plan in plans:
            save_plan(plan, plan_path(folder, plan.epoch), inputs={"data": Store.fingerprint})

    def start(self, number: int, first: int, last: int) -> None:
        epoch = (first - 1) // self.epoch_steps
        ranks = [[self.line(step, rank) for step in range(first, last + 1)] for rank in range(RANKS)]
        self.write_start(number, first, epoch, [self.segments[epoch]], ranks)

    def line(self, step: int, rank: int = 0) -> dict[str, Any]:
        return planned_line(self.segments[(step - 1) // self.epoch_steps], step, rank)

    def write_start(
        self, number: int, first: int, epoch: int, segments: list[PlanSegment], ranks: list[list[dict[str, Any]]]
    ) -> None:
        folder = self.folder / "sample_log" / f"start-{number:04}"
        folder.mkdir(parents=True)
        values = {"first_step": first, "epoch": epoch, "segments": describe_segments(segments)}
        values |= {"world_size": len(ranks), "data": Store.fingerprint, "store": "store"}
        (folder / "start.json").write_text(json.dumps(values))
        for rank, lines in enumerate(ranks):
            (folder / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def change(self, start: int, rank: int, change: Callable[[list[str]], list[str]]) -> None:
        """Rewrite a rank's lines."""
        path = self.folder / "sample_log" / f"start-{start:04}" / f"rank-{rank}.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    def audit(self, steps_done: int, running: bool = False) -> list[str]:
        """All problems, without the folder's name."""
        starts = read_starts(self.folder, steps_done)
        audits, problems = audit_run(self.folder, steps_done, starts, Store(), running=running)
        problems += [problem for found in audits for problem in found.problems]
        return [problem.replace(f"{self.folder}/sample_log/", "") for problem in problems]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def _samples(line: dict[str, Any]) -> list[int]:
    return [i for pack in line["micro_batches"] for i in pack["samples"]]


def test_a_whole_epoch_passes_with_its_totals(run: Run) -> None:
    run.start(1, 1, run.epoch_steps)
    assert run.audit(run.epoch_steps) == []
    assert check_epoch(run.folder, run.segments[:1], Store()) == "epoch 0: 12 samples, each trained once"
    (found,), _ = audit_run(run.folder, run.epoch_steps, read_starts(run.folder, run.epoch_steps), Store())
    assert (found.samples, found.tokens, found.finished) == (12, 198, True)


def test_an_epoch_in_progress_passes_up_to_the_last_step_done(run: Run) -> None:
    run.start(1, 1, run.epoch_steps + 2)
    assert run.audit(run.epoch_steps + 2) == []
    assert run.audit(run.epoch_steps + 1) == []  # the last one is in flight, on one rank or on both
    run.change(1, 1, lambda lines: lines[:-1])
    assert run.audit(run.epoch_steps + 1) == []
    # Two steps in flight cannot be.
    assert run.audit(run.epoch_steps)[0].startswith(f"start-0001/rank-0.jsonl:{run.epoch_steps + 2}: step")


def test_the_latest_start_that_trained_a_step_counts(run: Run) -> None:
    last = 2 * run.epoch_steps
    run.start(1, 1, 3)
    run.start(2, 3, run.epoch_steps + 1)
    run.start(3, 3, 3)  # killed again before a checkpoint
    run.start(4, 3, last)
    # No step of the second start counts any more; the first two of the first start do.
    run.change(2, 0, lambda lines: ['{"step": 3, "epoch": 0, "micro_batches": []}\n', *lines[1:]])
    assert run.audit(last) == []
    run.change(1, 0, lambda lines: [lines[0], '{"step": 2, "epoch": 0, "micro_batches": []}\n', *lines[2:]])
    assert "not logged by their first rank" in run.audit(last)[0]


def test_steps_of_the_next_epoch_that_a_kill_has_lost_are_no_fault_of_the_finished_one(run: Run) -> None:
    # Killed three steps after the checkpoint of the epoch's last step, and about to resume from that.
    run.start(1, 1, run.epoch_steps + 3)
    assert check_epoch(run.folder, run.segments[:1], Store()) == "epoch 0: 12 samples, each trained once"
    # A run that does not resume has no such steps.
    assert f"has done {run.epoch_steps} steps" in run.audit(run.epoch_steps)[0]
    assert run.audit(run.epoch_steps, running=True) == []


def _cut(line: str) -> str:
    return line[: len(line) // 2]


def test_a_line_cut_by_a_kill_is_forgiven_unless_its_step_counts(run: Run) -> None:
    run.start(1, 1, 3)
    run.change(1, 1, lambda lines: [*lines[:2], _cut(lines[2])])
    assert run.audit(2) == []  # in flight when the run was killed
    run.start(2, 3, run.epoch_steps)
    assert run.audit(run.epoch_steps) == []  # trained again
    run.change(1, 1, lambda lines: [lines[0], _cut(lines[1])])
    assert run.audit(run.epoch_steps)[0].startswith("start-0001/rank-1.jsonl:2: not a line of a sample log")
    run.change(1, 1, lambda lines: ["\n", *lines])
    assert run.audit(run.epoch_steps)[0].startswith("start-0001/rank-1.jsonl:1: not a line of")


def test_a_missing_line_is_reported_with_its_step_and_samples(run: Run) -> None:
    run.start(1, 1, run.epoch_steps)
    lost = _samples(run.line(2))
    run.change(1, 0, lambda lines: [lines[0], *lines[2:]])
    first, *others = run.audit(run.epoch_steps)
    assert first.startswith("start-0001/rank-0.jsonl:2: step 3")
    assert any("(step 2): 1 of" in problem for problem in others)
    assert f"epoch 0: {len(lost)} samples were not trained: data.jsonl:" in others[-1]
    with pytest.raises(RuntimeError, match=r"epoch 0 .*rank-0.jsonl:2: step 3"):
        check_epoch(run.folder, run.segments[:1], Store())


def test_a_missing_last_line_is_reported(run: Run) -> None:
    run.start(1, 1, run.epoch_steps)
    run.change(1, 1, lambda lines: lines[:-1])
    assert run.audit(run.epoch_steps)[0].startswith(f"start-0001/rank-1.jsonl: ends before step {run.epoch_steps}")


def test_a_pack_may_be_trained_in_another_order_than_planned(run: Run) -> None:
    # A batch sorts its documents by length; the packs of isf are not sorted.
    run.start(1, 1, run.epoch_steps)
    reverse = _change_pack("samples", lambda ids: ids[::-1])

    def change(lines: list[str]) -> list[str]:
        values = [json.loads(line) for line in lines]
        for value in values:
            reverse(value)
        assert any(value != json.loads(line) for value, line in zip(values, lines, strict=True))
        return [json.dumps(value) + "\n" for value in values]

    run.change(1, 0, change)
    assert run.audit(run.epoch_steps) == []


@pytest.mark.parametrize("number", [0, -1])
def test_a_doubled_line_is_reported_with_its_samples(run: Run, number: int) -> None:
    run.start(1, 1, run.epoch_steps)
    at = range(run.epoch_steps)[number]
    doubled = _samples(run.line(at + 1))
    run.change(1, 0, lambda lines: [*lines[: at + 1], lines[at], *lines[at + 1 :]])
    problems = run.audit(run.epoch_steps)
    assert problems[0].startswith(f"start-0001/rank-0.jsonl:{at + 2}: step {at + 1}")
    assert "was trained before" in problems[1]
    assert f"{len(doubled)} samples were trained more than once: data.jsonl:{min(doubled) + 1} " in problems[-1]


def _change_pack(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def spoil(line: dict[str, Any]) -> None:
        line["micro_batches"][0][key] = change(line["micro_batches"][0][key])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_change_pack("samples", lambda ids: [99, *ids[1:]]), r"missing \d+; not planned 99"),
        (_change_pack("samples", lambda ids: [99, *ids[1:]]), r"samples 99 do not exist"),
        (_change_pack("level", lambda level: level ^ 1), r"level \d, but the plan has level \d"),
        (_change_pack("micro_batch", lambda number: number + 50), r"the plan's step 1 has micro-batches 0 to"),
        (_change_pack("dp_rank", lambda rank: rank + 1), r"logged by rank 0, which is not the first"),
        (lambda line: line.update(epoch=1), r"epoch 1, but step 1 is of epoch 0"),
    ],
)
def test_a_pack_that_differs_from_the_plan_is_reported(run: Run, spoil: Callable[[Any], None], message: str) -> None:
    run.start(1, 1, run.epoch_steps)

    def change(lines: list[str]) -> list[str]:
        value = json.loads(lines[0])
        spoil(value)
        return [json.dumps(value) + "\n", *lines[1:]]

    run.change(1, 0, change)
    assert any(re.search(message, problem) for problem in run.audit(run.epoch_steps))


def test_skipped_steps_are_counted_apart_and_ranks_must_agree(run: Run) -> None:
    run.start(1, 1, run.epoch_steps)
    skipped = [i for rank in range(RANKS) for i in _samples(run.line(2, rank))]

    def skip(lines: list[str], reason: str = "nonfinite") -> list[str]:
        return [lines[0], json.dumps({**json.loads(lines[1]), "skipped": reason}) + "\n", *lines[2:]]

    run.change(1, 0, skip)
    (problem,) = run.audit(run.epoch_steps)
    assert problem.startswith("start-0001/rank-1.jsonl:2: step 2 is trained here but skipped at")
    run.change(1, 1, skip)
    assert run.audit(run.epoch_steps) == []
    (found,), _ = audit_run(run.folder, run.epoch_steps, read_starts(run.folder, run.epoch_steps), Store())
    assert (found.samples, found.skipped) == (12 - len(skipped), len(skipped))
    assert found.tokens == 198 - int(LENGTHS[skipped].sum())
    assert f"; {len(skipped)} of skipped steps" in check_epoch(run.folder, run.segments[:1], Store())
    run.change(1, 1, lambda lines: skip(lines, "other"))
    assert "rank-1.jsonl:2: not a line of" in run.audit(run.epoch_steps)[0]


def test_lost_files_starts_and_other_data_are_reported(run: Run) -> None:
    log = run.folder / "sample_log"
    run.start(1, 1, 2)
    run.start(2, 2, run.epoch_steps)
    (log / "start-0002/rank-1.jsonl").rename(log / "start-0002/rank-5.jsonl")
    problems = run.audit(run.epoch_steps)
    assert any(problem.startswith("start-0002/rank-5.jsonl: unexpected") for problem in problems)
    assert "start-0002/rank-1.jsonl: missing" in problems
    (log / "start-0001").rename(log / "lost")
    assert run.audit(run.epoch_steps)[0].endswith("no start logged steps 1 to 1")
    values = json.loads((log / "start-0002/start.json").read_text())
    (log / "start-0002/start.json").write_text(json.dumps({**values, "data": "0" * 64}))
    assert any("trained the data 0000000000000000" in problem for problem in run.audit(run.epoch_steps))


def test_a_folder_without_log_or_plan_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="no sample log"):
        run.audit(1)
    run.start(1, 1, 1)
    with pytest.raises(ValueError, match="nothing to audit"):
        run.audit(0)
    save_plan(run.segments[0].plan, plan_path(run.folder, 0), inputs={"data": "other"})
    with pytest.raises(ValueError, match="other inputs: data"):
        run.audit(1)
    (run.folder / "sample_log/start-0001/start.json").write_text("{}")
    with pytest.raises(ValueError, match=r"start.json: damaged"):
        run.audit(1)


# An epoch of several plans.


class ElasticRun(Run):
    """An epoch in three segments: two steps on two ranks, one on one rank and one level, the rest on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        whole = make_plan(0)
        second = replan(whole, int(whole.step_offsets[2]), world_size=1, levels=[Level(64)], cost=CostModel())
        assert second.num_steps >= 2
        third = replan(second, int(second.step_offsets[1]), world_size=RANKS, levels=LEVELS, cost=CostModel())
        self.segments = [PlanSegment(1, whole), PlanSegment(3, second), PlanSegment(4, third)]
        self.last = self.segments[-1].end - 1
        for number in range(3):
            save_segment(folder, self.segments[: number + 1], Store.fingerprint)
        for number, last in enumerate((2, 3, self.last)):
            self.log(number + 1, self.segments[: number + 1], self.segments[number].first_step, last)

    def log(self, number: int, segments: list[PlanSegment], first: int, last: int) -> None:
        trained = segments[-1]
        ranks = [
            [planned_line(trained, step, rank) for step in range(first, last + 1)]
            for rank in range(trained.plan.world_size)
        ]
        self.write_start(number, first, 0, segments, ranks)


@pytest.fixture
def elastic(tmp_path: Path) -> ElasticRun:
    return ElasticRun(tmp_path)


def test_an_epoch_of_three_plans_passes_whole_and_up_to_each_step(elastic: ElasticRun) -> None:
    assert elastic.audit(elastic.last) == []
    line = check_epoch(elastic.folder, elastic.segments, Store())
    assert line == "epoch 0: 12 samples, each trained once by 3 plans"
    (found,), _ = audit_run(elastic.folder, elastic.last, read_starts(elastic.folder, elastic.last), Store())
    assert (found.steps_done, found.num_steps, found.samples, found.tokens) == (elastic.last, elastic.last, 12, 198)
    # In the middle of the third segment, and of the second.
    elastic.change(3, 0, lambda lines: lines[:1])
    elastic.change(3, 1, lambda lines: lines[:1])
    assert elastic.audit(4) == []
    shutil.rmtree(elastic.folder / "sample_log/start-0003")
    assert elastic.audit(3) == []


def test_a_missing_and_a_doubled_line_of_a_segment_are_reported(elastic: ElasticRun) -> None:
    lost = _samples(planned_line(elastic.segments[1], 3, 0))
    path = elastic.folder / "sample_log/start-0002/rank-0.jsonl"
    (line,) = path.read_text().splitlines(keepends=True)
    path.write_text("")
    problems = elastic.audit(elastic.last)
    assert problems[0].startswith("start-0002/rank-0.jsonl: ends before step 3")
    assert "(step 3): 1 of 1 packs" in problems[1]
    assert f"epoch 0: {len(lost)} samples were not trained: data.jsonl:" in problems[-1]
    path.write_text(line * 2)
    problems = elastic.audit(elastic.last)
    assert problems[0].startswith("start-0002/rank-0.jsonl:2: step 3")
    assert f"epoch 0: {len(lost)} samples were trained more than once: data.jsonl:" in problems[-1]


def test_a_segment_that_follows_the_wrong_plan_loses_and_doubles_samples(elastic: ElasticRun) -> None:
    # The third segment as if the second had not been trained: its step's samples come twice.
    second, whole = elastic.segments[1].plan, elastic.segments[0].plan
    twice = second.samples_of(0, int(second.step_offsets[1]))
    for finished, what, count in ((2, "more than once", len(twice)), (whole.num_steps - 1, "not planned", "")):
        third = replan(whole, int(whole.step_offsets[finished]), cost=CostModel())
        shutil.rmtree(elastic.folder / "sample_log/start-0003", ignore_errors=True)
        elastic.segments[2] = PlanSegment(4, third)
        save_segment(elastic.folder, elastic.segments, Store.fingerprint)
        elastic.log(3, elastic.segments, 4, 4)
        (problem,) = [problem for problem in elastic.audit(4) if f"samples are {what}" in problem or
                      f"samples are planned {what}" in problem]  # fmt: skip
        assert problem.startswith(f"epoch 0: {count}")


def test_segments_of_lost_steps_do_not_count_and_missing_plans_are_refused(elastic: ElasticRun) -> None:
    second = plan_path(elastic.folder, 0, 3)
    save_plan(elastic.segments[2].plan, second, inputs={"data": Store.fingerprint})
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors: not the plan"):
        elastic.audit(elastic.last)
    second.unlink()
    with pytest.raises(ValueError, match=r"epoch-0-step-3.safetensors: missing"):
        elastic.audit(elastic.last)
    # A start from step 3 on two ranks with the first plan: neither the second nor the third segment counts.
    whole = elastic.segments[0]
    elastic.log(4, [whole], 3, whole.plan.num_steps)
    assert elastic.audit(whole.plan.num_steps) == []


def test_totals_that_do_not_add_up_are_reported() -> None:
    totals = {"rows": 9, "whole": 4, "partly": 1, "truncated": 1, "split": 1, "excluded: empty": 2, "not_chosen": 0}
    totals |= {"samples_made": 8, "duplicate": 1, "not drawn": 0, "held out": 0, "not held out": 0}
    totals |= {"trained": 7, "copies": 7, "samples": 14}
    lines, problems = check_totals(totals, 14)
    assert "9 rows = 4 whole + 1 partly + 1 truncated + 1 split + 2 excluded: empty" in lines[0]
    assert "14 samples = 7 trained + 7 copies" in lines[2]
    assert problems == []
    wrong_rows, wrong_samples = check_totals({**totals, "whole": 3}, 13)[1]
    assert "9 rows != 3 whole + 1 partly + 1 truncated" in wrong_rows
    assert "14 samples" in wrong_samples
