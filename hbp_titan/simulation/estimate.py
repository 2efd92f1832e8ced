"""Candidates without a GPU: whether a level fits into memory, and how long its iteration takes.

Owns the decision from a model's configuration and the hardware table alone, so that one can plan before renting: the
depth of checkpointing that memory allows (the least, paper section 3.1), and the form in which selection wants it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hbp_titan.config import JobConfig
from hbp_titan.distributed.hardware import Hardware
from hbp_titan.levels.candidate import Candidate
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.selection.memory_estimate import estimate_memory, fewest_layers
from hbp_titan.simulation.model_dims import ModelDims
from hbp_titan.simulation.time_parts import Sharding, TimeModel

# What the CUDA context, NCCL's buffers and fragmentation take of the memory.
MEMORY_MARGIN = 0.05


def time_model(args: ModelArgs, config: JobConfig, hardware: Hardware, world_size: int) -> TimeModel:
    """The TimeModel of a run of this configuration."""
    bytes_of = {"float32": 4, "bfloat16": 2, "auto": 2}
    sharding = Sharding(
        dp_replicate=config.parallelism.dp_replicate,
        expert_parallel=config.parallelism.expert_parallel_degree,
        reshard_after_forward=config.parallelism.reshard_after_forward,
        param_bytes=bytes_of[config.training.mixed_precision_param],
        reduce_bytes=bytes_of[config.training.mixed_precision_reduce],
    )
    return TimeModel(ModelDims.from_args(args), hardware, world_size, sharding)


def estimate_candidates(
    args: ModelArgs,
    config: JobConfig,
    hardware: Hardware,
    world_size: int,
    levels: Sequence[Level],
    fixed_seconds: float = 0.0,
) -> list[Candidate]:
    """A candidate for each of `levels`, in their order.

    Where a level leaves ac_layers open (None) under a policy that recomputes, it gets the fewest layers that fit. A
    level that does not fit has time None and the peak that it would need. fixed_seconds: of each iteration.
    """
    model = dataclasses.replace(time_model(args, config, hardware, world_size), fixed_seconds=fixed_seconds)
    limit = int(hardware.memory_bytes * (1 - MEMORY_MARGIN))
    candidates = []
    for level in levels:
        level, peak = _least_recomputation(args, config, world_size, level, limit)
        candidates.append(Candidate(level, model.level_time(level) if peak <= limit else None, peak))
    return candidates


def _least_recomputation(
    args: ModelArgs, config: JobConfig, world_size: int, level: Level, limit: int
) -> tuple[Level, int]:
    """The level with the fewest checkpointed layers whose peak is at most `limit`, or all of them; and its peak."""

    def peak(layers: int | None) -> int:
        at_depth = dataclasses.replace(level, ac_layers=layers)
        return estimate_memory(args, at_depth, config, world_size, device_type="cuda").peak_bytes

    if level.ac_policy == "none" or level.ac_layers is not None:
        return level, peak(level.ac_layers)
    depth = args.num_layers
    layers = fewest_layers(peak(depth), peak(0), depth, 0, limit)
    layers = depth if layers is None else layers
    # Between its two ends the peak is not quite a straight line.
    while layers < depth and peak(layers) > limit:
        layers += 1
    return dataclasses.replace(level, ac_layers=layers), peak(layers)
