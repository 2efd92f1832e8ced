"""When one rank fails, the job is down within a minute, and the first error is told once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[1]
TRACEBACK = "Traceback (most recent call last)"
"""The launcher has one of its own, whatever its ranks say."""


def _run(folder: Path, fault: str, *more: str, num_ranks: int = 3) -> tuple[str, float]:
    """What a run prints in which rank 1 fails, and the seconds from the first step to the end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--rdzv-backend=c10d"]
    argv = [*write_tiny_run(folder), "--levels=128:1,512:1", "--checkpoint.enable=false", *more]
    command = [*launcher, "--rdzv-endpoint=localhost:0", "-m", "tests.faulty_run", fault, *argv]
    started = time.monotonic()
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode != 0
    return result.stdout + result.stderr, time.monotonic() - started


def test_an_error_is_told_by_the_rank_that_has_it_alone(tmp_path: Path) -> None:
    output, _ = _run(tmp_path, "raises", num_ranks=2)
    assert output.count(TRACEBACK) == 2
    assert re.search(r"^rank 1 failed in step 3, iteration 2 of the plan, level 128/cp1:$", output, re.MULTILINE)
    assert output.count("RuntimeError: the third iteration went wrong") == 1


def test_a_rank_that_runs_out_of_memory_is_advised_and_takes_the_others_along(tmp_path: Path) -> None:
    output, seconds = _run(tmp_path, "runs out of memory", num_ranks=2)
    (head, change) = re.findall(r"^error: (.*)$", output, re.MULTILINE)
    assert head.startswith("rank 1: out of memory in training at level 128/cp1 (max_tokens = 128, cp_degree = 1, ")
    assert change.startswith("cheapest change that fits: in the [[levels]] block of max_tokens = 128 set ")
    assert re.search(r"; as overrides: --levels=128:\S*,512:1:ulysses:none \(predicted peak ", change)
    assert output.count(TRACEBACK) == 1
    assert seconds < 200


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_along(tmp_path: Path) -> None:
    # With checkpoints a rank outlives the SIGTERM that torchrun sends it, long enough to speak.
    output, seconds = _run(tmp_path, "is killed", "--checkpoint.enable=true")
    assert len(re.findall(r"^rank [02] failed in step 3", output, re.MULTILINE)) == 1
    assert output.count(TRACEBACK) == 2
    assert "Signal 9 (SIGKILL)" in output
    assert seconds < 200  # with the start of three ranks on a busy machine


@pytest.mark.slow
def test_a_hang_is_told_with_its_collective_and_level_and_ended(tmp_path: Path) -> None:
    output, seconds = _run(tmp_path, "hangs", "--parallelism.train_timeout_seconds=8")
    where = "step 3, iteration 2 of the plan, level 128/cp1"
    assert output.count("nothing has moved for") == 1
    assert re.search(rf"^  ranks 0, 2 in {where}: .*(wait|all_gather)\S* from hbp_titan/", output, re.MULTILINE), output
    assert re.search(rf"^  rank 1 in {where}: _sleep from hbp_titan/engine.py:\d+$", output, re.MULTILINE)
    assert output.count(TRACEBACK) == 2
    assert seconds < 200  # with the start of three ranks on a busy machine


def _train_another_order(world: World, argv: list[str]) -> str:
    config = load_config(argv)
    config.packing.seed = world.rank // 2
    with pytest.raises(ValueError, match="plan") as caught:
        Trainer(config, world).train()
    return str(caught.value)


def test_a_rank_that_plans_another_order_is_named_before_the_first_step(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--levels=128:1,512:1", "--checkpoint.enable=false"]
    messages = run_distributed(_train_another_order, 3, argv)
    assert len(set(messages)) == 1
    assert messages[0].startswith("the plan of epoch 0 is not the same on all ranks: rank 0 and rank 2 differ;")


def test_a_mistake_that_every_rank_meets_is_one_line(tmp_path: Path) -> None:
    # By torchrun, which keeps the ranks' store: one that a rank keeps is gone with the first rank that ends.
    output, _ = _run(tmp_path, "raises", "--model.flavor=debug", "--model.hf_path=", num_ranks=2)
    assert output.count("error: model.tokenizer_path and model.hf_path are empty") == 1
    assert output.count(TRACEBACK) == 1
