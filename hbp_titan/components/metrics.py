"""What a run tells: one line a step on the console, TensorBoard, and metrics.jsonl.

Owns the names and the formatting of metrics, and the memory reading. Throughput counts real tokens, never padding;
MFU counts the attention that the documents need, not that of the full pack.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

_TENSORBOARD_NAMES = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "level": "level",
    "tokens_per_second": "throughput(tps)",
    "mfu": "mfu(%)",
    "padding": "padding(%)",
    "data_wait_seconds": "time_metrics/data_loading(s)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "checkpoint_blocked_seconds": "time_metrics/checkpoint_blocked(s)",
    "checkpoint_write_seconds": "time_metrics/checkpoint_write(s)",
    "peak_memory_gib": "memory/max_active(GiB)",
}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: CUDA's allocator on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class MetricsLogger:
    """Writes on one rank only (`active`); on the others every call does nothing. A context manager.

    sources: what each source was trained since step 1, counts by the names of metrics.jsonl; on the active rank.
    """

    def __init__(
        self,
        folder: Path,
        active: bool,
        first_step: int,
        total_steps: int,
        *,
        log_interval: int,
        tensorboard: bool,
        progress_bar: bool,
    ) -> None:
        self.active = active
        self.log_interval = log_interval
        self.total_steps = total_steps
        self.seconds = 0.0
        self.sources: dict[str, Counter[str]] = {}
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        for kept in keep_steps_up_to(self.path, first_step):
            self._count_sources(kept)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1) if tensorboard else None
        self.first_step = first_step
        show_bar = progress_bar and sys.stderr.isatty()
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
            if self.bar:
                self.bar.close()

    def log(self, metrics: dict[str, Any]) -> None:
        """Record one step; `metrics` has the keys of metrics.jsonl (docs/metrics.md), "validation" where it ran."""
        if not self.active:
            return
        step = metrics["step"]
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        self._count_sources(metrics)
        if self.writer:
            for name in metrics["sources"]:
                self.writer.add_scalar(f"source/{name}/tokens", self.sources[name]["tokens"], step)
            for name, figure in metrics.get("expert_load", {}).items():
                self.writer.add_scalar(f"expert_load/{name}", figure, step)
            for name, tag in _TENSORBOARD_NAMES.items():
                if metrics.get(name) is not None:
                    self.writer.add_scalar(tag, metrics[name], step)
        self.seconds += metrics["step_seconds"]
        if self.bar:
            self.bar.update(1)
        if step % self.log_interval == 0 or step in (self.first_step + 1, self.total_steps):
            self.write(self._line(metrics))
        if "skipped" in metrics:
            self.write(f"warning: {metrics['skipped']}")
        if "validation" in metrics:
            means = metrics["validation"]
            if self.writer:
                self.writer.add_scalar("validation_metrics/loss", means["loss"], step)
            self.write(f"step {step} validation  " + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()))

    def _count_sources(self, metrics: dict[str, Any]) -> None:
        for name, counts in metrics["sources"].items():
            self.sources.setdefault(name, Counter()).update(counts)

    def write(self, text: str) -> None:
        """Print `text` above the progress bar."""
        if self.active:
            if self.bar:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def _line(self, m: dict[str, Any]) -> str:
        left = (self.total_steps - m["step"]) * self.seconds / (m["step"] - self.first_step)
        parts = [
            f"step {m['step']:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"level {m['level_name']}",
            "loss     nan" if m["loss"] is None else f"loss {m['loss']:7.4f}",
            "grad    nan" if m["grad_norm"] is None else f"grad {m['grad_norm']:6.3f}",
            f"lr {m['lr']:.2e}",
            f"tok/s {m['tokens_per_second']:,.0f}",
        ]
        if m["mfu"] is not None:
            parts.append(f"mfu {m['mfu']:.1f}%")
        if "expert_load" in m:
            parts.append(f"experts {m['expert_load']['worst']:.2f}x")
        parts += [
            f"pad {m['padding']:.1f}%",
            f"wait {m['data_wait_seconds']:.2f}s",
            f"mem {m['peak_memory_gib']:.2f}G",
            f"eta {time.strftime('%H:%M:%S', time.gmtime(left))}",
        ]
        return "  ".join(parts)


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
