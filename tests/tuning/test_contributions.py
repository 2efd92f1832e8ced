"""What each choice of a selection contributes to the time of an epoch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hbp_titan.components.timing import predict_epoch
from hbp_titan.config import load_config
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.preflight import cost_model
from hbp_titan.tuning.contributions import CHOICES, Contributions, contributions
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.memory import estimate_memory
from hbp_titan.tuning.memory_plans import MEMORY_MARGIN
from hbp_titan.tuning.search import Workload, baselines, selected
from hbp_titan.tuning.time_model import estimate_candidates, time_model

WORLD = 8
ARGS = get_flavor("debug")
SHORT = Level(1024, ac_policy="keep_attention", ac_layers=2, reshard_after_forward=False)
LONG = Level(4096, 2, ac_policy="offload_attention", ac_layers=ARGS.num_layers)
CONFIG = load_config(["--parallelism.cpu_offload=true"])
LENGTHS = np.random.default_rng(0).integers(50, 4000, 400)
WORKLOAD = Workload(LENGTHS, LENGTHS - 1, WORLD, cost_model(ARGS), step_seconds=0.25)
H100 = get_hardware("h100-80gb")


def found(memory_bytes: int) -> Contributions:
    machine = replace(H100, memory_bytes=memory_bytes)
    candidates = estimate_candidates(ARGS, CONFIG, machine, WORLD, [SHORT, LONG])
    selection = selected(candidates, WORKLOAD.plan([SHORT, LONG]), WORKLOAD)
    return contributions(selection, baselines(candidates, WORKLOAD), WORKLOAD, CONFIG, ARGS, machine)


def test_each_choice_is_taken_back_alone() -> None:
    result = found(H100.memory_bytes)
    model, plan = time_model(ARGS, CONFIG, H100, WORLD), WORKLOAD.plan([SHORT, LONG])

    def seconds(*levels: Level) -> float:
        return predict_epoch(plan, [model.level_time(level) for level in levels], 0.25).seconds

    rows = {row.name: row.seconds for row in result.rows}
    assert result.seconds == pytest.approx(seconds(SHORT, LONG))
    recomputed = [replace(level, ac_policy="full", ac_layers=None) for level in (SHORT, LONG)]
    assert rows["activation checkpointing"] == pytest.approx(seconds(*recomputed))
    on_device = replace(LONG, ac_policy="keep_attention")
    assert rows["activations on the host"] == pytest.approx(seconds(SHORT, on_device))
    assert rows["reshard_after_forward"] == pytest.approx(seconds(replace(SHORT, reshard_after_forward=True), LONG))
    assert rows["cp_style"] == pytest.approx(seconds(SHORT, replace(LONG, cp_style="allgather")))
    # The optimizer and the copies of parameters run on the device.
    without = rows["cpu_offload"]
    assert without is not None
    assert without < result.seconds
    assert set(rows) == {choice.name for choice in CHOICES} - set(result.absent) | {"levels", "levels and balance"}
    float8 = ("float8 products", "float8 by level", "float8 all-gather")
    assert result.absent == ("chunks, head groups", *float8, "expert parallelism", "loads of experts")


def test_a_choice_that_memory_requires_says_what_it_lacks() -> None:
    peak = estimate_memory(ARGS, LONG, CONFIG, WORLD, device_type="cuda").peak_bytes
    result = found(int(peak / (1 - MEMORY_MARGIN)) + 2**10)
    row = next(row for row in result.rows if row.name == "activations on the host")
    assert row.seconds is None
    assert row.needs.startswith("4K/cp2 needs ")
    assert "does not fit: 4K/cp2" in result.describe("small")


def test_the_table_has_the_share_that_a_choice_removes() -> None:
    result = replace(found(H100.memory_bytes), seconds=60.0)
    row = replace(result.rows[0], seconds=80.0)
    (line,) = [x for x in replace(result, rows=(row,)).describe("x").split("\n") if x.startswith(row.name)]
    assert line.endswith("25.0%")
