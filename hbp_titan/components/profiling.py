"""Profiler traces of some optimizer steps, a GPU memory snapshot on out-of-memory, and garbage collection in step.

Owns when they are taken and where they are written ([profiling]; docs/metrics.md explains how to open them).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hbp_titan.job_config import Profiling

MAX_ENTRIES = 100_000
"""Allocations and frees in a memory snapshot (as in torchtitan)."""


class StepTrace:
    """Profiler of a range of optimizer steps; writes profile/steps-FIRST-LAST/rankR.json in the run folder.

    Call `before_step` and `after_step` around every step. The context manager closes a trace that the end of the run
    cuts short.
    """

    def __init__(self, config: Profiling, run_folder: Path, rank: int) -> None:
        self.config = config
        self.folder = run_folder / "profile"
        self.rank = rank
        self._profiler: profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def before_step(self, step: int) -> None:
        """Start tracing if `step` (1-based) is in the range; a run resumed inside the range traces the rest of it."""
        config = self.config
        if not config.enable_profiling or not config.first_step <= step <= config.last_step:
            return
        if self._profiler is None:
            # Not with torch's schedule, which counts steps from the start of the process and not of the run.
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()
            self._first = step
        self._last = step

    def after_step(self, step: int) -> None:
        """Write the trace after the last step of the range."""
        if step == self.config.last_step:
            self._write()

    def _write(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        folder = self.folder / f"steps-{self._first}-{self._last}"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank{self.rank}.json"))


@contextmanager
def memory_snapshot(config: Profiling, run_folder: Path, rank: int) -> Iterator[None]:
    """Write memory_snapshot/rankR.pickle of the run folder if the GPU runs out of memory inside; no effect on a CPU."""
    if not config.enable_memory_snapshot or not torch.cuda.is_available():
        yield
        return
    # A bounded history: unlimited, it would itself fill the host's memory in a long run.
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        yield
    except BaseException as error:
        if _is_out_of_memory(error):
            (run_folder / "memory_snapshot").mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(run_folder / "memory_snapshot" / f"rank{rank}.pickle"))
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _is_out_of_memory(error: BaseException | None) -> bool:
    # The OOM advisor raises its own error from torch's.
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


class GarbageCollection:
    """Context manager that disables automatic garbage collection and collects every `interval` optimizer steps.

    Left alone, Python collects on each rank at a different time and all ranks wait for the one that does (after
    torchtitan v0.2.2 tools/utils.py). interval 0 changes nothing.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        if self.interval:
            self._was_enabled = gc.isenabled()
            gc.collect()
            # Modules, model and plans stay: without them a collection looks only at what training allocated.
            gc.freeze()
            gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        if self.interval:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if `step` is a multiple of the interval."""
        if self.interval and step % self.interval == 0:
            gc.collect()
