"""One dry run: the checks and the build of a start, and what is known of it before a GPU is.

Owns the order of things. Raises what a start would raise, as ValueError or OSError of one line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hbp_titan.cli import Mistakes
from hbp_titan.config import JobConfig
from hbp_titan.data.planning import EpochPlans
from hbp_titan.distributed.hardware import Hardware
from hbp_titan.distributed.mesh import crossed_nodes
from hbp_titan.distributed.world import fake_world
from hbp_titan.dry_run.memory import LevelMemory, RankState, cheapest_change, level_memory, rank_state
from hbp_titan.dry_run.samples import Samples, samples_of
from hbp_titan.levels.engine import parallelized_on_meta
from hbp_titan.levels.level_time import FloatArray, pack_loads
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Plan
from hbp_titan.packing.level import level_name
from hbp_titan.preflight import check_without_data, cost_model, model_args
from hbp_titan.selection.memory_estimate import MemoryEstimate
from hbp_titan.simulation.estimate import time_model, usable_bytes
from hbp_titan.simulation.simulate import Replay, replay

# Shards above this share of an even one are told: rounding alone makes less.
MOST_UNEVEN = 1.1


@dataclass(frozen=True)
class DryRun:
    """What was found.

    rank_state: of rank 0, which holds the most. warnings: what a start puts up with, but is no good idea. plan,
    replay: the first epoch and its estimated time; total_steps: of all epochs.
    """

    config: JobConfig
    args: ModelArgs
    world_size: int
    hardware: Hardware
    num_params: int
    rank_state: RankState
    levels: tuple[LevelMemory, ...]
    warnings: list[str]
    samples: Samples
    plan: Plan
    replay: Replay
    total_steps: int

    def peak_bytes(self, estimate: MemoryEstimate) -> int:
        """The most that a rank holds in an iteration: its state to the byte, the rest as estimated."""
        return self.rank_state.total_bytes + estimate.saved_bytes + estimate.transient_bytes

    def fits(self, estimate: MemoryEstimate) -> bool:
        """Whether the GPU's memory suffices."""
        return self.peak_bytes(estimate) <= usable_bytes(self.hardware)

    def check_memory(self) -> None:
        """Raise Mistakes, a line for each level that does not fit, with the cheapest change that would make it fit."""
        lines = []
        for index, memory in enumerate(self.levels):
            if self.fits(memory.configured):
                continue
            change = cheapest_change(
                self.config, self.args, self.world_size, self.hardware, memory.level, self._typical_load(index)
            )
            lines.append(
                f"level {level_name(memory.level)} needs {self.peak_bytes(memory.configured) / 2**30:.1f} GiB a rank, "
                f"of which {self.rank_state.total_bytes / 2**30:.1f} are parameters, gradients and optimizer state, "
                f"but {self.hardware.name} has {usable_bytes(self.hardware) / 2**30:.1f} to use: {change}"
            )
        if lines:
            raise Mistakes(lines)

    def _typical_load(self, level: int) -> FloatArray:
        """The mean of the level's packs as pack_loads has them; of all packs where the level has none."""
        loads, own = pack_loads(self.plan), self.plan.pack_levels == level
        return loads[own if own.any() else slice(None)].mean(axis=0)


def dry_run(config: JobConfig, world_size: int, hardware: Hardware) -> DryRun:
    """Try `config` for `world_size` ranks with a GPU of this kind each; takes no GPU and allocates no model."""
    if config.selects_levels:
        raise ValueError(
            'packing.levels = "auto" measures at the start: name [[levels]] blocks, which scripts/select_levels.py '
            "--estimate chooses without a GPU"
        )
    gpu = torch.device("cuda")
    args = model_args(config)
    check_without_data(config, world_size, gpu, args)
    samples = samples_of(config, args)
    with fake_world(world_size, gpu) as world:
        model, runtime = parallelized_on_meta(config, args, world, torch.device("cpu"))
        for index in range(len(config.levels)):
            runtime.activate(index)
        state, count = rank_state(model), sum(parameter.numel() for parameter in model.parameters())
    plans = EpochPlans(config, samples, world_size, cost_model(args, frozen=config.lora.rank > 0))
    warnings = [
        *_crossed_nodes(config, world_size, hardware),
        *_uneven_shards(state.parameters, count, world_size // config.parallelism.dp_replicate),
        *_long_curriculum(plans.of(0)),
    ]
    return DryRun(
        config=config,
        args=args,
        world_size=world_size,
        hardware=hardware,
        num_params=count,
        rank_state=state,
        levels=tuple(level_memory(config, args, world_size, level) for level in config.levels),
        warnings=warnings,
        samples=samples,
        plan=plans.of(0),
        replay=replay(plans.of(0), time_model(args, config, hardware, world_size)),
        total_steps=plans.total_steps(),
    )


def _crossed_nodes(config: JobConfig, world_size: int, hardware: Hardware) -> list[str]:
    node = min(world_size, hardware.gpus_per_node)
    return crossed_nodes(config.levels, config.parallelism.expert_parallel_degree, node)


def _uneven_shards(largest: int, num_params: int, shards: int) -> list[str]:
    """FSDP2 deals out whole rows: of tensors with fewer rows than ranks the last ranks have nothing."""
    share = largest * shards / num_params
    if share <= MOST_UNEVEN:
        return []
    return [
        f"rank 0 holds {share:.2f} times an even share: some parameters have too few rows for {shards} ranks; what "
        "FSDP gathers is padded by as much, which the estimated peak does not hold"
    ]


def _long_curriculum(plan: Plan) -> list[str]:
    """A curriculum as long as the lowest level's data leaves nothing to alternate with."""
    lowest = plan.level_of_iteration == plan.level_of_iteration.min()
    steps = plan.step_of_iteration
    if not plan.curriculum_steps or lowest.all() or steps[lowest].max() > steps[~lowest].min():
        return []
    covered = steps[lowest].max() + 1
    return [
        f"packing.curriculum_steps = {plan.curriculum_steps:g} covers all {covered} steps of the lowest level: longer "
        "samples come after all others; lower it"
    ]
