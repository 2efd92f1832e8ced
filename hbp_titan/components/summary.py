"""What a run prints before its first step and after its last: every derived number, for 80 columns.

Owns the wording of these blocks and the running totals per level; the numbers come from configuration and plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hbp_titan.components.model_state import describe_weights
from hbp_titan.data.planning import EpochPlans
from hbp_titan.distributed.parallelize import compute_dtype
from hbp_titan.job_config import JobConfig, LoRA
from hbp_titan.models.args import ModelArgs
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.registry import num_params
from hbp_titan.packing import Level, Plan, comparison_table, measure

SHOWN_SOURCES = 30
COMPARED = {"isf": "ISF", "flat_sorted": "flat + sort", "hbp": "HBP"}


def level_name(level: Level) -> str:
    """A level in one word: 8K/cp2."""
    tokens = level.max_tokens
    return f"{tokens // 1024}K/cp{level.cp_degree}" if tokens % 1024 == 0 else f"{tokens}/cp{level.cp_degree}"


def compare_methods(plans: EpochPlans) -> str:
    """The table method x metrics on the data that is trained: the usual rivals and the configured method."""
    configured = plans.config.packing.method
    names = COMPARED if configured in COMPARED else {**COMPARED, configured: configured}
    return comparison_table({name: measure(plans.build(method, 0), cost=plans.cost) for method, name in names.items()})


def describe_model(config: JobConfig, args: ModelArgs, model: nn.Module, device: torch.device) -> str:
    """Architecture, dtypes, attention kernel, where the weights come from, and what of them is trained."""
    computed = str(compute_dtype(config, device)).removeprefix("torch.")
    weights = describe_weights(config.checkpoint.initial_load_path, args, config.training.dtype)
    lines = [
        f"model: {args.name}, {num_params(args):,} parameters, {config.training.dtype}, computed in {computed}, "
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


def describe_plan(plan: Plan, total_steps: int, cp_collectives: str) -> str:
    """Levels with their mesh, exchanges and recomputation, iterations, steps and tokens per step of one epoch."""
    lines = []
    iterations = np.bincount(plan.level_of_iteration, minlength=len(plan.levels))
    for level, count in zip(plan.levels, iterations, strict=True):
        style = f" ({level.cp_style}, {cp_collectives})" if level.cp_degree > 1 else ""
        layers = "all" if level.ac_layers is None else f"{level.ac_layers}"
        recomputed = "none" if level.ac_policy == "none" else f"{level.ac_policy} ({layers} layers)"
        lines.append(
            f"level {level_name(level)}: dp {level.dp_degree(plan.world_size)} x cp {level.cp_degree}{style}, "
            f"checkpointing {recomputed}, {count} iterations"
        )
    tokens = plan.step_tokens
    lines.append(
        f"steps: {total_steps} in all; the plan has {plan.num_steps} steps of {int(np.mean(tokens)):,} "
        f"+- {int(np.std(tokens)):,} tokens in {plan.num_iterations} iterations"
    )
    return "\n".join(lines)


@dataclass
class LevelTotals:
    """What one level did in this run, for the table at the end."""

    level: Level
    iterations: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float = 0.0

    def add(self, iterations: int, tokens: int, seconds: float, loss: float) -> None:
        """Count one optimizer step's share of this level; `loss` is its mean per loss token."""
        self.iterations += iterations
        self.tokens += tokens
        self.seconds += seconds
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss


def describe_totals(totals: Sequence[LevelTotals], sources: Mapping[str, Mapping[str, int]]) -> str:
    """A table of tokens, time and loss per level, and one of tokens per source, the largest first.

    Levels without iterations are left out. sources: counts by the names of metrics.jsonl.
    """
    lines = [f"{'level':<12}{'iterations':>11}{'tokens':>13}{'seconds':>10}{'tok/s':>10}{'loss':>20}"]
    for total in totals:
        if total.first_loss is None:
            continue
        rate = total.tokens / max(total.seconds, 1e-9)
        loss = f"{total.first_loss:.3f} -> {total.last_loss:.3f}"
        lines.append(
            f"{level_name(total.level):<12}{total.iterations:>11}{total.tokens:>13,}{total.seconds:>10.1f}"
            f"{rate:>10,.0f}{loss:>20}"
        )
    return "\n".join([*lines, *_source_lines(sources)])


def _source_lines(sources: Mapping[str, Mapping[str, int]]) -> list[str]:
    shown = sorted(sources, key=lambda name: -sources[name]["tokens"])
    lines = [f"{'source':<32}{'samples':>12}{'tokens':>15}{'trained':>15}"]
    for name in shown[:SHOWN_SOURCES]:
        counts = sources[name]
        lines.append(f"{name[:31]:<32}{counts['samples']:>12,}{counts['tokens']:>15,}{counts['trained_tokens']:>15,}")
    if len(shown) > SHOWN_SOURCES:
        lines.append(f"... and {len(shown) - SHOWN_SOURCES} smaller sources (metrics.jsonl has all)")
    return lines


def describe_wait(data_wait_seconds: float, seconds: float) -> str:
    """How much of the time of all steps the slowest rank waited for data."""
    return f"waiting for data: {data_wait_seconds:.2f} s of {seconds:.1f} s, {100 * data_wait_seconds / seconds:.2f}%"
