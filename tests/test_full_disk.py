"""A run whose disk fills up ends on every rank after the same step, with one message; with room it goes on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.components import dcp_storage
from hbp_titan.components.checkpoint import CheckpointError
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.killed_run import train
from tests.tiny_run import write_tiny_run


def _train_until_the_third_save(world: World, argv: list[str]) -> tuple[str, int]:
    """The message and the last step; only rank 1's disk is full."""
    write, calls = dcp_storage.write_safetensors, []

    def fail(*args: Any) -> dict[str, Any]:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    if world.rank == 1:
        dcp_storage.write_safetensors = fail
    trainer = Trainer(load_config(argv), world)
    with pytest.raises(CheckpointError) as caught:
        trainer.train()
    return str(caught.value), trainer.step


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_full_disk_of_one_rank_ends_the_run_on_all_and_the_next_start_goes_on(tmp_path: Path, mode: str) -> None:
    argv = [*write_tiny_run(tmp_path), "--checkpoint.interval=2", f"--checkpoint.async_mode={mode}"]
    folder = tmp_path / "run" / "checkpoint"
    (message, step), other = run_distributed(_train_until_the_third_save, 2, argv)
    assert (message, step) == other
    assert message.startswith(
        f"{folder}/step-6 was not saved: {folder}/step-6.partial: no space for rank-1.safetensors: "
    )
    assert 6 <= step <= 8
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4"]
    assert run_distributed(train, 2, argv)[0][0] == 4
