"""A torch profiler trace of one optimizer step, on request ([profiling]).

Owns where the trace lies and what it holds: open it in Perfetto or chrome://tracing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from hbp_titan.job_config import Profiling


def profiled_step(config: Profiling, step: int, folder: Path) -> contextlib.AbstractContextManager[object]:
    """The context in which optimizer step `step` (1-based) runs; it traces the step that the configuration names."""
    if not config.enable_profiling or step != config.profile_step:
        return contextlib.nullcontext()
    return _trace(folder / "profile")


@contextlib.contextmanager
def _trace(folder: Path) -> Iterator[None]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank{dist.get_rank()}_trace.json"))
