"""What a dry run prints.

Owns the wording and the tables; the numbers are run.py's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hbp_titan.components.summary import describe_plan
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.dry_run.memory import LevelMemory
from hbp_titan.dry_run.run import DryRun
from hbp_titan.packing.level import level_name
from hbp_titan.selection.memory_estimate import MemoryEstimate
from hbp_titan.selection.selection import duration
from hbp_titan.simulation.estimate import usable_bytes


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
        f"{_size(state.gradient_bytes)}, {config.optimizer.name} {_size(state.optimizer_bytes)}, together "
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
