"""What a rank would hold: parameters, gradients and optimizer state to the byte, activations by estimate.

Owns the count over the sharded model, the table of checkpoint policies of a level, and the cheapest change that makes
a level fit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.config import JobConfig
from hbp_titan.distributed.hardware import Hardware
from hbp_titan.levels.level_time import FloatArray
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.selection.memory_estimate import MemoryEstimate, estimate_memory
from hbp_titan.simulation.cheapest_change import MOST_RANKS, Change, Search, shown
from hbp_titan.simulation.estimate import usable_bytes


@dataclass(frozen=True)
class RankState:
    """What one rank keeps from step to step: elements of parameters, and bytes."""

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def rank_state(model: nn.Module) -> RankState:
    """Of this rank's shards of `model`, which may be on meta.

    Gradients and AdamW's two moments have their parameter's dtype; AdamW also counts its steps, in a float32 for each
    parameter.
    """
    shards = [(_local(parameter), parameter.requires_grad) for parameter in model.parameters()]
    trained = [shard for shard, requires_grad in shards if requires_grad]
    gradient_bytes = sum(shard.nbytes for shard in trained)
    return RankState(
        parameters=sum(shard.numel() for shard, _ in shards),
        parameter_bytes=sum(shard.nbytes for shard, _ in shards),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=2 * gradient_bytes + torch.float32.itemsize * len(trained),
    )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class LevelMemory:
    """Estimates for a level as it is configured, and under each of AC_POLICIES on all layers."""

    level: Level
    configured: MemoryEstimate
    by_policy: dict[str, MemoryEstimate]


def level_memory(config: JobConfig, args: ModelArgs, world_size: int, level: Level) -> LevelMemory:
    """The estimates of one level of `config`."""

    def estimate(level: Level) -> MemoryEstimate:
        return estimate_memory(args, level, config, world_size, device_type="cuda")

    policies = {
        policy: estimate(dataclasses.replace(level, ac_policy=policy, ac_layers=None)) for policy in AC_POLICIES
    }
    configured = policies[level.ac_policy] if level.ac_layers is None else estimate(level)
    return LevelMemory(level, configured, policies)


def cheapest_change(
    config: JobConfig, args: ModelArgs, world_size: int, hardware: Hardware, level: Level, load: FloatArray
) -> str:
    """What to set so that `level` fits, in words. load: a typical pack of the level, as from pack_loads, [4]."""
    search = Search(config, args, world_size, hardware, level, load, usable_bytes(hardware))
    found = search.cheapest()
    if found is not None:
        return _settings(found, config, level)
    more, shorter = search.more_ranks(), search.shorter()
    words = []
    if more is not None:
        words.append(f"use {more.world_size} ranks; {_settings(more, config, level)}")
    if shorter is not None:
        words.append(f"{_settings(shorter, config, level)} (a longer sample falls under data.overlong)")
    return ", or ".join(words) or f"even {MOST_RANKS * world_size} ranks do not hold it: use another GPU"


def _settings(change: Change, config: JobConfig, level: Level) -> str:
    groups = [change.config_settings(config), change.level_settings(level)]
    return "; ".join(f"set {shown(group)}" for group in groups if group) or "with the level as it is"
