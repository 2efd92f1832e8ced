"""Candidates from a configuration alone: what fits, and the least recomputation that makes it fit."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from hbp_titan.job_config import JobConfig
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level
from hbp_titan.tuning.hardware import get_hardware
from hbp_titan.tuning.time_model import estimate_candidates, time_model

ARGS = get_flavor("llama3_1_8b")
H100 = get_hardware("h100-80gb")
LIMIT = int(H100.memory_bytes * 0.95)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB, and 4 GiB for each layer that is not checkpointed: 16 layers fit beside 10 GiB into 75.1 GiB."""

    def estimate_memory(args: Any, level: Level, config: JobConfig, world_size: int, **_: Any) -> SimpleNamespace:
        layers = args.num_layers if level.ac_layers is None else level.ac_layers
        kept = args.num_layers - (0 if level.ac_policy == "none" else layers)
        return SimpleNamespace(peak_bytes=(10 + 4 * kept) * 2**30)

    monkeypatch.setattr("hbp_titan.tuning.time_model.estimate_memory", estimate_memory)


@pytest.mark.usefixtures("memory")
def test_open_depth_becomes_the_fewest_layers_that_fit() -> None:
    levels = [Level(16384, 1, ac_policy="full"), Level(131072, 8, ac_policy="keep_attention")]
    for candidate, level in zip(estimate_candidates(ARGS, JobConfig(), H100, 32, levels), levels, strict=True):
        assert candidate.fits
        assert candidate.level == dataclasses.replace(level, ac_layers=16)
        assert candidate.peak_bytes == 74 * 2**30
        assert candidate.time == time_model(ARGS, JobConfig(), H100, 32).level_time(candidate.level)


@pytest.mark.usefixtures("memory")
def test_a_level_that_is_given_whole_stays_and_may_not_fit() -> None:
    levels = [
        Level(16384),
        Level(32768, 2, ac_policy="full", ac_layers=3),
        Level(131072, 8, ac_policy="full", ac_layers=20),
    ]
    none, three, twenty = estimate_candidates(ARGS, JobConfig(), H100, 32, levels)
    assert [c.level for c in (none, three, twenty)] == levels
    assert (none.fits, three.fits, twenty.fits) == (False, False, True)
    assert none.time is None
    assert none.peak_bytes == 138 * 2**30


@pytest.mark.usefixtures("memory")
def test_where_no_depth_fits_all_layers_are_named_and_what_they_need() -> None:
    tiny = dataclasses.replace(H100, memory_bytes=2**30)
    (candidate,) = estimate_candidates(ARGS, JobConfig(), tiny, 32, [Level(16384, 1, ac_policy="full")])
    assert not candidate.fits
    assert candidate.level.ac_layers == 32
    assert candidate.peak_bytes == 10 * 2**30


def test_the_configuration_decides_traffic() -> None:
    config = JobConfig()
    config.parallelism.reshard_after_forward = False
    config.training.mixed_precision_reduce = "bfloat16"
    sharding = time_model(ARGS, config, H100, 32).sharding
    assert (sharding.reshard_after_forward, sharding.param_bytes, sharding.reduce_bytes) == (False, 2, 2)


def test_the_papers_levels_fit_32_h100_and_one_gpu_does_not_hold_the_model() -> None:
    levels = [Level(16384, 1, ac_policy="full"), Level(131072, 8, ac_policy="full")]
    assert all(c.fits for c in estimate_candidates(ARGS, JobConfig(), H100, 32, levels))
    assert not any(c.fits for c in estimate_candidates(ARGS, JobConfig(), H100, 1, levels[:1]))
