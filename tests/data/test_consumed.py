"""What a rank writes as it trains: lines of done steps only, in a new attempt at each start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.data.batch import PackedBatch, make_batch
from hbp_titan.data.sample_log import SampleLog, attempt_folders
from hbp_titan.distributed.world import broadcast_value, close_world, init_world
from hbp_titan.packing import Level
from tests.data.test_batch import Samples

LEVELS = (Level(8, 1), Level(8, 2))


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    init_world(60)
    yield
    close_world()


def _batch(samples: list[int], level: int) -> PackedBatch:
    return make_batch(Samples(), samples, LEVELS[level], level, max_documents=2)


def _record(folder: Path, first_step: int, rank: int = 0) -> SampleLog:
    record = SampleLog(folder, rank, LEVELS, broadcast_value)
    record.start(first_step, 3, [{"first_step": 1, "plan": "p"}], data="d", store=folder / "store")
    return record


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_is_written_when_it_is_committed_and_not_before(tmp_path: Path) -> None:
    record = _record(tmp_path, 1)
    path = tmp_path / "consumed/attempt-0001/rank-0.jsonl"
    record.add(4, _batch([2, 0], 0))
    record.add(5, _batch([1], 1))
    assert _lines(path) == []
    record.commit(1, epoch=3)
    packs = [
        {"iteration": 4, "level": 0, "dp_rank": 0, "samples": [0, 2]},
        {"iteration": 5, "level": 1, "dp_rank": 0, "samples": [1]},
    ]
    # Read while the file is still open: nothing waits in a buffer that a kill would lose.
    assert _lines(path) == [{"step": 1, "epoch": 3, "iterations": packs}]
    record.add(6, _batch([1], 0))  # the step fails
    record.close()
    assert len(_lines(path)) == 1


def test_a_skipped_step_says_so(tmp_path: Path) -> None:
    record = _record(tmp_path, 1)
    record.add(4, _batch([2], 0))
    record.commit(1, epoch=0, skipped=True)
    record.commit(2, epoch=0)
    first, second = _lines(tmp_path / "consumed/attempt-0001/rank-0.jsonl")
    assert first["skipped"] == "nonfinite"
    assert [pack["samples"] for pack in first["iterations"]] == [[2]]
    assert second == {"step": 2, "epoch": 0, "iterations": []}
    record.close()


def test_every_start_is_a_new_attempt(tmp_path: Path) -> None:
    for first_step in (1, 5, 5):
        _record(tmp_path, first_step).close()
    folders = attempt_folders(tmp_path / "consumed")
    assert [folder.name for folder in folders] == ["attempt-0001", "attempt-0002", "attempt-0003"]
    assert json.loads((folders[1] / "attempt.json").read_text()) == {
        "first_step": 5,
        "epoch": 3,
        "parts": [{"first_step": 1, "plan": "p"}],
        "world_size": 1,
        "data": "d",
        "store": str((tmp_path / "store").resolve()),
    }


def test_a_pack_is_recorded_by_its_first_cp_rank_alone(tmp_path: Path) -> None:
    record = SampleLog(tmp_path, 1, LEVELS, broadcast_value)
    record._file = (tmp_path / "rank-1.jsonl").open("w")
    record.add(0, _batch([0], 1))  # cp rank 1 of dp rank 0
    record.add(1, _batch([1], 0))  # dp rank 1
    record.commit(1, epoch=0)
    record.close()
    (line,) = _lines(tmp_path / "rank-1.jsonl")
    assert line["iterations"] == [{"iteration": 1, "level": 0, "dp_rank": 1, "samples": [1]}]
