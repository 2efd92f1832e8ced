"""What a run tells of its steps: metrics.jsonl, the console, TensorBoard and Weights & Biases.

Owns the writers, their place in the run folder, and what of an earlier start is kept where a run goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hbp_titan.components.console import filled, number, step_line
from hbp_titan.components.metric_names import scalars
from hbp_titan.components.run_totals import RunTotals
from hbp_titan.components.wandb_run import WandbRun
from hbp_titan.job_config import JobConfig, to_dict
from hbp_titan.packing.bands import band_name


class MetricsLogger:
    """Writes on one rank only (`active`); on the others every call does nothing. A context manager.

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
        for kept in keep_steps_up_to(path, first_step):
            self.totals.add(kept)
        self.file = path.open("a", encoding="utf-8")
        tensorboard = config.metrics.enable_tensorboard
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1) if tensorboard else None
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
        """Record one step; `metrics` has the keys of metrics.jsonl (docs/metrics.md), "validation" where it ran."""
        if not self.active:
            return
        step = metrics["step"]
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        self.totals.add(metrics)
        figures = scalars(metrics, self.totals, self.world_size)
        if self.writer:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(step, figures)
        self.seconds += metrics["step_seconds"]
        if self.bar:
            self.bar.update(1)
        if step % self.log_interval == 0 or step in (self.first_step + 1, self.total_steps):
            left = (self.total_steps - step) * self.seconds / (step - self.first_step)
            self.write(step_line(metrics, self.total_steps, left))
        if "skipped" in metrics:
            self.write(f"warning: {metrics['skipped']}")
        if "validation" in metrics:
            self.write(_validation_lines(step, metrics["validation"]))

    def write(self, text: str) -> None:
        """Print `text` above the progress bar."""
        if self.active:
            if self.bar:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)


def _validation_lines(step: int, means: Mapping[str, Any]) -> str:
    """The loss of all held-out tokens, then by level and by length band."""
    parts = [f"{name} {number(mean['loss'], 0, 4)}" for name, mean in means["by_level"].items()]
    parts += [f"{band_name(int(border))} {number(mean['loss'], 0, 4)}" for border, mean in means["by_length"].items()]
    return "\n".join([f"step {step} validation  loss {number(means['loss'], 0, 4)}", *filled(parts)])


def keep_steps_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of metrics.jsonl after `step`: a resumed run writes those steps again. Returns what is kept."""
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
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)
    return kept
