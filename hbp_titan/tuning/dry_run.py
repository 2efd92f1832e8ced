"""One dry run: the checks and the build of a start, and what is known of it before a GPU is.

Owns the order of things. Raises what a start would raise, as ValueError or OSError of one line.

What a rank would hold: parameters, gradients and optimizer state to the byte, activations by estimate.

Owns the count over the sharded model, the table of checkpoint policies of a level, and the cheapest change that makes
a level fit.

What a dry run prints.

Owns the wording and the tables; the numbers are run.py's.

The samples of a dry run: the user's own where they are on this machine, else synthetic ones.

Owns the choice and how it is told. The user's are prepared as a start prepares them, with every check of it.

Try a configuration for N ranks in one CPU process: no GPU, no weights and no data needed.

    COMM_MODE=fake NGPU=32 CONFIG_FILE=train_configs/X.toml ./run_train.sh [--section.key value]
    python -m hbp_titan.tuning.dry_run --world_size 32 --gpu h100-80gb --job.config_file train_configs/X.toml

Builds the model on the meta device, applies every parallel form under a fake process group, and prints what a rank
would hold, each level's memory by checkpoint policy, and the time of an epoch. A mistake that a start would meet, or a
level that does not fit the GPU's memory, is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hbp_titan.components.metrics import describe_plan
from hbp_titan.components.timing import FloatArray, pack_loads
from hbp_titan.config import JobConfig, help_text, load_config
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.prepare import open_stores
from hbp_titan.distributed.mesh import cross_node_warnings
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.distributed.world import fake_world
from hbp_titan.engine import parallelized_on_meta
from hbp_titan.errors import UserError, exit_on_user_error
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import AC_POLICIES, level_name
from hbp_titan.preflight import check, check_vocabulary, cost_model, max_sample_tokens, model_args
from hbp_titan.tuning.hardware import HARDWARE, Hardware, get_hardware
from hbp_titan.tuning.memory import MemoryEstimate, estimate_memory
from hbp_titan.tuning.oom_advice import MOST_RANKS, Change, Search, shown
from hbp_titan.tuning.search import duration
from hbp_titan.tuning.simulate import Replay, replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import time_model, usable_bytes


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
        words.append(f"{_settings(shorter, config, level)} (a longer sample falls under data.max_length_policy)")
    return ", or ".join(words) or f"even {MOST_RANKS * world_size} ranks do not hold it: use another GPU"


def _settings(change: Change, config: JobConfig, level: Level) -> str:
    groups = [change.config_settings(config), change.level_settings(level)]
    return "; ".join(f"set {shown(group)}" for group in groups if group) or "with the level as it is"


# As many as the paper's mixture has.
SYNTHETIC_SAMPLES = 941_344


@dataclass(frozen=True)
class Samples:
    """lengths, loss_tokens: int64 [num_samples]; origin: what they are, in words."""

    lengths: NDArray[np.int64]
    loss_tokens: NDArray[np.int64]
    origin: str


def samples_of(config: JobConfig, args: ModelArgs) -> Samples:
    """The training samples of `config`; synthetic ones where none of its sources is on this machine.

    Raises what a start would raise for these data, their tokenizer, and held-out data.
    """
    paths = [*config.data.train_files, *(source.path for source in config.data.sources)]
    if any(Path(path).expanduser().exists() for path in paths):
        store = open_stores(config, max_sample_tokens(config, args))[0]
        check_vocabulary(config, args, store.meta["vocab_size"])
        return Samples(store.lengths, store.loss_tokens, f"your data: {len(store):,} samples")
    if _names_tokenizer(config):
        check_vocabulary(config, args, ChatTokenizer(config.tokenizer_path).vocab_size)
    return _synthetic(max_sample_tokens(config, args), paths[0])


def _names_tokenizer(config: JobConfig) -> bool:
    """Whether a tokenizer is named that should be there: that of the embedded corpus is made with the corpus."""
    if not (config.model.tokenizer_path or config.model.hf_path):
        return False
    return not config.data.embedded or config.tokenizer_path.exists()


def _synthetic(limit: int, missing: str) -> Samples:
    lengths = tulu3_longcite_like(SYNTHETIC_SAMPLES)
    kept = lengths[lengths <= limit]
    left_out = f", {len(lengths) - len(kept):,} above {limit:,} tokens left out" if len(kept) < len(lengths) else ""
    return Samples(
        kept,
        kept - 1,
        f"SYNTHETIC data, because {missing} is not here: {len(kept):,} lengths like Tulu3 with LongCite{left_out}, all "
        "tokens but the first trained",
    )


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
        """Raise UserError, a line for each level that does not fit, with the cheapest change that would make it fit."""
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
            raise UserError(lines)

    def _typical_load(self, level: int) -> FloatArray:
        """The mean of the level's packs as pack_loads has them; of all packs where the level has none."""
        loads, own = pack_loads(self.plan), self.plan.pack_levels == level
        return loads[own if own.any() else slice(None)].mean(axis=0)


def dry_run(config: JobConfig, world_size: int, hardware: Hardware) -> DryRun:
    """Try `config` for `world_size` ranks with a GPU of this kind each; takes no GPU and allocates no model."""
    if config.measures_levels:
        raise ValueError(
            "packing.auto_levels = true measures at the start: name [[levels]] blocks, which scripts/select_levels.py "
            "--estimate chooses without a GPU"
        )
    gpu = torch.device("cuda")
    args = model_args(config)
    check(config, world_size, gpu, args)
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
        *_long_curriculum(plans.plan_for(0)),
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
        plan=plans.plan_for(0),
        replay=replay(plans.plan_for(0), time_model(args, config, hardware, world_size)),
        total_steps=plans.total_steps(),
    )


def _crossed_nodes(config: JobConfig, world_size: int, hardware: Hardware) -> list[str]:
    node = min(world_size, hardware.gpus_per_node)
    return cross_node_warnings(config.levels, config.parallelism.expert_parallel_degree, node)


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


def describe(found: DryRun) -> str:
    """Model and state of a rank, plan, memory by level and policy, time by level; for 100 columns."""
    parts = [_model(found), describe_plan(found.plan, found.total_steps, found.config)]
    return "\n\n".join([*parts, _memory(found), _time(found), *_needs(found)])


def _model(found: DryRun) -> str:
    config, state = found.config, found.rank_state
    copies = config.parallelism.dp_replicate
    experts = config.parallelism.expert_parallel_degree
    spread = f"{found.world_size // copies} ranks" + (f", {copies} copies" if copies > 1 else "")
    spread += f", experts over {experts}" if experts > 1 else ""
    computed = str(compute_dtype(config, torch.device("cuda"))).removeprefix("torch.")
    lines = [
        f"dry run: {found.world_size} x {found.hardware.name}, {found.hardware.gpus_per_node} a node; nothing is "
        "allocated, memory and time are estimates",
        f"model: {found.args.name}, {found.num_params:,} parameters, {config.training.dtype}, computed in {computed}",
        f"FSDP over {spread}: a rank has {state.parameters:,} parameters: {_size(state.parameter_bytes)}, gradients "
        f"{_size(state.gradient_bytes)}, AdamW {_size(state.optimizer_bytes)}, together "
        f"{_size(state.total_bytes)}",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in found.warnings)])


def _memory(found: DryRun) -> str:
    total, usable = found.hardware.memory_bytes, usable_bytes(found.hardware)
    lines = [
        f"memory of a rank, GiB: {_gib(usable)} of {_gib(total)} to use; activations are those of all layers",
        f"{'level':<12}{'checkpointing':<26}{'activations':>12}{'buffers':>10}{'peak':>10}  verdict",
    ]
    for memory in found.levels:
        lines += [_memory_line(found, memory, policy, memory.by_policy[policy]) for policy in memory.by_policy]
        lines.append(_memory_line(found, memory, _configured(memory), memory.configured))
    return "\n".join(lines)


def _configured(memory: LevelMemory) -> str:
    level = memory.level
    layers = "" if level.ac_policy == "none" or level.ac_layers is None else f" ({level.ac_layers} layers)"
    return f"> {level.ac_policy}{layers}"


def _memory_line(found: DryRun, memory: LevelMemory, policy: str, estimate: MemoryEstimate) -> str:
    peak = found.peak_bytes(estimate)
    free = usable_bytes(found.hardware) - peak
    verdict = f"{_gib(free)} free" if free >= 0 else f"does not fit, by {_gib(-free)}"
    return (
        f"{level_name(memory.level):<12}{policy:<26}{_gib(estimate.saved_bytes):>12}"
        f"{_gib(estimate.transient_bytes):>10}{_gib(peak):>10}  {verdict}"
    )


def _time(found: DryRun) -> str:
    plan, whole = found.plan, found.replay
    lines = [
        f"first epoch, on {found.samples.origin}",
        f"{'level':<12}{'iterations':>12}{'steps':>8}{'tokens':>16}{'s/iteration':>13}{'waiting':>9}{'time':>12}",
    ]
    for index, (level, row) in enumerate(zip(plan.levels, whole.per_level, strict=True)):
        steps = len(np.unique(plan.step_of_iteration[plan.level_of_iteration == index]))
        if row is None:
            lines.append(f"{level_name(level):<12}{0:>12}")
            continue
        lines.append(
            f"{level_name(level):<12}{row.iterations:>12,}{steps:>8,}{row.tokens:>16,}"
            f"{row.seconds / row.iterations:>13.3g}{row.idle / row.seconds:>9.2%}{duration(row.seconds):>12}"
        )
    mean = dataclasses.replace(whole, steps=0.0).seconds / whole.iterations
    lines.append(
        f"{'all':<12}{whole.iterations:>12,}{plan.num_steps:>8,}{whole.tokens:>16,}{mean:>13.3g}"
        f"{whole.idle / whole.seconds:>9.2%}{duration(whole.seconds):>12}"
    )
    lines.append(
        f"with {whole.steps:.3g} s of optimizer steps; {whole.gpu_days:.3g} GPU days; "
        f"{whole.tokens / whole.seconds / found.world_size:,.0f} tokens/s a GPU"
    )
    return "\n".join(lines)


def _needs(found: DryRun) -> list[str]:
    """What a start asks for, or does, that the configuration leaves open."""
    lines = []
    if not (found.config.model.hf_path or found.config.model.tokenizer_path):
        lines.append("a start needs a tokenizer: --model.hf_path DIR, or --model.tokenizer_path DIR")
    if not found.config.checkpoint.initial_load_path:
        lines.append("a start makes new weights: --checkpoint.initial_load_path DIR names those of a model")
    return ["\n".join(lines)] if lines else []


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _size(num_bytes: float) -> str:
    return f"{_gib(num_bytes)} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


DEFAULT_GPU = "h100-80gb"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hbp_titan.tuning.dry_run",
        description=__doc__,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, required=True, help="ranks of the run")
    parser.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(HARDWARE)} [{DEFAULT_GPU}]")
    options, overrides = parser.parse_known_args(argv)
    found = dry_run(load_config(overrides), options.world_size, get_hardware(options.gpu))
    print(describe(found), flush=True)
    found.check_memory()


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
