"""What a run says when memory does not suffice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hbp_titan.cli import Mistakes
from hbp_titan.config import load_config
from hbp_titan.distributed.local_ranks import run_distributed
from hbp_titan.distributed.world import World
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run


def _run_out_of_memory_at_the_second_level(world: World, argv: list[str]) -> str:
    trainer = Trainer(load_config(argv), world)

    def full(*inputs: Any) -> None:
        if trainer.engine.runtime.active == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 KiB.")

    trainer.model.layers[0].register_forward_pre_hook(lambda module, inputs: full(*inputs))
    with pytest.raises(Mistakes) as caught, trainer.memory:
        trainer.train()
    return str(caught.value)


def test_out_of_memory_names_the_level_and_the_mend_before_the_first_step(tmp_path: Path) -> None:
    argv = [*write_tiny_run(tmp_path), "--checkpoint.enable=false"]
    for rank, message in enumerate(run_distributed(_run_out_of_memory_at_the_second_level, 2, argv)):
        head = f"rank {rank}: out of memory in training at level 512/cp2 (max_tokens = 512, cp_degree = 2, ac_policy = "
        assert message.startswith(f'{head}"none"): 64.0 KiB more did not fit')
        assert "in the [[levels]] block of max_tokens = 512 set ac_policy = " in message
    # The start-up probe runs the largest level first: no step was made.
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
