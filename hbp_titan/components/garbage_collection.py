"""Python's garbage collector, run by all ranks after the same steps.

Left alone it stops each rank when that has made so many objects, and every rank waits for the one that stopped (after
torchtitan v0.2.2 tools/utils.py).
"""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageCollection:
    """A context manager: inside it Python collects nothing by itself, but `after` every `interval` optimizer steps.

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

    def after(self, step: int) -> None:
        """Collect where it is time."""
        if self.interval and step % self.interval == 0:
            gc.collect()
