"""When one rank fails, the job ends within a minute, and the first error is printed once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.programs import run_python
from tests.runs import DEADLINE, torchrun
from tests.tiny_run import write_tiny_run

TRACEBACK = "Traceback (most recent call last)"


def _argv(folder: Path, *more: str) -> list[str]:
    return [*write_tiny_run(folder), "--levels=128:1,512:1", "--checkpoint.enable=false", *more]


def _run(folder: Path, fault: str, *more: str, ranks: int = 2) -> str:
    result = run_python("-m", "tests.faulty_run", fault, *_argv(folder, *more), ranks=ranks)
    assert result.returncode != 0
    return result.stderr


def test_error_is_printed_by_the_rank_that_failed_only(tmp_path: Path) -> None:
    errors = _run(tmp_path, "raises")
    assert errors.count(TRACEBACK) == 1
    assert re.search(r"^rank 1 failed in step 3, .* level \d+/cp1:$", errors, re.MULTILINE)
    assert errors.count("RuntimeError: the third micro-batch went wrong") == 1


def test_user_error_of_every_rank_is_one_line(tmp_path: Path) -> None:
    errors = _run(tmp_path, "raises", "--model.flavor=debug", "--model.hf_path=")
    assert errors.count("error: ") == errors.count("model.tokenizer_path") == 1
    assert TRACEBACK not in errors


@pytest.mark.slow
def test_killed_rank_ends_the_others(tmp_path: Path) -> None:
    # With checkpoints a rank outlives the SIGTERM that torchrun sends it, long enough to report.
    argv = _argv(tmp_path, "--checkpoint.enable=true")
    process = torchrun(argv, "tests.faulty_run", "is killed", ranks=3)
    output = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode != 0
    assert len(re.findall(r"^rank [02] failed in step 3", output, re.MULTILINE)) == 1
    assert output.count(TRACEBACK) == 2  # torchrun prints one of its own
    assert "Signal 9 (SIGKILL)" in output


@pytest.mark.slow
def test_hang_is_reported_with_the_place_of_every_rank_and_ended(tmp_path: Path) -> None:
    errors = _run(tmp_path, "hangs", "--parallelism.train_timeout_seconds=8", ranks=3)
    where = r"in step 3, .*, level \d+/cp1"
    assert errors.count("no progress for") >= 1
    assert re.search(rf"^  ranks 0, 2 {where}: .*(wait|all_gather)\S* from hbp_titan/", errors, re.MULTILINE), errors
    assert re.search(rf"^  rank 1 {where}: _sleep from hbp_titan/engine.py:\d+$", errors, re.MULTILINE), errors
    assert errors.count(TRACEBACK) == 1


def _train_another_order(world: World, argv: list[str]) -> str:
    config = load_config(argv)
    config.packing.seed = world.rank // 2
    with pytest.raises(ValueError, match="plan") as caught:
        Trainer(config, world).train()
    return str(caught.value)


def test_rank_with_another_plan_is_named_before_the_first_step(tmp_path: Path) -> None:
    messages = run_distributed(_train_another_order, 3, _argv(tmp_path))
    assert len(set(messages)) == 1
    assert re.search(r"epoch 0 .* rank 2 ", messages[0])
