"""Metrics: what a run writes and prints about its start, its steps and its end.

MetricsLogger writes metrics.jsonl (one object per step), the console, TensorBoard and Weights & Biases, and continues
them after a resume. RunTotals adds up a run by level and source. Console lines have at most 80 columns. Names are
torchtitan's (v0.2.2 components/metrics.py) where they mean the same; docs/metrics.md lists all.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hbp_titan.components.weights import describe_weights
from hbp_titan.data.epoch import EpochPlans
from hbp_titan.distributed.fsdp import compute_device
from hbp_titan.distributed.mesh import cross_node_warnings
from hbp_titan.distributed.parallelize import compute_dtype, stored_dtype
from hbp_titan.distributed.world import ranks_per_node
from hbp_titan.job_config import JobConfig, LoRA, to_dict
from hbp_titan.models.attention import selected_backend
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.registry import num_params
from hbp_titan.packing import Plan, comparison_table, measure
from hbp_titan.packing.level import describe_memory, level_name
from hbp_titan.packing.metrics import bucket_name
from hbp_titan.utils import atomic_write, human_count

COLUMNS = 80
SHOWN_SOURCES = 30
_GIVE_WAY = ("memory", "waiting", "grad", "mfu", "experts")
"""Parts that a line of more than COLUMNS drops, in this order."""
COMPARED = {"isf": "ISF", "flat_sorted": "flat + sort", "hbp": "HBP"}
_IDENTITY = "wandb_id"
_NAMES = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "level": "level",
    "mfu": "mfu(%)",
    "padding": "padding(%)",
    "abr": "balance/abr",
    "time_imbalance": "balance/time_imbalance",
    "idle_share": "balance/idle_share",
    "data_wait_seconds": "time_metrics/data_loading(s)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "checkpoint_blocked_seconds": "time_metrics/checkpoint_blocked(s)",
    "checkpoint_write_seconds": "time_metrics/checkpoint_write(s)",
    "peak_memory_gib": "memory/max_active(GiB)",
}


class MetricsLogger:
    """Context manager that writes on one rank (`active`); on the others every call does nothing.

    first_step: optimizer steps done before this start. totals: of the run since step 1, on the active rank.
    """

    def __init__(self, config: JobConfig, active: bool, first_step: int, total_steps: int, world_size: int) -> None:
        self.active = active
        self.log_interval = config.metrics.log_interval
        self.first_step = first_step
        self.total_steps = total_steps
        self.world_size = world_size
        self.seconds = 0.0
        self.totals = RunTotals()
        if not active:
            return
        folder = config.dump_folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Totals are of the whole run, so the steps before the resume count as well.
        for kept in truncate_after_step(path, first_step):
            self.totals.add(kept)
        self.file = path.open("a", encoding="utf-8")
        board, purge = str(folder / "tensorboard"), first_step and first_step + 1
        # purge_step hides the steps after the checkpoint, which this start repeats.
        self.writer = SummaryWriter(board, purge_step=purge) if config.metrics.enable_tensorboard else None
        self.wandb = WandbRun(folder, to_dict(config)) if config.metrics.enable_wandb else None
        show_bar = config.metrics.progress_bar and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True) if show_bar else None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.file.close()
            if self.writer:
                self.writer.close()
            if self.wandb:
                self.wandb.close()
            if self.bar:
                self.bar.close()

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one step. metrics: keys of metrics.jsonl (docs/metrics.md), with "validation" if it ran."""
        if not self.active:
            return
        step = metrics["step"]
        # Flushed: a killed run keeps every finished step, and the report can be made while the run continues.
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        self.totals.add(metrics)
        points = {step: scalars(metrics, self.totals, self.world_size)}
        if "validation_at_start" in metrics:
            points[0] = {k: v for k, v in _of_validation(metrics["validation_at_start"]) if v is not None}
        for at, figures in sorted(points.items()):
            for name, value in figures.items():
                if self.writer:
                    self.writer.add_scalar(name, value, at)
            if self.wandb:
                self.wandb.log(at, figures)
        self.seconds += metrics["step_seconds"]
        if self.bar:
            self.bar.update(1)
        if step % self.log_interval == 0 or step in (self.first_step + 1, self.total_steps):
            # Of this start only: an earlier one may have had other ranks.
            left = (self.total_steps - step) * self.seconds / (step - self.first_step)
            self.write(step_line(metrics, self.total_steps, left))
        if "skipped" in metrics:
            self.write(f"warning: {metrics['skipped']}")
        if "validation" in metrics:
            self.write(validation_lines(step, metrics["validation"]))

    def write(self, text: str) -> None:
        """Print `text`, above the progress bar if there is one."""
        if self.active:
            if self.bar:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)


def truncate_after_step(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the records of metrics.jsonl after `step`, which a resumed run writes again; return the others."""
    if not path.exists():
        return []
    kept = []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
            if metrics["step"] <= step:
                kept.append(metrics)
                lines.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the half-written last line of a killed run
    atomic_write(path, "".join(lines))
    return kept


def scalars(record: Mapping[str, Any], totals: RunTotals, world_size: int) -> dict[str, float]:
    """Return TensorBoard's names and values for the record of a step, without those that are None.

    totals: of the run up to this step.
    """
    return {name: value for name, value in _named(record, totals, world_size) if value is not None}


def _named(record: Mapping[str, Any], totals: RunTotals, world_size: int) -> Iterator[tuple[str, float | None]]:
    for key, name in _NAMES.items():
        yield name, record.get(key)
    yield "throughput(tps)", record["tokens_per_second"] / world_size  # per device, as in torchtitan
    yield "n_tokens_seen", totals.tokens
    yield "time_metrics/data_loading(%)", 100 * record["data_wait_seconds"] / record["step_seconds"]
    for name, loss in record["loss_by_level"].items():
        yield f"loss_metrics/level/{name}", loss
    for end, mean in record["loss_by_length"].items():
        yield f"loss_metrics/length/{end}", mean["loss"]
    for name, memory in record["memory_by_level"].items():
        yield f"memory/level/{name}(GiB)", memory
    for name, counts in record["sources"].items():
        yield f"source/{name}/loss", counts["loss"]
        yield f"source/{name}/tokens", totals.sources[name]["tokens"]
    for name, figure in record.get("expert_load", {}).items():
        yield f"expert_load/{name}", figure
    if "validation" in record:
        yield from _of_validation(record["validation"])


def _of_validation(means: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield "validation_metrics/loss", means["loss"]
    for kind in ("level", "length", "source"):
        for name, mean in means[f"by_{kind}"].items():
            yield f"validation_metrics/{kind}/{name}", mean["loss"]


def step_line(record: Mapping[str, Any], total_steps: int, seconds_left: float) -> str:
    """Return the console line of a step: number, level, loss, gradient norm, speed, MFU, idle share, memory, ETA."""
    mfu, idle, experts = record["mfu"], record["idle_share"], record.get("expert_load")
    parts = {
        "step": f"{record['step']:>{len(str(total_steps))}}/{total_steps}",
        "level": record["level_name"],
        "loss": f"loss {number(record['loss'], 6, 4)}",
        "grad": f"grad {number(record['grad_norm'], 5, 3)}",
        "speed": f"{human_count(record['tokens_per_second'])} tok/s",
        "mfu": "" if mfu is None else f"mfu {mfu:.1f}%",
        "experts": f"experts {experts['worst']:.2f}x" if experts else "",
        "waiting": "" if idle is None else f"idle {idle:.0%}",
        "memory": f"{record['peak_memory_gib']:.1f}G",
        "left": f"eta {clock(seconds_left)}",
    }
    for name in ("", *_GIVE_WAY):
        parts.pop(name, None)
        line = "  ".join(part for part in parts.values() if part)
        if len(line) <= COLUMNS:
            break
    return line


def number(value: float | None, width: int, digits: int) -> str:
    """Format a value of metrics.jsonl; None is "nan"."""
    return f"{'nan':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def validation_lines(step: int, means: Mapping[str, Any]) -> str:
    """Return the validation loss of all tokens, then by level and length band."""
    parts = [f"{name} {number(mean['loss'], 0, 4)}" for name, mean in means["by_level"].items()]
    parts += [f"{bucket_name(int(end))} {number(mean['loss'], 0, 4)}" for end, mean in means["by_length"].items()]
    return "\n".join([f"step {step} validation  loss {number(means['loss'], 0, 4)}", *flow(parts)])


def flow(parts: Iterable[str]) -> list[str]:
    """Return indented lines, each with as many of `parts` as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= COLUMNS:
            lines[-1] += f"   {part}"
        else:
            lines.append(f"    {part}")
    return lines


def wrap(text: str) -> str:
    """Break lines of more than COLUMNS, indenting what follows; a longer word stays whole."""
    lines = []
    for line in text.splitlines():
        broken = textwrap.wrap(line, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        lines += broken if len(line) > COLUMNS else [line]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class WandbRun:
    """The Weights & Biases run of a run folder, created or continued; torchtitan's environment variables name it.

    With WANDB_MODE=offline, `wandb sync FOLDER/wandb/offline-run-*` uploads it later. config: the resolved one.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        # Kept in the run folder, so that a resume continues the same run over there.
        identity = folder / _IDENTITY
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hbp_titan"),
            entity=os.environ.get("WANDB_TEAM"),
            name=os.environ.get("WANDB_RUN_NAME", folder.name),
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=folder,
            config=dict(config),
        )
        # An axis of our own: a resumed run logs some steps again, which W&B's own step axis refuses.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one step."""
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def check_wandb() -> None:
    """Raise ValueError if wandb is not installed, or needed online and not logged in."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "metrics.enable_wandb = true but wandb is not installed: pip install 'hbp-titan[wandb]', or set it to false"
        ) from None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    # Before the start: wandb would otherwise prompt on rank 0 while the others wait in a collective.
    try:
        wandb.login()
    except wandb.Error as error:
        raise ValueError(
            f"metrics.enable_wandb = true, but: {error} Or set WANDB_MODE=offline: the run folder keeps all of it"
        ) from None


class RunTotals:
    """Sums over the records of a run, by level and by source, including those before a resume."""

    def __init__(self) -> None:
        self.sources: dict[str, Counter[str]] = {}
        self.levels: dict[str, LevelTotals] = {}
        self.tokens = 0
        self.seconds = 0.0
        self.data_wait = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the record of one step. A skipped step trained nothing and counts for its time only."""
        self.seconds += record["step_seconds"]
        self.data_wait += record["data_wait_seconds"]
        if "skipped" in record:
            return
        self.tokens += record["tokens"]
        for name, counts in record["sources"].items():
            counted = self.sources.setdefault(name, Counter())
            counted.update({key: counts[key] for key in ("samples", "tokens", "trained_tokens")})
        for name, done in record["per_level"].items():
            self.levels.setdefault(name, LevelTotals()).add(done, record["loss_by_level"][name])

    def describe(self) -> str:
        """Return tables of levels and sources, the largest first, and the time spent waiting for data."""
        lines = [
            f"{'level':<11}{'batches':>11}{'tokens':>8}{'time':>9}{'tok/s':>7}{'mfu':>7}{'padding':>9}{'waiting':>9}"
        ]
        lines += [_level_line(name, total) for name, total in self.levels.items()]
        lines += [_loss_line(name, total) for name, total in self.levels.items()]
        lines += self._source_lines()
        share = self.data_wait / max(self.seconds, 1e-9)
        return "\n".join([*lines, f"waiting for data: {self.data_wait:.2f} s of {self.seconds:.1f} s, {share:.2%}"])

    def _source_lines(self) -> list[str]:
        shown = sorted(self.sources, key=lambda name: -self.sources[name]["tokens"])
        lines = [f"{'source':<32}{'samples':>12}{'tokens':>15}{'trained':>15}"]
        for name in shown[:SHOWN_SOURCES]:
            counts = self.sources[name]
            lines.append(
                f"{name[:31]:<32}{counts['samples']:>12,}{counts['tokens']:>15,}{counts['trained_tokens']:>15,}"
            )
        if len(shown) > SHOWN_SOURCES:
            lines.append(f"... and {len(shown) - SHOWN_SOURCES} smaller sources (metrics.jsonl has all)")
        return lines


@dataclass
class LevelTotals:
    """What one level did in a run.

    positions: tokens including padding. waiting: seconds, mean over ranks. work_mfu: sum of MFU * seconds, None if
    unknown. first_loss, last_loss: of the first and last step.
    """

    micro_batches: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    work_mfu: float | None = 0.0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, record: Mapping[str, Any], loss: float | None) -> None:
        """Add a level's entry of `per_level`. loss: its mean per trained token."""
        self.micro_batches += record["micro_batches"]
        self.tokens += record["tokens"]
        self.positions += record["positions"]
        self.seconds += record["seconds"]
        self.waiting += record["waiting_seconds"]
        # One step without MFU (an unknown GPU) makes the level's mean unknown, not zero.
        unknown = self.work_mfu is None or record["mfu"] is None
        self.work_mfu = None if unknown else self.work_mfu + record["mfu"] * record["seconds"]
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = self.last_loss if loss is None else loss


def _level_line(name: str, total: LevelTotals) -> str:
    seconds = max(total.seconds, 1e-9)
    mfu = "-" if total.work_mfu is None else f"{total.work_mfu / seconds:.1f}%"
    return (
        f"{name:<11}{total.micro_batches:>11,}{human_count(total.tokens):>8}{clock(total.seconds):>9}"
        f"{human_count(total.tokens / seconds):>7}{mfu:>7}{1 - total.tokens / total.positions:>9.1%}"
        f"{total.waiting / seconds:>9.1%}"
    )


def _loss_line(name: str, total: LevelTotals) -> str:
    first, last = ("-" if loss is None else f"{loss:.4f}" for loss in (total.first_loss, total.last_loss))
    return f"{name:<11}loss {first} -> {last}"


def describe_start(
    config: JobConfig, args: ModelArgs, model: nn.Module, plans: EpochPlans, plan: Plan, total_steps: int, step: int = 0
) -> str:
    """Return every derived number of a run that starts, or resumes from `step`. plan: of the current epoch."""
    device = compute_device(model)
    experts = config.parallelism.expert_parallel_degree
    warnings = cross_node_warnings(plan.levels, experts, ranks_per_node(plan.world_size))
    samples, trained = plan.packs.ids, int(plan.loss_tokens[plan.packs.ids].sum())
    parts = [
        describe_model(config, args, model, device, step),
        f"ranks: {plan.world_size} on {device.type}",
        f"data: {len(samples):,} samples, {int(plan.lengths[samples].sum()):,} tokens, {trained:,} of them trained",
        *(f"warning: {warning}" for warning in warnings),
        describe_plan(plan, total_steps, config),
        f"outputs: {config.dump_folder}",
    ]
    comparison = f"{_comparison(plans)}\n" if config.packing.print_comparison else ""
    return comparison + wrap("\n".join(parts))


def _comparison(plans: EpochPlans) -> str:
    """Return the table of methods and metrics on the training data: the usual baselines and the configured method."""
    configured = plans.config.packing.method
    names = COMPARED if configured in COMPARED else {**COMPARED, configured: configured}
    return comparison_table({name: measure(plans.build(method, 0)) for method, name in names.items()})


def describe_model(config: JobConfig, args: ModelArgs, model: nn.Module, device: torch.device, step: int = 0) -> str:
    """Return the lines on architecture, dtypes, attention kernel, weights and what is trained. step: as above."""
    computed = str(compute_dtype(config, device)).removeprefix("torch.")
    stored = str(stored_dtype(config, device)).removeprefix("torch.")
    weights = describe_weights(config.weights_path, args, stored)
    if step and not config.lora.rank:
        weights = f"those of step {step} in {config.dump_folder / 'checkpoint'}, held in {stored}"
    lines = [
        f"model: {args.name}, {num_params(args):,} parameters in {stored}, compute dtype {computed}, "
        f"attention {selected_backend(device)}",
        f"weights: {weights}",
    ]
    return "\n".join([*lines, *([_describe_lora(config.lora, model)] if config.lora.rank else [])])


def _describe_lora(lora: LoRA, model: nn.Module) -> str:
    """Return the lines on the adapters."""
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, requires_grad in numbers if requires_grad), sum(n for n, _ in numbers)
    return (
        f"LoRA: rank {lora.rank}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}\n"
        f"      {trained:,} of {total:,} parameters trainable, {100 * trained / total:.2f}%"
    )


def describe_plan(plan: Plan, total_steps: int, config: JobConfig) -> str:
    """Return one line per level (mesh, cp exchange, recomputation, resharding), then the steps of the epoch."""
    lines = []
    # From the configuration: a resumed run may change what a level keeps, and its plan may be older. A finished run's
    # plan may have other levels.
    same = [level_name(level) for level in config.levels] == [level_name(level) for level in plan.levels]
    packs = np.bincount(plan.pack_levels, minlength=len(plan.levels))
    for level, count in zip(config.levels if same else plan.levels, packs, strict=True):
        style = f" ({level.cp_style}, {config.parallelism.cp_backend})" if level.cp_degree > 1 else ""
        reshard = level.reshard_setting(config.parallelism.reshard_after_forward)
        # Numbers of ranks are above 1, which equals True.
        words: dict[bool | int, str] = {True: "", False: ", parameters stay gathered"}
        kept = words.get(reshard, f", resharded over {reshard} ranks")
        dp = level.dp_degree(plan.world_size)
        parallel = plan.level_order == "parallel"
        # Side by side, the groups of a micro-batch differ in their level.
        mesh, number = ("", f"{count} packs") if parallel else (f"dp {dp} x ", f"{count // dp} micro-batches")
        lines.append(
            f"level {level_name(level)}: {mesh}cp {level.cp_degree}{style}, checkpointing {describe_memory(level)}"
            f"{kept}, {number}"
        )
    tokens = plan.step_tokens
    lines.append(
        f"total steps: {total_steps}; this plan: {plan.num_steps} steps of {int(np.mean(tokens)):,} "
        f"+- {int(np.std(tokens)):,} tokens, {plan.num_iterations} micro-batches"
    )
    return "\n".join(lines)
