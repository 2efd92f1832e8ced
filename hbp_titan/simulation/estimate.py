"""Candidates without a GPU: whether a level fits into memory, and how long its iteration takes.

Owns the decision from a model's configuration and the hardware table alone, so that one can plan before renting: the
depth of checkpointing that memory allows (the least, paper section 3.1), and the form in which selection wants it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
    hardware = hardware.with_attention(config.model.attention_backend)
    return TimeModel(ModelDims.from_args(args), hardware, world_size, sharding(config))


def sharding(config: JobConfig) -> Sharding:
    """How parameters are spread, as the TimeModel wants it."""
    bytes_of = {"float32": 4, "bfloat16": 2, "auto": 2}
    return Sharding(
        dp_replicate=config.parallelism.dp_replicate,
        expert_parallel=config.parallelism.expert_parallel_degree,
        reshard_after_forward=config.parallelism.reshard_after_forward,
        param_bytes=bytes_of[config.training.mixed_precision_param],
        reduce_bytes=bytes_of[config.training.mixed_precision_reduce],
    )


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
    limit = usable_bytes(hardware)
    candidates = []
    for level in levels:

        def peak(at: Level) -> int:
            return estimate_memory(args, at, config, world_size, device_type="cuda").peak_bytes

        level, peak_bytes = least_recomputation(peak, level, args.num_layers, limit)
        candidates.append(Candidate(level, model.level_time(level) if peak_bytes <= limit else None, peak_bytes))
    return candidates


def usable_bytes(hardware: Hardware) -> int:
    """Bytes of a GPU that tensors may take."""
    return int(hardware.memory_bytes * (1 - MEMORY_MARGIN))


def least_recomputation(peak_bytes: Callable[[Level], int], level: Level, depth: int, limit: int) -> tuple[Level, int]:
    """The level with the fewest of `depth` layers checkpointed whose peak is at most `limit`, or all; and its peak.

    A level that names its ac_layers, or does not recompute, stays as it is.
    """

    def peak(layers: int) -> int:
        return peak_bytes(dataclasses.replace(level, ac_layers=layers))

    if level.ac_policy == "none" or level.ac_layers is not None:
        return level, peak_bytes(level)
    found = fewest_layers(peak(depth), peak(0), depth, 0, limit)
    layers = depth if found is None else found
    # Between its two ends the peak is not quite a straight line.
    while layers < depth and peak(layers) > limit:
        layers += 1
    while layers > 0 and peak(layers - 1) <= limit:
        layers -= 1
    return dataclasses.replace(level, ac_layers=layers), peak(layers)
