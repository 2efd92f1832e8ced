"""How long the rest of a run will take, said before its first step.

Owns the choice of where the seconds of an iteration come from: measured when the levels were chosen; else estimated for
the GPU, where its kind is known; else each level's first pass in this start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hbp_titan.config import JobConfig
from hbp_titan.distributed.hardware import hardware_of
from hbp_titan.levels.level_time import LevelTime, predict_epoch
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Plan
from hbp_titan.selection.selection import duration
from hbp_titan.simulation.estimate import time_model


def predicted_time(
    config: JobConfig,
    args: ModelArgs,
    plan: Plan,
    first_step: int,
    steps: int,
    device: torch.device,
    measured: Sequence[LevelTime] | None,
    first_passes: Sequence[float],
) -> str:
    """The time of the next `steps` optimizer steps in words, with what it rests on.

    plan: of the current epoch, at its step first_step; epochs after it are taken to be like it. measured: one a level.
    first_passes: seconds of each level's heaviest iteration, the slowest rank's.
    """
    hardware = hardware_of(device)
    if measured is not None:
        times, step_seconds, origin = [*measured], 0.0, "from the levels' measured times"
    elif hardware is not None:
        model = time_model(args, config, hardware, plan.world_size)
        times = [model.level_time(level) for level in plan.levels]
        step_seconds, origin = model.step_seconds(), f"estimated for {hardware.name}"
    else:
        times = [LevelTime(base=seconds) for seconds in first_passes]
        step_seconds, origin = 0.0, "from each level's first pass" + ", compilation included" * config.compile.enable
    epoch = predict_epoch(plan, times, step_seconds)
    left = min(steps, plan.num_steps - first_step)
    begin, end = plan.step_offsets[[first_step, first_step + left]]
    seconds = float(epoch.slowest[begin:end].sum()) + left * step_seconds
    seconds += (steps - left) * epoch.seconds / plan.num_steps
    return f"{duration(seconds)} for {steps:,} steps, {origin}"
