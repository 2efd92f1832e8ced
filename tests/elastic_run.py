"""The ranks of runs that stop and go on with others: apart from their checks, so that a rank imports little.

Owns one stretch of a run, from its start or its newest checkpoint to a given step, and what a rank brings back of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.train import Trainer


class _Killed(Exception):
    pass


def train_until(world: World, argv: Sequence[str], last_step: int | None = None) -> dict[str, Any]:
    """Train up to `last_step`, where the run ends without a word, or to its end.

    Returns the tensors that it started and ended with, whole, the samples that were planned at its start, and more.
    """
    trainer = Trainer(load_config(list(argv)), world)
    started = whole_state(trainer)
    planned = trainer.position.plan.packs.ids.tolist()
    whole_step = trainer.train_step

    def step(*args: Any) -> dict[str, Any]:
        if trainer.step == last_step:
            raise _Killed
        return whole_step(*args)

    trainer.train_step = step  # type: ignore[method-assign]
    with contextlib.suppress(_Killed):
        trainer.train()
    # The save in flight is not what this kill is to cut.
    trainer.checkpointer.wait()
    return {
        "started": started,
        "ended": whole_state(trainer),
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "planned": planned,
        "told": trainer.train_state.resumed,
    }


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Every parameter and every tensor of the optimizer's state by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        found[name] = _whole(parameter)
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = _whole(value)
    return found


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
