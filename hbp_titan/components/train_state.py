"""The tensors of a run by flat names, out of model, optimizer and random generators and back into them.

Owns the names in a checkpoint: model.<parameter>, optimizer.<parameter>.<state>, rng.<rank>.<device>. What is not a
tensor, the optimizer's settings by parameter group, is plain values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

ParamGroups = list[dict[str, Any]]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds of the model, by name: everything but frozen weights."""
    # A tied matrix has two names.
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], ParamGroups]:
    """The live tensors of model and optimizer, sharded as they are; a collective. optimizer: None leaves it out."""
    model_state: dict[str, Any] = get_model_state_dict(model)
    optimizer_state: dict[str, Any] = {"state": {}, "param_groups": []}
    if optimizer is not None:
        optimizer_state = get_optimizer_state_dict(model, optimizer)
    tensors = {f"model.{name}": model_state[name] for name in trained_parameters(model)}
    for name, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return tensors, optimizer_state["param_groups"]


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: dict[str, Tensor], param_groups: ParamGroups
) -> None:
    """Put what `collect` returned, filled from a checkpoint, back to where it belongs; a collective."""
    model_state: dict[str, Any] = {name: tensors[f"model.{name}"] for name in trained_parameters(model)}
    # Only frozen weights are missing: the keys are this model's own.
    options = StateDictOptions(strict=False)
    set_model_state_dict(model, model_state, options=options)
    if optimizer is None:
        return
    states: dict[str, Any] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(parameter, {})[key] = value
    groups: list[Any] = [_group(values) for values in param_groups]
    set_optimizer_state_dict(model, optimizer, {"state": states, "param_groups": groups}, options=options)


def _group(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no tuples: betas is one.
    return {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in values.items()}


def rng_state() -> dict[str, Tensor]:
    """The random state of this rank, by the names of a checkpoint."""
    state = {f"rng.{dist.get_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(tensors: dict[str, Tensor]) -> None:
    """Set what `tensors` has of this rank's random state."""
    for name, value in tensors.items():
        if name == f"rng.{dist.get_rank()}.cpu":
            torch.set_rng_state(value)
        elif name == f"rng.{dist.get_rank()}.cuda":
            torch.cuda.set_rng_state(value)
