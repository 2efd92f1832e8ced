"""Dry run: try a configuration for N ranks in one CPU process; no GPU, no weights and no data needed.

    COMM_MODE=fake NGPU=32 CONFIG_FILE=train_configs/X.toml ./run_train.sh [--section.key value]
    python -m hbp_titan.tuning.dry_run --world_size 32 --gpu h100-80gb --job.config_file train_configs/X.toml

Builds the model on the meta device, applies all parallelism under a fake process group, and prints what each rank would
hold, each level's memory by checkpoint policy, and the time of an epoch. Any error that a start would raise, and any
level that does not fit in the GPU's memory, is one line on stderr with exit code 1.
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
from torch import nn
from torch.distributed.tensor import DTensor

from hbp_titan.components.metrics import describe_plan, wrap
from hbp_titan.components.timing import pack_loads
from hbp_titan.config import JobConfig, help_text, load_config
from hbp_titan.data.chat_tokenizer import ChatTokenizer
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.data.files import chat_template_file
from hbp_titan.data.prepare import open_stores
from hbp_titan.distributed.mesh import cross_node_warnings
from hbp_titan.distributed.parallelize import DTYPES, compute_dtype
from hbp_titan.distributed.world import fake_world
from hbp_titan.engine import parallelized_on_meta
from hbp_titan.errors import UserError, exit_on_user_error
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf import MissingWeights
from hbp_titan.packing import CostModel, Level, Plan
from hbp_titan.packing.level import AC_POLICIES, level_name
from hbp_titan.preflight import check, check_vocabulary, cost_model, max_sample_tokens, model_args
from hbp_titan.tuning.hardware import HARDWARE, Hardware, get_hardware
from hbp_titan.tuning.memory import (
    MemoryEstimate,
    estimate_memory,
    optimizer_bytes,
    pinned_bytes,
    pinned_max_round,
    with_policy,
)
from hbp_titan.tuning.memory_plans import usable_bytes, usable_host_bytes
from hbp_titan.tuning.oom_advice import MAX_RANKS_FACTOR, ChangeSearch
from hbp_titan.tuning.parallel_levels import costs_on
from hbp_titan.tuning.simulate import Replay, replay, tulu3_longcite_like
from hbp_titan.tuning.time_model import most_loaded_rank, time_model
from hbp_titan.utils import human_bytes, human_seconds

DEFAULT_GPU = "h100-80gb"
SYNTHETIC_SAMPLES = 941_344
"""As many as the paper's mixture has."""
MAX_UNEVENNESS = 1.1
"""Shards above this multiple of an even share are reported; rounding alone makes less."""


def main(argv: list[str]) -> None:
    """Run the command line."""
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
    # Before the check, so that the report is there to explain its error.
    print(describe(found), flush=True)
    found.check_memory()


def awaits_weights(config: JobConfig) -> bool:
    """Return whether model.hf_path is still to be made from model.weights_package; until then the flavor counts."""
    return bool(config.model.weights_package) and not Path(config.model.hf_path or "").is_dir()


def dry_run(config: JobConfig, world_size: int, hardware: Hardware, samples: Samples | None = None) -> DryRun:
    """Return what a run of `config` on `world_size` such GPUs would be, without a GPU and without allocating the model.

    samples: of an epoch; by default those of the configuration's data, which are prepared for it.
    Raises what a start would raise; missing weights of model.hf_path are a warning.
    """
    if config.measures_levels:
        raise ValueError(
            "packing.auto_levels = true measures levels at the start; use the [[levels]] blocks that "
            "scripts/select_levels.py --estimate selects without a GPU"
        )
    gpu = torch.device("cuda")
    if awaits_weights(config):
        config.model.hf_path = ""
    args = model_args(config)
    # A fake world of GPUs on the CPU: checks and dtypes must be those of a GPU.
    missing = []
    try:
        check(config, world_size, gpu, args)
    except MissingWeights as error:
        # On a machine with only config.json and tokenizer; a folder that was named for its weights must have them.
        if config.checkpoint.initial_load_path:
            raise
        missing = [f"a start needs weights: {error}"]
    samples = samples or samples_of(config, args)
    with fake_world(world_size, gpu) as world:
        model, runtime = parallelized_on_meta(config, args, world, torch.device("cpu"))
        # Every level switch must work, as in a start.
        for index in range(len(config.levels)):
            runtime.activate(index)
        state, count = rank_state(model, config), sum(parameter.numel() for parameter in model.parameters())
    node = min(world_size, hardware.gpus_per_node)
    cost: CostModel | tuple[CostModel, ...] = cost_model(args, frozen=config.lora.rank > 0)
    if config.packing.level_order == "parallel":
        cost = costs_on(hardware, config, args, world_size, samples)
    plans = EpochPlans(config, samples, world_size, cost)
    warnings = [
        *missing,
        *cross_node_warnings(config.levels, config.parallelism.expert_parallel_degree, node),
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
        levels=tuple(
            level_memory(config, args, world_size, level) for level in config.levels if args.hf_config is None
        ),
        warnings=warnings,
        samples=samples,
        plan=plans.plan_for(0),
        replay=replay(plans.plan_for(0), time_model(args, config, hardware, world_size)),
        total_steps=plans.total_steps(),
    )


def _uneven_shards(largest: int, num_params: int, shards: int) -> list[str]:
    # FSDP2 shards whole rows: of a tensor with fewer rows than ranks, the last ranks hold nothing.
    share = largest * shards / num_params
    if share <= MAX_UNEVENNESS:
        return []
    return [
        f"rank 0 holds {share:.2f} times an even share: some parameters have too few rows for {shards} ranks; "
        "gathered parameters are padded accordingly, which the estimated peak does not include"
    ]


def _long_curriculum(plan: Plan) -> list[str]:
    # A curriculum as long as the lowest level's data leaves nothing to alternate with.
    lowest = plan.level_of_iteration == plan.level_of_iteration.min()
    steps = plan.step_of_iteration
    if not plan.curriculum_steps or lowest.all() or steps[lowest].max() > steps[~lowest].min():
        return []
    covered = steps[lowest].max() + 1
    return [
        f"packing.curriculum_steps = {plan.curriculum_steps:g} covers all {covered} steps of the lowest level, so "
        "all longer samples come last; lower it"
    ]


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run.

    rank_state: of rank 0, which holds the most. warnings: accepted by a start, but likely a mistake. plan, replay: the
    first epoch and its estimated time. total_steps: of all epochs.
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
        """Return the peak per rank in a micro-batch: the exact state plus the estimated rest."""
        # The estimate's state ignores the padding of uneven shards.
        state = estimate.resident_bytes if self.rank_state.offloaded else self.rank_state.total_bytes
        return state + estimate.saved_bytes + estimate.transient_bytes

    def host_bytes(self, estimate: MemoryEstimate) -> int:
        """Return the bytes per rank in host memory."""
        return self.rank_state.host_bytes + estimate.host_activation_bytes

    def fits(self, estimate: MemoryEstimate) -> bool:
        """Return whether it fits in the GPU's memory and in a rank's share of the node's."""
        fits_host = self.host_bytes(estimate) <= usable_host_bytes(self.hardware, self.world_size)
        return fits_host and self.peak_bytes(estimate) <= usable_bytes(self.hardware)

    def check_memory(self) -> None:
        """Raise UserError with one line per level that does not fit, and the cheapest change that makes it fit."""
        lines = []
        for index, memory in enumerate(self.levels):
            if self.fits(memory.configured):
                continue
            state, where = self.rank_state.host_bytes, "host memory per rank"
            needed, usable = self.host_bytes(memory.configured), usable_host_bytes(self.hardware, self.world_size)
            if needed <= usable:
                state, where = self.rank_state.device_bytes, "per rank"
                needed, usable = self.peak_bytes(memory.configured), usable_bytes(self.hardware)
            lines.append(
                f"level {level_name(memory.level)} needs {human_bytes(needed)} {where} ({human_bytes(state)} of it "
                f"parameters, gradients and optimizer state), but {self.hardware.name} has "
                f"{human_bytes(usable)} to use; {self._advice(index)}"
            )
        if lines:
            raise UserError(lines)

    def _advice(self, index: int) -> str:
        """Return the cheapest change by which level `index` fits."""
        level, loads, own = self.levels[index].level, pack_loads(self.plan), self.plan.pack_levels == index
        # The mean pack of the level, or of all levels if it has none.
        load = loads[own if own.any() else slice(None)].mean(axis=0)
        limit = usable_bytes(self.hardware)
        search = ChangeSearch(self.config, self.args, self.world_size, self.hardware, level, load, limit)
        found = search.cheapest()
        if found is not None:
            return found.instructions(self.config, level)
        more = search.more_ranks()
        # No level is short enough if the state alone does not fit.
        shorter = search.shorter() if self.rank_state.device_bytes < limit else None
        words = [] if more is None else [more.use_ranks(self.config, level)]
        if shorter is not None:
            text = shorter.instructions(self.config, level)
            words.append(f"{text} (data.max_length_policy then applies to longer samples)")
        return ", or ".join(words) or f"even {MAX_RANKS_FACTOR * self.world_size} ranks cannot hold it; use another GPU"


@dataclass(frozen=True)
class RankState:
    """What one rank keeps between steps: parameter elements, and bytes.

    pinned_rounding: in host memory, bytes that the allocator adds to those of parameters and gradients.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    offloaded: bool = False
    pinned_rounding: int = 0

    @property
    def total_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of it that are not in host memory."""
        return 0 if self.offloaded else self.total_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of it in host memory, as allocated."""
        return self.total_bytes + self.pinned_rounding if self.offloaded else 0


def rank_state(model: nn.Module, config: JobConfig) -> RankState:
    """Return the state of this rank's shards of `model`, which may be on the meta device."""
    shards = [(p.to_local() if isinstance(p, DTensor) else p, p.requires_grad) for p in model.parameters()]
    trained = [shard for shard, requires_grad in shards if requires_grad]
    narrow = config.training.gradient_dtype != "auto"
    gradients = [
        shard.numel() * (DTYPES[config.training.gradient_dtype] if narrow else shard.dtype).itemsize
        for shard in trained
    ]
    pinned = [shard.nbytes for shard, _ in shards] + gradients
    return RankState(
        parameters=sum(shard.numel() for shard, _ in shards),
        parameter_bytes=sum(shard.nbytes for shard, _ in shards),
        gradient_bytes=sum(gradients),
        optimizer_bytes=optimizer_bytes(model, config.optimizer),
        offloaded=config.parallelism.cpu_offload,
        pinned_rounding=sum(pinned_bytes(size, pinned_max_round()) - size for size in pinned),
    )


@dataclass(frozen=True)
class LevelMemory:
    """Estimates for a level as configured, and with each of AC_POLICIES on all layers."""

    level: Level
    configured: MemoryEstimate
    by_policy: dict[str, MemoryEstimate]


def level_memory(config: JobConfig, args: ModelArgs, world_size: int, level: Level) -> LevelMemory:
    """Return the estimates of one level of `config`."""

    def estimate(level: Level) -> MemoryEstimate:
        return estimate_memory(args, level, config, world_size, device_type="cuda")

    policies = {policy: estimate(with_policy(level, policy)) for policy in AC_POLICIES}
    return LevelMemory(level, estimate(level), policies)


@dataclass(frozen=True)
class Samples:
    """Samples of an epoch. lengths, loss_tokens: int64 [num_samples]. origin: description for the user."""

    lengths: NDArray[np.int64]
    loss_tokens: NDArray[np.int64]
    origin: str


def samples_of(config: JobConfig, args: ModelArgs) -> Samples:
    """Return the training samples of `config`; synthetic ones if none of its sources is on this machine.

    Raises what a start would raise for the data, their tokenizer and held-out data.
    """
    # Any existing source means that the data are supposed to be here, so that a missing one is an error.
    paths = [*config.data.train_files, *(source.path for source in config.data.sources)]
    if any(Path(path).expanduser().exists() for path in paths):
        store = open_stores(config, max_sample_tokens(config, args))[0]
        check_vocabulary(config, args, store.meta["vocab_size"])
        return Samples(store.lengths, store.loss_tokens, f"your data: {len(store):,} samples")
    # The tokenizer of the embedded corpus is made together with the corpus, so it may not exist yet.
    configured = bool(config.model.tokenizer_path or config.model.hf_path)
    if configured and (not config.data.embedded or config.tokenizer_path.exists()):
        template = chat_template_file(config.data.chat_template)
        check_vocabulary(config, args, ChatTokenizer(config.tokenizer_path, chat_template=template).vocab_size)
    return _synthetic(max_sample_tokens(config, args), paths[0])


def _synthetic(limit: int, missing: str) -> Samples:
    lengths = tulu3_longcite_like(SYNTHETIC_SAMPLES)
    kept = lengths[lengths <= limit]
    skipped = f", {len(lengths) - len(kept):,} above {limit:,} tokens skipped" if len(kept) < len(lengths) else ""
    origin = (
        f"SYNTHETIC data, because {missing} does not exist: {len(kept):,} lengths like Tulu3 with LongCite{skipped}, "
        "all tokens but the first trained"
    )
    return Samples(kept, kept - 1, origin)


def describe(found: DryRun) -> str:
    """Return the report: model and state per rank, plan, memory by level and policy, time by level; 100 columns."""
    plan = describe_plan(found.plan, found.total_steps, found.config)
    return "\n\n".join(filter(None, [_model(found), plan, _memory(found), _time(found), _missing(found.config)]))


def _model(found: DryRun) -> str:
    config, state = found.config, found.rank_state
    copies = config.parallelism.dp_replicate
    experts = config.parallelism.expert_parallel_degree
    shards = f"{found.world_size // copies} ranks" + (f", {copies} copies" if copies > 1 else "")
    if experts > 1 and found.args.moe:
        deviation = config.parallelism.expert_load_deviation
        most = most_loaded_rank(found.args.moe.n_routed_experts, experts, deviation)
        shards += f", experts over {experts} (assumed: the most loaded has {most:.2f} times the mean)"
    computed = str(compute_dtype(config, torch.device("cuda"))).removeprefix("torch.")
    lines = [
        f"dry run: {found.world_size} x {found.hardware.name}, {found.hardware.gpus_per_node} per node; nothing is "
        "allocated, memory and time are estimates",
        f"model: {found.args.name}, {found.num_params:,} parameters, {config.training.dtype}, computed in {computed}",
        f"FSDP over {shards}: {state.parameters:,} parameters per rank: {human_bytes(state.parameter_bytes)}, "
        f"gradients {human_bytes(state.gradient_bytes)}, optimizer {human_bytes(state.optimizer_bytes)}, "
        f"together {human_bytes(state.total_bytes)}{' in host memory' if state.offloaded else ''}",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in found.warnings)])


def _memory(found: DryRun) -> str:
    if not found.levels:
        return wrap(
            'memory of activations: NOT ESTIMATED for model.backend = "transformers", so this dry run does not say '
            "whether the levels fit; the warm-up of a start does. Times below are a guess from the model's dimensions"
        )
    total, usable = found.hardware.memory_bytes, usable_bytes(found.hardware)
    lines = [
        f"memory per rank, GiB: {_gib(usable)} of {_gib(total)} to use; activations are those of all layers",
        f"{'level':<12}{'checkpointing':<26}{'activations':>12}{'buffers':>10}{'peak':>10}{'host':>9}  verdict",
    ]
    for memory in found.levels:
        lines += [_memory_line(found, memory, policy, memory.by_policy[policy]) for policy in memory.by_policy]
        level = memory.level
        layers = "" if level.ac_policy == "none" or level.ac_layers is None else f" ({level.ac_layers} layers)"
        lines.append(_memory_line(found, memory, f"> {level.ac_policy}{layers}", memory.configured))
    return "\n".join([*lines, *_host_memory(found)])


def _host_memory(found: DryRun) -> list[str]:
    """Return the line on a node's memory, if the run keeps anything there."""
    # Buffers grow to the largest level's.
    needed = max(found.host_bytes(memory.configured) for memory in found.levels)
    if not needed:
        return []
    ranks = min(found.world_size, found.hardware.gpus_per_node)
    usable = ranks * usable_host_bytes(found.hardware, found.world_size)
    state = found.rank_state.host_bytes
    return [
        f"host memory per node, GiB: {_gib(ranks * needed)} of {_gib(usable)} to use ({ranks} ranks, each with state "
        f"{_gib(state)} and activations {_gib(needed - state)})"
    ]


def _memory_line(found: DryRun, memory: LevelMemory, policy: str, estimate: MemoryEstimate) -> str:
    peak = found.peak_bytes(estimate)
    free, host = usable_bytes(found.hardware) - peak, found.host_bytes(estimate)
    verdict = f"{_gib(free)} free" if free >= 0 else f"does not fit, by {_gib(-free)}"
    if host > usable_host_bytes(found.hardware, found.world_size):
        verdict = f"does not fit, by {_gib(host - usable_host_bytes(found.hardware, found.world_size))} on the host"
    return (
        f"{level_name(memory.level):<12}{policy:<26}{_gib(estimate.saved_bytes):>12}"
        f"{_gib(estimate.transient_bytes):>10}{_gib(peak):>10}{_gib(host):>9}  {verdict}"
    )


def _time(found: DryRun) -> str:
    plan, whole = found.plan, found.replay
    lines = [
        f"first epoch, on {found.samples.origin}",
        f"{'level':<12}{'micro-batches':>15}{'steps':>8}{'tokens':>16}{'s each':>10}{'idle':>9}{'time':>14}",
    ]
    for index, (level, row) in enumerate(zip(plan.levels, whole.per_level, strict=True)):
        steps = len(np.unique(plan.step_of_iteration[plan.iteration_of_pack[plan.pack_levels == index]]))
        if row is None:
            lines.append(f"{level_name(level):<12}{0:>15}")
            continue
        lines.append(
            f"{level_name(level):<12}{row.micro_batches:>15,}{steps:>8,}{row.tokens:>16,}"
            f"{row.seconds / row.micro_batches:>10.3g}{row.idle / row.seconds:>9.2%}{human_seconds(row.seconds):>14}"
        )
    mean = dataclasses.replace(whole, steps=0.0).seconds / whole.micro_batches
    lines.append(
        f"{'all':<12}{whole.micro_batches:>15,}{plan.num_steps:>8,}{whole.tokens:>16,}{mean:>10.3g}"
        f"{whole.idle / whole.seconds:>9.2%}{human_seconds(whole.seconds):>14}"
    )
    lines.append(
        f"with {whole.steps:.3g} s of optimizer steps; {whole.gpu_days:.3g} GPU days; "
        f"{whole.tokens / whole.seconds / found.world_size:,.0f} tokens/s per GPU"
    )
    return "\n".join(lines)


def _missing(config: JobConfig) -> str:
    """Return what a start needs, or replaces by a default, that the configuration does not set."""
    lines = []
    if config.model.weights_package and not config.model.hf_path:
        return f"a start makes the model from {config.model.weights_package}, by pip"
    if not (config.model.hf_path or config.model.tokenizer_path):
        lines.append("a start needs a tokenizer: set --model.hf_path DIR or --model.tokenizer_path DIR")
    if not (config.weights_path or config.checkpoint.initial_load_path):
        lines.append("a start trains NEW weights: set --model.hf_path DIR or --checkpoint.initial_load_path DIR")
    return "\n".join(lines)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
