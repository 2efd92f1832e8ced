"""What the live check says of measured times, by hand, and that it sees a rank which is made slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.components.timing import compare
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run

NAMES = ["1K/cp1", "8K/cp2"]
LEVELS = np.array([0, 1, 0])
MODEL = np.array([[1.0, 4.0, 2.0], [1.0, 4.0, 1.0]])
"""Seconds of two ranks in three iterations: in the last, rank 1 has half the work."""


def test_times_as_modelled_are_reported_without_a_warning() -> None:
    report = compare(LEVELS, np.array([[1.1, 4.0, 2.2]] * 2), 0.5 * MODEL, MODEL)
    assert vars(report.levels[0]) == pytest.approx(
        {"micro_batches": 2, "ratio": 1.1, "waiting": 1 / 6, "planned": 1 / 6}
    )
    assert vars(report.levels[1]) == pytest.approx({"micro_batches": 1, "ratio": 1.0, "waiting": 0.0, "planned": 0.0})
    assert report.slowest[1] == pytest.approx(1.0)
    assert report.warnings(NAMES) == []
    assert report.line(NAMES).startswith("timing check: 1K/cp1 1.10x of predicted, waiting 16.7% (plan 16.7%); 8K")


def test_a_level_that_takes_longer_than_modelled_is_named() -> None:
    (warning,) = compare(LEVELS, np.array([[1.0, 5.0, 2.0]] * 2), MODEL, MODEL).warnings(NAMES)
    assert "8K/cp2 runs 1.25x slower" in warning


def test_ranks_that_wait_though_the_plan_is_even_are_named_as_a_fault_of_the_cost_model() -> None:
    # Each of two ranks is the slow one in turn, so that neither is slow over all.
    model = np.ones((2, 2))
    work = np.array([[1.0, 3.0], [3.0, 1.0]])
    report = compare(np.array([0, 0]), np.ones((2, 2)), work, model)
    assert report.levels[0].waiting == pytest.approx(1 / 3)
    (warning,) = report.warnings(NAMES)
    assert "1K/cp1: ranks wait 33%" in warning


def test_a_slow_rank_is_named_by_its_work_per_modelled_work() -> None:
    model = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    report = compare(np.array([0, 0]), np.full((3, 2), 2.0), model * np.array([[1.0], [1.3], [1.0]]), model)
    assert report.slowest == (1, pytest.approx(1.3))
    assert report.warnings(NAMES)[-1].startswith("warning: straggler: rank 1 is 1.30x slower")


def _train(world: World, argv: list[str]) -> None:
    trainer = Trainer(load_config(argv), world)
    whole = trainer.engine.forward_backward

    def slow(batch: Any, last: bool = True) -> Any:
        if world.rank == 1:
            end = time.thread_time() + 0.1
            while time.thread_time() < end:
                pass
        return whole(batch, last)

    trainer.engine.forward_backward = slow  # type: ignore[method-assign]
    trainer.train()


def test_a_rank_that_is_made_slow_is_found_while_training(tmp_path: Path) -> None:
    arguments = [
        *write_tiny_run(tmp_path),
        "--levels=64:1,512:2",
        "--metrics.timing_check_interval=3",
        "--checkpoint.enable=false",
        "--checkpoint.export_hf=false",
        f"--job.dump_folder={tmp_path}/run",
    ]
    run_distributed(_train, 2, arguments)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    checked = [record["step"] for record in records if "timing_check" in record]
    assert checked == [step for step in range(1, len(records) + 1) if step % 3 == 0 or step == len(records)]
    found = [record["timing_check"] for record in records if "timing_check" in record]
    assert {check["slowest_rank"] for check in found} == {1}
    assert all(check["slowest_ratio"] > 1.2 for check in found)
    assert any("64/cp1" in check["levels"] and check["levels"]["64/cp1"]["waiting"] > 0.2 for check in found)
