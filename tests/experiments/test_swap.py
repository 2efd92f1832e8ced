"""A swap of levels makes no process group, in a benchmark and in a whole training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from hbp_titan.config import load_config
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World
from hbp_titan.engine import LevelRuntime
from hbp_titan.experiments.bench_swap import SwapCost, measure_swap
from hbp_titan.experiments.bench_train import Documents
from hbp_titan.packing import Level
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning.measured_engine import MeasuredEngine
from tests.tiny_run import ARGS, write_tiny_run

LEVELS = (Level(64), Level(128, cp_degree=2, ac_policy="full"))


def _activate_with_a_new_group(runtime: LevelRuntime, index: int) -> None:
    dist.new_group()
    _ACTIVATE(runtime, index)


_ACTIVATE = LevelRuntime.activate


def _measure_both(world: World) -> list[Any]:
    """What a round runs; the cost of a swap, and of one that makes a group."""
    runs: list[list[int]] = []
    seconds = MeasuredEngine.seconds

    def watched(measured: MeasuredEngine, batches: list[PackedBatch]) -> float | None:
        runs.append([batch.level for batch in batches])
        return seconds(measured, batches)

    MeasuredEngine.seconds = watched  # type: ignore[method-assign]
    found = measure_swap(load_config([]), ARGS, world, LEVELS, Documents(0), iterations=2, repeats=2)
    LevelRuntime.activate = _activate_with_a_new_group  # type: ignore[method-assign]
    broken = measure_swap(load_config([]), ARGS, world, LEVELS, Documents(20), iterations=1, repeats=1)
    return [runs, found, broken]


def test_alternating_levels_are_timed_against_the_same_packs_grouped_and_make_no_group() -> None:
    for runs, found, broken in run_distributed(_measure_both, 2):
        grouped, alternating = [0, 0, 1, 1], [0, 1, 0, 1]
        # Grouped, alternating, grouped again; another is first in each round, the first of which does not count.
        rounds = [runs[number : number + 3] for number in (0, 3, 6)]
        assert rounds == [
            [grouped, alternating, grouped],
            [alternating, grouped, grouped],
            [grouped, grouped, alternating],
        ]
        assert (found.iterations, found.swaps, found.groups_made) == (4, 3, 0)
        assert [len(times) for times in (found.alternating, found.grouped, found.again)] == [2, 2, 2]
        assert all(ratio > 0 for ratio in found.ratios() + found.ratios(control=True))
        # Two rounds, three orders, two iterations.
        assert broken.groups_made == 12


def test_ratios_are_taken_round_by_round() -> None:
    cost = SwapCost(
        alternating=[2.0, 3.3, 1.0],
        grouped=[2.0, 3.0, 2.0],
        again=[2.0, 2.4, 2.0],
        iterations=8,
        swaps=7,
        groups_made=0,
    )
    assert cost.ratios() == pytest.approx([1.0, 1.1, 0.5])
    assert cost.ratios(control=True) == pytest.approx([1.0, 0.8, 1.0])
    assert str(cost) == (
        "8 iterations, 7 swaps when levels alternate, 3 rounds: alternating / grouped 1.000 (0.500-1.100), "
        "grouped / grouped 1.000 (0.800-1.000); groups made 0"
    )


def _groups_during_training(world: World, argv: list[str], broken: bool) -> tuple[int, int, set[int | None]]:
    """Process groups before the first step and after the last, and the levels that were active."""
    if broken:
        LevelRuntime.activate = _activate_with_a_new_group  # type: ignore[method-assign]
    trainer = Trainer(load_config(argv), world)
    before = len(distributed_c10d._world.pg_map)
    levels = set()
    trainer.model.register_forward_pre_hook(lambda *_: levels.add(trainer.engine.runtime.active))
    trainer.train()
    return before, len(distributed_c10d._world.pg_map), levels


@pytest.mark.slow
def test_a_training_run_makes_no_process_group_after_its_start(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--training.epochs=2"]
    for before, after, levels in run_distributed(_groups_during_training, 2, argv, False):
        assert levels == {0, 1}
        assert before == after
    argv.append(f"--job.dump_folder={tmp_path / 'broken'}")
    for before, after, _ in run_distributed(_groups_during_training, 2, argv, True):
        assert after > before
