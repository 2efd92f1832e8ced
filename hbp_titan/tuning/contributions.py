"""What each choice of a selection contributes: the epoch with one choice at a time taken back, by the time model.

Owns the table of choices. A new setting of levels or runs that the time model knows is a new row of CHOICES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hbp_titan.components.timing import predict_epoch
from hbp_titan.config import JobConfig
from hbp_titan.distributed.context_parallel import check_heads
from hbp_titan.job_config import Float8
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level, Plan
from hbp_titan.packing.level import level_name
from hbp_titan.tuning.hardware import Hardware
from hbp_titan.tuning.memory import estimate_memory, with_policy
from hbp_titan.tuning.memory_plans import fits_hardware, usable_bytes, usable_host_bytes
from hbp_titan.tuning.search import BASELINES, Selection, Workload
from hbp_titan.tuning.time_model import TimeModel, time_model
from hbp_titan.utils import human_bytes, human_seconds


@dataclass(frozen=True)
class Choice:
    """A choice that can be taken back. name: of what was chosen; instead: what replaces it.

    level: returns a level of the model without it. config: returns the settings of the run without it. Both return
    their argument if it does not have the choice.
    """

    name: str
    instead: str
    level: Callable[[Level, ModelArgs], Level] = lambda level, args: level
    config: Callable[[JobConfig], JobConfig] = lambda config: config


def _on_device(level: Level, args: ModelArgs) -> Level:
    policy = {"offload": "full", "offload_attention": "keep_attention"}.get(level.ac_policy, level.ac_policy)
    return with_policy(level, policy, level.ac_layers)


def _other_style(level: Level, args: ModelArgs) -> Level:
    if level.cp_degree == 1:
        return level
    other = replace(level, cp_style="allgather" if level.cp_style == "ulysses" else "ulysses")
    try:
        check_heads([other], args.num_heads, args.num_kv_heads)
    except ValueError:
        return level
    return other


def _even_loads(config: JobConfig) -> JobConfig:
    return config if config.parallelism.expert_parallel_degree == 1 else _run(expert_load_deviation=0.0)(config)


def _run(**changes: Any) -> Callable[[JobConfig], JobConfig]:
    return lambda config: replace(config, parallelism=replace(config.parallelism, **changes))


def _float8_everywhere(level: Level, args: ModelArgs) -> Level:
    return replace(level, float8=None)


def _float8(**changes: Any) -> Callable[[JobConfig], JobConfig]:
    return lambda config: replace(config, float8=replace(config.float8, **changes))


CHOICES = (
    Choice("activation checkpointing", "full, on all layers", lambda level, args: with_policy(level, "full")),
    Choice("activations on the host", "on the device", _on_device),
    Choice("chunks, head groups", "none", lambda level, _: replace(level, mlp_chunk_tokens=0, attention_head_groups=1)),
    Choice(
        "reshard_after_forward",
        "true",
        lambda level, _: replace(level, reshard_after_forward=None),
        _run(reshard_after_forward=True),
    ),
    Choice("cp_style", "allgather, or ulysses for it", _other_style),
    Choice(
        "float8 products", "none", lambda level, _: replace(level, float8=None), lambda c: replace(c, float8=Float8())
    ),
    Choice("float8 by level", "on every level", _float8_everywhere),
    Choice("float8 all-gather", "false", config=_float8(fsdp_all_gather=False)),
    Choice("cpu_offload", "false", config=_run(cpu_offload=False)),
    Choice("expert parallelism", "none", config=_run(expert_parallel_degree=1)),
    Choice("loads of experts", "even", config=_even_loads),
)


@dataclass(frozen=True)
class Contribution:
    """The epoch without a choice. seconds: None if it does not fit in memory. needs: why it does not."""

    name: str
    instead: str
    seconds: float | None
    needs: str = ""


@dataclass(frozen=True)
class Contributions:
    """The epoch with all choices and without each that the selection has; `absent`: choices that it does not have."""

    seconds: float
    rows: tuple[Contribution, ...]
    absent: tuple[str, ...]

    def describe(self, machine: str) -> str:
        """Return a table: one line per choice, with the share of the time that it removes. machine: its name."""
        lines = [
            f"what each choice contributes, by the time model ({machine}), with one at a time taken back:",
            f"{'choice':<26}{'instead':<32}{'epoch':>12}{'removes':>9}",
            f"{'all':<26}{'':<32}{human_seconds(self.seconds):>12}",
        ]
        for row in self.rows:
            if row.seconds is None:
                lines.append(f"{row.name:<26}{row.instead:<32} does not fit: {row.needs}")
                continue
            removed = round(1 - self.seconds / row.seconds, 3) + 0.0  # no negative zero
            lines.append(f"{row.name:<26}{row.instead:<32}{human_seconds(row.seconds):>12}{removed:>9.1%}")
        return "\n".join([*lines, *([f"not used: {', '.join(self.absent)}"] if self.absent else [])])


def contributions(
    selection: Selection,
    compared: dict[str, Selection],
    workload: Workload,
    config: JobConfig,
    args: ModelArgs,
    hardware: Hardware,
) -> Contributions:
    """Return what the choices in `selection` contribute. compared: from search.baselines, selections of one level.

    Every time is the time model's, also if the selection was measured.
    """
    model, plan = time_model(args, config, hardware, workload.world_size), workload.plan(selection.levels)

    def seconds(plan: Plan, levels: Sequence[Level], at: TimeModel = model) -> float:
        step_seconds = workload.step_seconds + at.step_seconds() - model.step_seconds()
        return predict_epoch(plan, [at.level_time(level) for level in levels], step_seconds).seconds

    rows, absent = [], []
    for choice in CHOICES:
        levels = [choice.level(level, args) for level in selection.levels]
        changed = choice.config(config)
        if tuple(levels) == selection.levels and changed == config:
            absent.append(choice.name)
            continue
        needs = next(
            filter(None, (_lacks(level, changed, args, hardware, workload.world_size) for level in levels)), ""
        )
        at = time_model(args, changed, hardware, workload.world_size)
        rows.append(Contribution(choice.name, choice.instead, None if needs else seconds(plan, levels, at), needs))
    for method, name in (("flat_sorted", "levels"), ("isf", "levels and balance")):
        alone = compared[method].levels
        found = seconds(workload.plan(alone, method), alone)
        rows.append(Contribution(name, f"{BASELINES[method]}, {level_name(alone[0])}", found))
    return Contributions(seconds(plan, selection.levels), tuple(rows), tuple(absent))


def _lacks(level: Level, config: JobConfig, args: ModelArgs, hardware: Hardware, world_size: int) -> str:
    """Return which memory `level` exceeds, empty if it fits."""
    estimate = estimate_memory(args, level, config, world_size, device_type="cuda")
    if fits_hardware(estimate, hardware, world_size):
        return ""
    needed, usable, where = estimate.peak_bytes, usable_bytes(hardware), "a GPU"
    if needed <= usable:
        needed, usable, where = estimate.host_bytes, usable_host_bytes(hardware, world_size), "a rank's host memory"
    return f"{level_name(level)} needs {human_bytes(needed)} of {where}'s {human_bytes(usable)}"
