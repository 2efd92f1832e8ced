"""Timing: the time model by hand, the prediction, and the check that finds a slow rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbp_titan.components.timing import (
    LevelTimeModel,
    TimingMonitor,
    compare,
    pack_loads,
    predict_epoch,
    predicted_time,
)
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.job_config import JobConfig
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level, build_plan
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning.hardware import hardware_of
from hbp_titan.tuning.time_model import time_model
from tests.runs import read_metrics
from tests.tiny_run import write_tiny_run


def test_micro_batch_takes_as_long_as_its_slowest_rank() -> None:
    # Two ranks: documents of 4 and of 2 + 2 tokens fill one micro-batch of one level.
    plan = build_plan([4, 2, 2], [Level(4)], world_size=2, method="hbp")
    assert sorted(map(tuple, pack_loads(plan).tolist())) == [(1, 2, 8, 2), (1, 3, 16, 1)]
    epoch = predict_epoch(plan, [LevelTimeModel(base=1.0, per_loss_token=0.1, per_square=0.01, per_document=0.2)], 0.5)
    #   1 + 0.3 + 0.16 + 0.2 = 1.66 and 1 + 0.2 + 0.08 + 0.4 = 1.68
    np.testing.assert_allclose(epoch.slowest, [1.68])
    np.testing.assert_allclose(epoch.mean, [1.67])
    assert epoch.seconds == pytest.approx(2.18)
    assert epoch.idle == pytest.approx(0.01 / 1.68)
    # Each level has its own model.
    plan = build_plan([2, 2, 8], [Level(2), Level(8, cp_degree=2)], world_size=2, method="hbp")
    epoch = predict_epoch(plan, [LevelTimeModel(1.0), LevelTimeModel(10.0)])
    assert (sorted(epoch.slowest.tolist()), epoch.idle) == ([1.0, 10.0], 0.0)


NAMES = ["1K/cp1", "8K/cp2"]
LEVELS = np.array([[0, 1, 0]] * 2)
MODEL = np.array([[1.0, 4.0, 2.0], [1.0, 4.0, 1.0]])
"""Seconds of two ranks in three micro-batches: in the last, rank 1 has half the work."""


def test_times_as_predicted_are_reported_without_a_warning() -> None:
    report = compare(LEVELS, np.array([[1.1, 4.0, 2.2]] * 2), 0.5 * MODEL, MODEL)
    assert vars(report.levels[0]) == pytest.approx(
        {"micro_batches": 2, "ratio": 1.1, "waiting": 1 / 6, "planned": 1 / 6}
    )
    assert vars(report.levels[1]) == pytest.approx({"micro_batches": 1, "ratio": 1.0, "waiting": 0.0, "planned": 0.0})
    assert report.slowest[1] == pytest.approx(1.0)
    assert report.warnings(NAMES) == []
    assert report.line(NAMES).startswith("timing check: 1K/cp1 1.10x of predicted, waiting 16.7% (plan 16.7%); 8K")


def test_level_slower_than_predicted_is_named() -> None:
    (warning,) = compare(LEVELS, np.array([[1.0, 5.0, 2.0]] * 2), MODEL, MODEL).warnings(NAMES)
    assert "8K/cp2 runs 1.25x slower" in warning


def test_waiting_under_a_balanced_plan_is_blamed_on_the_cost_model() -> None:
    # Each of two ranks is the slow one in turn, so that neither is slow over all.
    model = np.ones((2, 2))
    work = np.array([[1.0, 3.0], [3.0, 1.0]])
    report = compare(np.zeros((2, 2), int), np.ones((2, 2)), work, model)
    assert report.levels[0].waiting == pytest.approx(1 / 3)
    (warning,) = report.warnings(NAMES)
    assert "1K/cp1: ranks wait 33%" in warning


def test_straggler_is_found_by_its_work_per_modelled_work() -> None:
    model = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    report = compare(np.zeros((3, 2), int), np.full((3, 2), 2.0), model * np.array([[1.0], [1.3], [1.0]]), model)
    assert report.slowest == (1, pytest.approx(1.3))
    assert report.warnings(NAMES)[-1].startswith("warning: straggler: rank 1 is 1.30x slower")


def test_one_slow_or_fast_micro_batch_of_a_level_does_not_set_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_gather", lambda out, own: out[0].copy_(own))
    plan = build_plan([4] * 9, [Level(4)], 1)
    monitor = TimingMonitor(torch.nn.Identity(), World(0, 1, torch.device("cpu")), None, 3)  # type: ignore[arg-type]
    ratios = []
    for step, seconds in enumerate([5.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.5, 1.5, 1.5]):
        with monitor.micro_batch(step):
            pass
        monitor.timer._cpu = [(seconds, seconds)]
        monitor.pop()
        if report := monitor.report(plan, step + 1):
            ratios.append(report.levels[0].ratio)
    # The unit is 1 s: the median of all micro-batches so far.
    assert ratios == [1.0, 1.0, 1.5]


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


def test_straggler_is_found_during_training(tmp_path: Path) -> None:
    arguments = write_tiny_run(tmp_path, num_rows=30, levels="64:1,512:2", saves=False)
    arguments.append("--metrics.timing_check_interval=3")
    run_distributed(_train, 2, arguments)
    records = read_metrics(tmp_path / "run")
    checked = [record["step"] for record in records if "timing_check" in record]
    assert checked == [step for step in range(1, len(records) + 1) if step % 3 == 0 or step == len(records)]
    found = [record["timing_check"] for record in records if "timing_check" in record]
    assert {check["slowest_rank"] for check in found} == {1}
    assert all(check["slowest_ratio"] > 1.2 for check in found)
    assert any("64/cp1" in check["levels"] and check["levels"]["64/cp1"]["waiting"] > 0.2 for check in found)


ARGS = get_flavor("debug")
CPU = torch.device("cpu")
# Four steps: two of a pack of 4 tokens, then two of 8.
PLAN = build_plan([4, 4, 8, 8], [Level(4), Level(8)], 1, curriculum_steps=2)


def test_warm_up_times_count_for_every_remaining_micro_batch() -> None:
    assert PLAN.level_of_iteration.tolist() == [0, 0, 1, 1]

    def predicted(first_step: int, steps: int) -> str:
        return predicted_time(JobConfig(), ARGS, PLAN, first_step, steps, CPU, None, [1.0, 3.0])

    assert predicted(0, 4) == "8 s for 4 steps, from the warm-up of each level"
    assert predicted(1, 2).startswith("4 s for 2 steps")
    # One step of this epoch is left; the mean step takes 2 s.
    assert predicted(3, 5).startswith("11 s for 5 steps")


def test_measured_times_take_precedence_over_the_warm_up() -> None:
    times = [LevelTimeModel(base=0.5), LevelTimeModel(base=0.0, per_square=1 / 16)]
    predicted = predicted_time(JobConfig(), ARGS, PLAN, 0, 4, CPU, times, [9.0, 9.0])
    assert predicted == "9 s for 4 steps, from the levels' measured times"


def test_known_gpu_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    config = JobConfig(levels=list(PLAN.levels))
    predicted = predicted_time(config, ARGS, PLAN, 0, 4, device, None, [9.0, 9.0])
    assert predicted.endswith("for 4 steps, estimated for h200-141gb")
    model = time_model(ARGS, JobConfig(), hardware_of(device), 1)  # type: ignore[arg-type]
    seconds = 2 * sum(model.level_time(level).base for level in PLAN.levels) + 4 * model.step_seconds()
    assert float(predicted.split()[0]) == pytest.approx(seconds, rel=0.05)
