"""What a run prints before its first step: every derived number, for 80 columns.

Owns the wording; the numbers come from configuration, model, data and plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from hbp_titan.components.console import fit
from hbp_titan.components.model_state import describe_weights
from hbp_titan.data.planning import EpochPlans
from hbp_titan.distributed.parallelize import compute_dtype, stored_dtype
from hbp_titan.job_config import JobConfig, LoRA
from hbp_titan.models.args import ModelArgs
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.registry import num_params
from hbp_titan.packing import Plan, comparison_table, measure
from hbp_titan.packing.level import level_name

COMPARED = {"isf": "ISF", "flat_sorted": "flat + sort", "hbp": "HBP"}


def compare_methods(plans: EpochPlans) -> str:
    """The table method x metrics on the data that is trained: the usual rivals and the configured method."""
    configured = plans.config.packing.method
    names = COMPARED if configured in COMPARED else {**COMPARED, configured: configured}
    return comparison_table({name: measure(plans.build(method, 0), cost=plans.cost) for method, name in names.items()})


def describe_start(
    config: JobConfig,
    args: ModelArgs,
    model: nn.Module,
    plan: Plan,
    total_steps: int,
    device: torch.device,
    warnings: Sequence[str],
) -> str:
    """All of it but the table of methods. plan: of the epoch that begins or goes on."""
    samples, trained = plan.packs.ids, int(plan.loss_tokens[plan.packs.ids].sum())
    parts = [
        describe_model(config, args, model, device),
        f"ranks: {plan.world_size} on {device.type}",
        f"data: {len(samples):,} samples, {int(plan.lengths[samples].sum()):,} tokens, {trained:,} of them trained",
        *(f"warning: {warning}" for warning in warnings),
        describe_plan(plan, total_steps, config),
        f"outputs: {config.dump_folder}",
    ]
    return fit("\n".join(parts))


def describe_model(config: JobConfig, args: ModelArgs, model: nn.Module, device: torch.device) -> str:
    """Architecture, dtypes, attention kernel, where the weights come from, and what of them is trained."""
    computed = str(compute_dtype(config, device)).removeprefix("torch.")
    stored = str(stored_dtype(config, device)).removeprefix("torch.")
    weights = describe_weights(config.checkpoint.initial_load_path, args, stored)
    lines = [
        f"model: {args.name}, {num_params(args):,} parameters, {stored}, computed in {computed}, "
        f"attention {selected_backend(device)}",
        f"weights: {weights}",
    ]
    return "\n".join([*lines, *([_describe_lora(config.lora, model)] if config.lora.rank else [])])


def _describe_lora(lora: LoRA, model: nn.Module) -> str:
    """What is trained of an adapted model."""
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, requires_grad in numbers if requires_grad), sum(n for n, _ in numbers)
    return (
        f"LoRA: rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}\n"
        f"      {trained:,} of {total:,} parameters are trained, {100 * trained / total:.2f}%"
    )


def describe_plan(plan: Plan, total_steps: int, config: JobConfig) -> str:
    """Levels with their mesh, exchanges, recomputation and what they keep of parameters; steps of one epoch."""
    lines = []
    # Of a run that goes on it may be another than when the plan was made.
    resharded = [level.resharded(config.parallelism.reshard_after_forward) for level in config.levels]
    iterations = np.bincount(plan.level_of_iteration, minlength=len(plan.levels))
    for level, count, reshard in zip(plan.levels, iterations, resharded, strict=True):
        style = f" ({level.cp_style}, {config.parallelism.cp_collectives})" if level.cp_degree > 1 else ""
        layers = "all" if level.ac_layers is None else f"{level.ac_layers}"
        recomputed = "none" if level.ac_policy == "none" else f"{level.ac_policy} ({layers} layers)"
        kept = "" if reshard is True else ", parameters kept" + (f" over {reshard} ranks" if reshard else "")
        lines.append(
            f"level {level_name(level)}: dp {level.dp_degree(plan.world_size)} x cp {level.cp_degree}{style}, "
            f"checkpointing {recomputed}{kept}, {count} iterations"
        )
    tokens = plan.step_tokens
    lines.append(
        f"steps: {total_steps} in all; the plan has {plan.num_steps} steps of {int(np.mean(tokens)):,} "
        f"+- {int(np.std(tokens)):,} tokens in {plan.num_iterations} iterations"
    )
    return "\n".join(lines)
