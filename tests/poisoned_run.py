"""The ranks of runs in which some samples have no finite loss, or no finite gradient; nothing here checks anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.packing import Plan
from hbp_titan.train import Trainer
from tests.elastic_run import whole_state


def sample_of(plan: Plan, level: int, number: int) -> tuple[int, int]:
    """(iteration, sample) of the first sample of the last dp rank in the level's iteration of that number."""
    iteration = [i for i in range(plan.num_iterations) if plan.level_of_iteration[i] == level][number]
    return iteration, int(plan.iteration(iteration).packs[-1][0])


def train_poisoned(world: World, argv: Sequence[str], poison: str, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Train with the samples at `places` (level, number of its iteration) poisoned: their "loss" or their "gradient".

    poison: "parameter" poisons a number of the first parameter before step 3 instead.
    Returns the iterations, samples and steps that are meant, the state around each step, and the error of the run.
    """
    trainer = Trainer(load_config(list(argv)), world)
    plan = trainer.position.plan
    meant = [sample_of(plan, level, number) for level, number in places]
    poisoned = {sample for _, sample in meant}
    now: list[bool] = [False]

    def spoil(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not now[0]:
            return output
        if poison == "loss":
            return output * math.nan
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    trainer.model.tok_embeddings.register_forward_hook(spoil)
    forward_backward, whole_step = trainer.engine.forward_backward, trainer.train_step
    states = []

    def marked(batch: Any, last: bool = True) -> Tensor:
        now[0] = trainer.sample_log._file is not None and bool(poisoned & set(batch.sample_ids.tolist()))
        loss = forward_backward(batch, last)
        now[0] = False
        return loss

    def step(*args: Any) -> Any:
        if poison == "parameter" and trainer.step == 2 and world.rank == 0:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).to_local()[0, 0] = math.nan  # type: ignore[attr-defined]
        states.append(whole_state(trainer))
        return whole_step(*args)

    trainer.engine.forward_backward = marked  # type: ignore[method-assign]
    trainer.train_step = step  # type: ignore[method-assign]
    error = ""
    try:
        trainer.train()
    except RuntimeError as raised:
        error = str(raised)
    states.append(whole_state(trainer))
    return {
        "meant": meant,
        "steps": [int(plan.step_of_iteration[iteration]) + 1 for iteration, _ in meant],
        "samples": [plan.samples_of(*_iterations(plan, iteration)).tolist() for iteration, _ in meant],
        "packs": [plan.iteration(iteration).packs[-1].tolist() for iteration, _ in meant],
        "states": states,
        "error": error,
        "counted": [trainer.nonfinite.steps, Trainer(load_config(list(argv)), world).nonfinite.steps],
    }


def _iterations(plan: Plan, iteration: int) -> tuple[int, int]:
    step = int(plan.step_of_iteration[iteration])
    return int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
