"""What a rank would hold: parameters, gradients and optimizer state to the byte, activations by estimate.

Owns the count over the sharded model, the table of checkpoint policies of a level, and the cheapest change that makes
a level fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.expert_parallel import check_experts
from hbp_titan.distributed.hardware import Hardware
from hbp_titan.levels.level_time import FloatArray
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.level import AC_POLICIES
from hbp_titan.selection.memory_estimate import MemoryEstimate, estimate_memory
from hbp_titan.simulation.estimate import MEMORY_MARGIN, estimate_candidates

# Up to so many times the ranks are tried where no other change helps.
MOST_RANKS = 64


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


def usable_bytes(hardware: Hardware) -> int:
    """Bytes of a GPU that tensors may take."""
    return int(hardware.memory_bytes * (1 - MEMORY_MARGIN))


def cheapest_change(
    config: JobConfig, args: ModelArgs, world_size: int, hardware: Hardware, level: Level, load: FloatArray
) -> str:
    """What to set so that `level` fits: of the first kind of change that helps at all, the fastest.

    The kinds, from the cheapest: checkpointing; experts spread over more ranks; one copy of the parameters instead of
    several; a higher cp degree; more ranks. load: a typical pack of the level, as from pack_loads, [4].
    """
    for text, changed, ranks, levels in _changes(config, args, world_size, level):
        candidates = estimate_candidates(args, changed, hardware, ranks, levels)
        fitting = [(float(c.time.seconds(load)), c.level) for c in candidates if c.time is not None]
        if fitting:
            return text + _settings(min(fitting, key=lambda pair: pair[0])[1], level)
    return f"even {MOST_RANKS * world_size} ranks do not hold it: lower its max_tokens, or use another GPU"


def _changes(
    config: JobConfig, args: ModelArgs, world_size: int, level: Level
) -> Iterator[tuple[str, JobConfig, int, list[Level]]]:
    """Changes from the cheapest: in words, the configuration, the ranks, and the levels to choose from."""
    same = _policies(level)
    yield "", config, world_size, same
    yield from _more_expert_parallel(config, args, world_size, same)
    one_copy = _with_parallelism(config, dp_replicate=1)
    if config.parallelism.dp_replicate > 1:
        yield "set parallelism.dp_replicate = 1; ", one_copy, world_size, same
    cp_degree = 2 * level.cp_degree
    while world_size % cp_degree == 0 and level.max_tokens % cp_degree == 0:
        yield "", one_copy, world_size, _policies(_with_cp(level, cp_degree, args))
        cp_degree *= 2
    factor = 2
    while factor <= MOST_RANKS:
        yield f"use {factor * world_size} ranks; ", one_copy, factor * world_size, same
        factor *= 2


def _more_expert_parallel(
    config: JobConfig, args: ModelArgs, world_size: int, levels: list[Level]
) -> Iterator[tuple[str, JobConfig, int, list[Level]]]:
    degree, shards = config.parallelism.expert_parallel_degree, world_size // config.parallelism.dp_replicate
    while args.moe is not None and 2 * degree <= min(shards, args.moe.n_routed_experts):
        degree *= 2
        try:
            check_experts(args, degree, shards)
        except ValueError:
            continue
        changed = _with_parallelism(config, expert_parallel_degree=degree)
        yield f"set parallelism.expert_parallel_degree = {degree}; ", changed, world_size, levels


def _with_parallelism(config: JobConfig, **changes: int) -> JobConfig:
    return dataclasses.replace(config, parallelism=dataclasses.replace(config.parallelism, **changes))  # type: ignore[arg-type]


def _policies(level: Level) -> list[Level]:
    return [dataclasses.replace(level, ac_policy=policy, ac_layers=None) for policy in AC_POLICIES]


def _with_cp(level: Level, cp_degree: int, args: ModelArgs) -> Level:
    """The level at another cp degree, as "hybrid" where the heads do not allow its style."""
    changed = dataclasses.replace(level, cp_degree=cp_degree)
    try:
        check_heads([changed], args.num_heads, args.num_kv_heads)
    except ValueError:
        return dataclasses.replace(changed, cp_style="hybrid")
    return changed


def _settings(level: Level, before: Level) -> str:
    """The keys in which `level` differs, as they stand in its [[levels]] block."""
    names: Sequence[str] = ("cp_degree", "cp_style", "ac_policy", "ac_layers")
    changed = [(name, getattr(level, name)) for name in names if getattr(level, name) != getattr(before, name)]
    words = [f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}" for name, value in changed]
    return f"set {', '.join(words)}" if words else "with the level as it is"
