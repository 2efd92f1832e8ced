"""The time of the rest of a run, by hand."""

from __future__ import annotations

import pytest
import torch

from hbp_titan.components.timing import LevelTimeModel, predicted_time
from hbp_titan.job_config import JobConfig
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level, build_plan
from hbp_titan.tuning.hardware import hardware_of
from hbp_titan.tuning.time_model import time_model

ARGS = get_flavor("debug")
CPU = torch.device("cpu")
# Four steps: two of a pack of 4 tokens, then two of 8.
PLAN = build_plan([4, 4, 8, 8], [Level(4), Level(8)], 1, curriculum_steps=2)


def test_first_passes_count_for_every_iteration_that_is_left() -> None:
    assert PLAN.level_of_iteration.tolist() == [0, 0, 1, 1]

    def told(first_step: int, steps: int) -> str:
        return predicted_time(JobConfig(), ARGS, PLAN, first_step, steps, CPU, None, [1.0, 3.0])

    assert told(0, 4) == "8 s for 4 steps, from the warm-up of each level"
    assert told(1, 2).startswith("4 s for 2 steps")
    # One step of this epoch is left; the mean step takes 2 s.
    assert told(3, 5).startswith("11 s for 5 steps")


def test_measured_times_go_before_first_passes() -> None:
    times = [LevelTimeModel(base=0.5), LevelTimeModel(base=0.0, per_square=1 / 16)]
    told = predicted_time(JobConfig(), ARGS, PLAN, 0, 4, CPU, times, [9.0, 9.0])
    assert told == "9 s for 4 steps, from the levels' measured times"


def test_a_known_gpu_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    device = torch.device("cuda", 0)
    told = predicted_time(JobConfig(), ARGS, PLAN, 0, 4, device, None, [9.0, 9.0])
    assert told.endswith("for 4 steps, estimated for h200-141gb")
    model = time_model(ARGS, JobConfig(), hardware_of(device), 1)  # type: ignore[arg-type]
    seconds = 2 * sum(model.level_time(level).base for level in PLAN.levels) + 4 * model.step_seconds()
    assert float(told.split()[0]) == pytest.approx(seconds, rel=0.05)
