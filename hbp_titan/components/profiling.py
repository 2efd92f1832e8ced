"""Looking inside: a torch profiler trace of some optimizer steps, and a snapshot of GPU memory when it runs out.

Owns when they are taken, where they lie and what they hold ([profiling]; docs/metrics.md says how to open them).

Python's garbage collector, run by all ranks after the same steps.

Left alone it stops each rank when that has made so many objects, and every rank waits for the one that stopped (after
torchtitan v0.2.2 tools/utils.py).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from hbp_titan.job_config import Profiling

MAX_ENTRIES = 100_000
"""Allocations and releases that a memory snapshot reaches back (as torchtitan's)."""


class StepTrace:
    """`before_step` and `after_step` around every optimizer step; the context closes the trace.

    folder: the run's. The trace is profile/steps-FIRST-LAST/rankR.json.
    """

    def __init__(self, config: Profiling, folder: Path, rank: int) -> None:
        self.config = config
        self.folder = folder / "profile"
        self.rank = rank
        self._profiler: profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def before_step(self, step: int) -> None:
        """Step `step` (1-based) begins. A run that goes on inside of the range traces what is left of it."""
        config = self.config
        if not config.enable_profiling or not config.first_step <= step <= config.last_step:
            return
        if self._profiler is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.__enter__()
            self._first = step
        self._last = step

    def after_step(self, step: int) -> None:
        """Step `step` has ended."""
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
def memory_snapshot(config: Profiling, folder: Path, rank: int) -> Iterator[None]:
    """Around training: where GPU memory runs out, write memory_snapshot/rankR.pickle of the run folder.

    Does nothing without a GPU, whose allocator alone keeps such a history.
    """
    if not config.enable_memory_snapshot or not torch.cuda.is_available():
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        yield
    except BaseException as error:
        if _ran_out(error):
            (folder / "memory_snapshot").mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(folder / "memory_snapshot" / f"rank{rank}.pickle"))
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory is what `error` comes from."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


class GarbageCollection:
    """Context manager: Python collects nothing by itself, but `after_step` every `interval` optimizer steps.

    What was there before (modules, model, plans) is set aside, so that a collection looks at what training made alone.
    interval: 0 leaves everything as it is.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._was_enabled = False

    def __enter__(self) -> GarbageCollection:
        if self.interval:
            self._was_enabled = gc.isenabled()
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.interval:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def after_step(self, step: int) -> None:
        """Collect where it is time."""
        if self.interval and step % self.interval == 0:
            gc.collect()
