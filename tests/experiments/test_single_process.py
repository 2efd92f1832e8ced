"""One process that emulates several ranks: the same steps, packs, token weights and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp_titan.components.loss import NORMALIZERS
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.experiments.study.single_process import SingleProcessTrainer, single_process_plan
from hbp_titan.packing import Level, build_plan
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run


def test_step_has_the_packs_of_all_ranks() -> None:
    # Two ranks, two steps: a micro-batch of two short packs, and one of a long pack that both ranks share.
    plan = build_plan([4, 2, 2, 8], [Level(4), Level(8, 2)], world_size=2)
    single = single_process_plan(plan)
    assert (single.world_size, single.levels) == (1, (Level(4), Level(8)))
    # Steps are in random order.
    steps = [[single.pack(i, 0).tolist() for i in range(*single.step_offsets[s : s + 2])] for s in range(2)]
    long, short = sorted(steps, key=len)
    assert long == [[3]]
    assert sorted(map(sorted, short)) == [[0], [1, 2]]


def test_empty_packs_are_dropped() -> None:
    # Three long samples on two ranks: one pack of the last micro-batch is empty.
    plan = build_plan([8, 8, 8], [Level(8)], world_size=2, global_batch_tokens=1)
    assert plan.packs.counts.tolist().count(0) == 1
    single = single_process_plan(plan)
    assert sorted(single.packs.ids.tolist()) == [0, 1, 2]
    assert single.packs.counts.tolist() == [1, 1, 1]
    assert single.num_steps == plan.num_steps == 2
    np.testing.assert_array_equal(single.step_loss_tokens, plan.step_loss_tokens)


@pytest.mark.parametrize("method", ["hbp", "isf"])
def test_token_weights_equal_those_of_ranks(method: str) -> None:
    lengths = np.random.default_rng(0).integers(2, 120, 300)
    levels = [Level(32), Level(128, 2)]
    plan = build_plan(lengths, levels, 4, method=method, global_batch_tokens=600, loss_tokens=lengths // 2)
    single = single_process_plan(plan)
    np.testing.assert_array_equal(single.step_loss_tokens, plan.step_loss_tokens)
    for name, normalizer in NORMALIZERS.items():
        ranks = [normalizer(plan, i, pack) for i in range(plan.num_iterations) for pack in plan.iteration(i).packs]
        own = [normalizer(single, i, single.pack(i, 0)) for i in range(single.num_iterations)]
        np.testing.assert_array_equal(np.concatenate(own), np.concatenate(ranks), err_msg=name)


def _losses(world: World, argv: list[str], ranks: int) -> list[float]:
    config = load_config(argv)
    config.job.dump_folder += f"-{world.size}-{world.rank}"
    trainer = Trainer(config, world) if world.size > 1 else SingleProcessTrainer(config, world, ranks)
    trainer.is_log_rank = False
    trainer._check_trained_samples = lambda write: None  # type: ignore[method-assign]
    losses = []
    step = trainer.train_step

    def recording(*args: Any) -> Any:
        record = step(*args)
        losses.append(record())
        return record

    trainer.train_step = recording  # type: ignore[method-assign]
    trainer.train()
    return [record["loss"] for record in losses]


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["ave_token", "token_mean"])
def test_losses_equal_those_of_ranks(tmp_path: Path, normalizer: str) -> None:
    argv = write_tiny_run(tmp_path, saves=False)
    argv += ["--training.global_batch_tokens=1200", f"--training.loss_normalization={normalizer}"]
    # Adam's sign of a gradient that is nearly zero is rounding noise.
    argv.append("--optimizer.eps=1e-4")
    ranks = run_distributed(_losses, 2, argv, 2)[0]
    (emulated,) = run_distributed(_losses, 1, argv, 2)
    assert len(ranks) >= 4
    assert emulated == pytest.approx(ranks, rel=1e-5)
