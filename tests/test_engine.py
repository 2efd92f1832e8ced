"""What a run says when memory does not suffice."""

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
    """What is told where the second level's first pass, validation and the optimizer's step run out of memory."""

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

    told = []
    for fault in (in_training, in_validation, in_update):
        trainer = Trainer(load_config(argv), world)
        fault(trainer)
        with pytest.raises(UserError) as caught, trainer.oom_advice:
            trainer.train()
        told.append(str(caught.value))
    return told


def test_out_of_memory_names_the_level_or_the_state_and_what_to_set(tmp_path: Path) -> None:
    validation = ["--validation.enable=true", f"--data.validation_files={tmp_path / 'train.jsonl'}"]
    argv = [*write_tiny_run(tmp_path), "--checkpoint.enable=false", *validation]
    for rank, told in enumerate(run_distributed(_run_out_of_memory, 2, argv)):
        training, evaluating, update = told
        level = "at level 512/cp2 (max_tokens = 512, cp_degree = 2, "
        assert training.startswith(f"rank {rank}: out of memory in training {level}")
        assert "in the [[levels]] block of max_tokens = 512 set ac_policy = " in training
        assert evaluating.startswith(f"rank {rank}: out of memory in validation {level}")
        assert "validation.enable = false" in evaluating
        assert update.startswith(f"rank {rank}: out of memory in the optimizer step")
        assert "changing levels will not help" in update
    # The first passes run the largest level first, and no step was done.
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
