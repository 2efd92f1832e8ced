"""Watchdog: says where every rank stands when nothing moves any more, and ends what does not end itself.

Owns a thread beside the training loop. Collectives have timeouts of their own and end a rank that waits in one; this
thread speaks a little before, because only it knows the step and the level, and it also sees what is no collective (a
loader, a file system). Ranks that stand at the same place are one line.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

# Of the timeout of collectives.
SPEAKS_AT, ENDS_AT = 0.9, 1.2
_PACKAGE = Path(__file__).resolve().parents[1]


class Watchdog:
    """A context manager around the run, which calls `at` whenever something new begins.

    store: where the ranks tell each other; made once a job.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self.where = "the start"
        self._end = end
        self._timeout = math.inf
        self._since = time.monotonic()
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, where: str, timeout_seconds: float = math.inf) -> None:
        """Something new begins, which may take as long as a collective may; as long as it wants unless told."""
        self.where, self._timeout, self._since = where, timeout_seconds, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told = False
        while not self._stop.wait(min(1.0, 0.05 * self._timeout)):
            idle, timeout = time.monotonic() - self._since, self._timeout
            if idle <= SPEAKS_AT * timeout:
                told = False
            elif not told:
                told = True
                self._tell(idle)
            elif idle > ENDS_AT * timeout:
                print(f"rank {self.rank} is ended after {idle:.0f} s without progress", file=sys.stderr, flush=True)
                self._end(1)
                return

    def _tell(self, idle: float) -> None:
        """Leave this rank's place for the others; the first to do so prints the places of all."""
        self.store.set(f"hbp_titan/stands/{self.rank}", f"{self.where}: {place_of(self._watched)}")
        if self.store.add("hbp_titan/stands", 1) != 1:
            return
        # The others come to the same conclusion within a second or two.
        self._stop.wait(min(5.0, 0.1 * self._timeout))
        print(f"nothing has moved for {idle:.0f} s:\n{self._places()}", file=sys.stderr, flush=True)

    def _places(self) -> str:
        ranks_at: dict[str, list[int]] = {}
        for rank in range(self.world_size):
            key = f"hbp_titan/stands/{rank}"
            place = (
                self.store.get(key).decode() if self.store.check([key]) else "no word: gone, or not even Python runs"
            )
            ranks_at.setdefault(place, []).append(rank)
        return "\n".join(f"  {_ranks(ranks)} in {place}" for place, ranks in ranks_at.items())


def place_of(thread: int) -> str:
    """The innermost call of a thread, and the line of this package that it comes from."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    if not stack:
        return "no stack"
    own = [entry for entry in stack if _PACKAGE in Path(entry.filename).parents]
    line = f" from {Path(own[-1].filename).relative_to(_PACKAGE.parent)}:{own[-1].lineno}" if own else ""
    return f"{stack[-1].name}{line}"


def _ranks(ranks: list[int]) -> str:
    """As 'rank 3' or 'ranks 0-2, 4'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
