"""Out of memory in training, validation and the update: one message with the level and the change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 64.00 KiB."


def _run_out_of_memory(world: World, argv: list[str]) -> list[str]:
    """Return the errors when the second level's warm-up, validation and the optimizer step run out of memory."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    def in_training(trainer: Trainer) -> None:
        trainer.model.layers[0].register_forward_pre_hook(
            lambda *_: fail() if trainer.engine.runtime.active == 1 else None
        )

    def in_validation(trainer: Trainer) -> None:
        trainer.model.layers[0].register_forward_pre_hook(lambda *_: None if torch.is_grad_enabled() else fail())

    def in_update(trainer: Trainer) -> None:
        trainer.optimizer.step = fail  # type: ignore[method-assign, assignment]

    messages = []
    for fault in (in_training, in_validation, in_update):
        trainer = Trainer(load_config(argv), world)
        fault(trainer)
        with pytest.raises(UserError) as caught, trainer.oom_advice:
            trainer.train()
        messages.append(str(caught.value))
    return messages


def test_out_of_memory_names_the_level_and_the_change_that_fits(tmp_path: Path) -> None:
    validation = ["--validation.enable=true", f"--data.validation_files={tmp_path / 'train.jsonl'}"]
    argv = [*write_tiny_run(tmp_path), "--checkpoint.enable=false", *validation]
    for rank, messages in enumerate(run_distributed(_run_out_of_memory, 2, argv)):
        training, evaluating, update = messages
        assert training.startswith(f"rank {rank}: out of memory in training at level 512/cp2 ")
        assert "max_tokens = 512" in training
        assert "ac_policy = " in training
        assert evaluating.startswith(f"rank {rank}: out of memory in validation at level 512/cp2 ")
        assert "validation.enable = false" in evaluating
        assert update.startswith(f"rank {rank}: out of memory in the optimizer step")
        assert "changing levels will not help" in update
    # The warm-up runs the largest level first, and no step was done.
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
