"""A dry run against what two real ranks hold and plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.config import load_config
from hbp_titan.data.loader import PlanDataset
from hbp_titan.distributed.world import World
from hbp_titan.models.hf import args_to_hf_config
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from hbp_titan.tuning.dry_run import dry_run
from hbp_titan.tuning.hardware import get_hardware
from tests.models.deepseek_tiny import tiny_args
from tests.tiny_run import VOCAB_SIZE, write_tiny_run


def _bytes(tensors: list[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _start(world: World, argv: list[str]) -> dict[str, object]:
    """Bytes that this rank holds after one optimizer step, and its plan."""
    trainer = Trainer(load_config(argv), world)
    plan = trainer.plans.plan_for(0)
    trainer.engine.forward_backward(PlanDataset(plan, trainer.store, world.rank, trainer.shapes)[0])
    trainer.optimizer.step()
    parameters = list(trainer.model.parameters())
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": _bytes([value for value in state if isinstance(value, Tensor)]),
        "plan": plan.fingerprint,
        "iterations": plan.num_iterations,
        "steps": plan.num_steps,
        "total_steps": trainer.total_steps,
    }


@pytest.mark.parametrize("experts", [False, True])
def test_dry_run_has_the_bytes_and_the_plan_of_a_real_start(tmp_path: Path, experts: bool) -> None:
    flavor = ["--model.hf_path=", f"--model.tokenizer_path={tmp_path / 'model'}", "--model.flavor=debug"]
    argv = [
        *write_tiny_run(tmp_path),
        *(["--parallelism.expert_parallel_degree=2"] if experts else flavor),
        "--training.global_batch_tokens=600",
        "--training.epochs=2",
        "--checkpoint.enable=false",
    ]
    if experts:
        args = dataclasses.replace(tiny_args(4), vocab_size=VOCAB_SIZE)
        (tmp_path / "model" / "config.json").write_text(json.dumps(args_to_hf_config(args)), encoding="utf-8")
    found = dry_run(load_config(argv), 2, get_hardware("h100-80gb"))
    ranks = run_distributed(_start, 2, argv)
    state = found.rank_state
    assert ranks[0] == {
        "parameters": state.parameter_bytes,
        "gradients": state.gradient_bytes,
        "optimizer": state.optimizer_bytes,
        "plan": found.plan.fingerprint,
        "iterations": found.plan.num_iterations,
        "steps": found.plan.num_steps,
        "total_steps": found.total_steps,
    }
    # Rank 0 holds the most.
    assert ranks[1]["parameters"] <= state.parameter_bytes
    assert found.samples.origin == "your data: 60 samples"
    assert torch.float32.itemsize * state.parameters == state.parameter_bytes
