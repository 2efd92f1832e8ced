"""Memory plans of a level: checkpointing, host memory, chunks and groups of heads, in stages of increasing time.

Owns which plans a selection and an advice try, with how many layers, and whether an estimate fits a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from hbp_titan.components.oom import device_memory
from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.distributed.world import World, ranks_per_node
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory, fewest_layers, with_policy
from hbp_titan.utils import human_bytes

CHUNK_TOKENS = 8192
"""Tokens of a chunk: enough for full speed of the matrix products, and a few hundred MiB of an 8B model's tensors."""
HEAD_GROUPS = 4
MEMORY_MARGIN = 0.05
"""Share of a GPU's memory for the CUDA context, NCCL's buffers and fragmentation."""
HOST_MARGIN = 0.1
"""Share of a node's memory for the processes, the data loaders and the page cache."""

# In a stage, plans that recompute less come first. Chunks recompute everything outside of attention, so "none" would
# keep the same as "keep_attention".
_STAGES: tuple[tuple[tuple[str, ...], bool, bool], ...] = (
    (("none", "full", "keep_attention"), False, False),
    (("offload", "offload_attention"), False, False),
    (("full", "keep_attention", "offload", "offload_attention"), True, False),
    (("full", "keep_attention", "offload", "offload_attention"), True, True),
)


def memory_plans(form: Level, args: ModelArgs) -> list[list[Level]]:
    """Return the plans of `form` in stages: on the device; in host memory; in chunks; also in groups of heads.

    form: its own plan is ignored; reshard_after_forward stays.
    """
    grouped = replace(form, attention_head_groups=HEAD_GROUPS)
    try:
        check_heads([grouped], args.num_heads, args.num_kv_heads)
        groups = HEAD_GROUPS
    except ValueError:
        groups = 1
    plain = replace(with_policy(form, "none"), mlp_chunk_tokens=0, attention_head_groups=1)
    stages = []
    for policies, chunked, in_groups in _STAGES:
        if in_groups and groups == 1:
            continue
        base = replace(
            plain,
            mlp_chunk_tokens=CHUNK_TOKENS if chunked else 0,
            attention_head_groups=groups if in_groups else 1,
        )
        stages.append([with_policy(base, policy) for policy in policies])
    return stages


def needed_plans(forms: Sequence[Level], args: ModelArgs, fits: Callable[[Level], bool]) -> list[Level]:
    """Return the plans of each of `forms` that are worth trying, forms in the order given.

    fits: whether a level with all layers checkpointed fits. Host memory is tried where attention would have to be
    recomputed, chunks and groups of heads only where nothing else fits.
    """
    found: list[Level] = []
    for form in dict.fromkeys(with_policy(form, "none") for form in forms):
        fitting: list[Level] = []
        for number, stage in enumerate(memory_plans(form, args)):
            found += stage
            fitting += [level for level in stage if fits(level)]
            if any(not level.recomputes_attention for level in fitting) or (fitting and number):
                break
    return found


def depth_choices(
    peak_bytes: Callable[[Level], int], level: Level, depth: int, limit: int
) -> Iterator[tuple[Level, int]]:
    """Yield `level` with the numbers of layers that may be the fastest to fit into `limit` bytes, each with its peak.

    The fewest layers checkpointed; for host memory also all of them checkpointed and as few as possible kept there. A
    level that sets ac_layers is unchanged.
    """
    yield least_recomputation(peak_bytes, level, depth, limit)
    if level.offloads and level.ac_layers is None:
        yield fewest_offloaded(peak_bytes, replace(level, ac_layers=depth), limit)


def fewest_offloaded(peak_bytes: Callable[[Level], int], level: Level, limit: int) -> tuple[Level, int]:
    """Return the level with the fewest of its ac_layers in host memory that fits into `limit`, or all; and its peak."""
    assert level.ac_layers is not None

    def at(layers: int) -> Level:
        return replace(level, offload_layers=None if layers == level.ac_layers else layers)

    low, high = 0, level.ac_layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if peak_bytes(at(middle)) <= limit else (middle + 1, high)
    return at(high), peak_bytes(at(high))


def least_recomputation(peak_bytes: Callable[[Level], int], level: Level, depth: int, limit: int) -> tuple[Level, int]:
    """Return the level with the fewest of `depth` layers checkpointed that fits into `limit`, or all; and its peak.

    Then with the fewest in host memory. A level that sets ac_layers, or does not recompute, is unchanged.
    """

    def peak(layers: int) -> int:
        return peak_bytes(replace(level, ac_layers=layers))

    if level.ac_policy == "none" or level.ac_layers is not None:
        return level, peak_bytes(level)
    found = fewest_layers(peak(depth), peak(0), depth, 0, limit)
    layers = depth if found is None else found
    # The peak is not exactly linear in the number of layers.
    while layers < depth and peak(layers) > limit:
        layers += 1
    while layers > 0 and peak(layers - 1) <= limit:
        layers -= 1
    level = replace(level, ac_layers=layers)
    return fewest_offloaded(peak_bytes, level, limit) if level.offloads else (level, peak(layers))


def usable_bytes(hardware: Hardware) -> int:
    """Return the bytes of a GPU that tensors may take."""
    return int(hardware.memory_bytes * (1 - MEMORY_MARGIN))


def usable_host_bytes(hardware: Hardware, world_size: int) -> int:
    """Return the bytes of host memory that the tensors of a rank may take."""
    return int(hardware.host_memory_bytes * (1 - HOST_MARGIN)) // min(world_size, hardware.gpus_per_node)


def check_host_memory(config: JobConfig, args: ModelArgs, world: World) -> None:
    """Raise ValueError if the run keeps more in host memory than this machine has."""
    on_device = not config.parallelism.cpu_offload and not any(level.offloads for level in config.levels)
    if on_device or world.device.type == "cpu" or args.hf_config is not None:
        return
    estimates = (estimate_memory(args, k, config, world.size, device_type=world.device.type) for k in config.levels)
    needed = max(estimate.host_bytes for estimate in estimates)
    share = device_memory(torch.device("cpu"), ranks_per_node(world.size))
    if needed > share:
        raise ValueError(
            f"activations, parameters and optimizer state in host memory need {human_bytes(needed)} per rank by the "
            f"estimate, but this machine has {human_bytes(share)} for each; lower levels.offload_layers or "
            "levels.max_tokens, unset parallelism.cpu_offload, or use more nodes"
        )


def fits_hardware(estimate: MemoryEstimate, hardware: Hardware, world_size: int) -> bool:
    """Return whether `estimate` fits in a GPU and in its share of the node's memory."""
    fits_host = estimate.host_bytes <= usable_host_bytes(hardware, world_size)
    return fits_host and estimate.peak_bytes <= usable_bytes(hardware)
