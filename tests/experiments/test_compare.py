"""The comparison of methods: parsing, measurements, and that runs differ only in their plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.experiments.compare import Outcome, Run, compare, loads_of_ranks, parse_runs, table
from hbp_titan.packing import Level, build_plan
from hbp_titan.testing.local_ranks import run_distributed
from tests.tiny_run import write_tiny_run


def test_runs_print_as_they_are_parsed() -> None:
    text = "isf@8192:2:ulysses:keep_attention;hbp@1024:1,8192:2:allgather:full:3"
    runs = parse_runs(text)
    assert runs[0] == Run("isf", (Level(8192, 2, "ulysses", "keep_attention"),))
    assert runs[1].levels == (Level(1024), Level(8192, 2, "allgather", "full", 3))
    assert ";".join(map(str, runs)) == text
    with pytest.raises(ValueError, match="hpb@8"):
        parse_runs("isf@8;hpb@8")


def test_loads_of_ranks_by_hand() -> None:
    # Ranks 0 and 1 have documents of 4 and of 2 + 2 tokens, or share one of 8.
    plan = build_plan([4, 2, 2, 8], [Level(4), Level(8, 2)], world_size=2)
    loads = loads_of_ranks(plan)
    short, long = (loads[plan.level_of_iteration == k][0].tolist() for k in (0, 1))
    assert sorted(short) == [[1, 2, 8, 2], [1, 3, 16, 1]]
    assert long == [[1, 7, 64, 1], [1, 7, 64, 1]]


def _outcome(run: Run, seconds: float) -> Outcome:
    return Outcome(run, seconds, 1, 100, np.ones(1), np.ones((1, 2, 4)), np.zeros(1), np.array([0.0, 0.1]), 2.0, 3.0)


def test_speed_up_is_relative_to_the_first_run_of_the_round() -> None:
    runs = parse_runs("isf@8;hbp@8")
    # The machine was busier in the second and third round: the ratios are 2, 2 and 2.5.
    seconds = {runs[0]: [4.0, 8.0, 20.0], runs[1]: [2.0, 4.0, 8.0]}
    text = table([_outcome(run, s) for run in runs for s in seconds[run]], runs)
    assert "| isf@8:1 | 8.0 | 1.00 (1.00-1.00) | 12 | 1 | 1 | 0.0% 10.0% | 2.0000 | 3.0000 |" in text
    assert "| hbp@8:1 | 4.0 | 2.00 (2.00-2.50) | 25 |" in text


def _compare(world: World, argv: list[str], runs: str) -> list[str]:
    outcomes = compare(load_config(argv), world, parse_runs(runs), 2)
    return [json.dumps(outcome.as_dict()) for outcome in outcomes]


@pytest.mark.slow
def test_runs_train_the_same_samples_from_the_same_weights(tmp_path: Path) -> None:
    # All samples in one optimizer step, so that methods differ only in rounding.
    argv = [*write_tiny_run(tmp_path), "--training.global_batch_tokens=1000000", "--packing.level_order=interleave"]
    argv += ["--validation.enable=true", f"--data.validation_files={tmp_path / 'train.jsonl'}"]
    first, second = run_distributed(_compare, 2, argv, "isf@512:2;hbp@64:1,512:2:allgather")
    outcomes = [json.loads(text) for text in first]
    assert [o["run"] for o in outcomes] == [
        "isf@512:2:ulysses",
        "hbp@64:1,512:2:allgather",
        "hbp@64:1,512:2:allgather",
        "isf@512:2:ulysses",
    ]
    for o, other in zip(outcomes, map(json.loads, second), strict=True):
        assert o == other
        assert o["steps"] == 1
        assert o["tokens"] == outcomes[0]["tokens"]
        assert o["train_loss"] == pytest.approx(outcomes[0]["train_loss"], rel=1e-5)
        assert o["loss"] == pytest.approx(outcomes[0]["loss"], rel=1e-4)
        assert o["loss"] < o["train_loss"]
        assert 0 < sum(o["iteration_seconds"]) < o["seconds"]
        assert len(o["iteration_seconds"]) == len(o["loads"]) == len(o["level_of_iteration"])
        assert min(o["idle"]) >= 0
