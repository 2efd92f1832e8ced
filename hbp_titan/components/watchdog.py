"""Watchdog: says where every rank stands when nothing moves any more, and ends what does not end itself.

Owns a thread beside the training loop. Collectives have timeouts of their own and end a rank that waits in one; this
thread speaks a little before, because only it knows the step and the level, and it also sees what is no collective (a
loader, a file system). Ranks that stand at the same place are one line.

It also ends a rank that was asked to leave (SIGTERM, SIGUSR1) and cannot: one that waits for a rank that is gone, which
NCCL does not notice, never comes to the end of its step, where it would save. What a sound wait takes is known from
earlier ones of its kind; a kind that was not seen yet, and waits for a disk, are left to their own timeouts.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

# Of the timeout of collectives.
SPEAKS_AT, ENDS_AT = 0.9, 1.2
# A rank that got a signal is stuck after this many seconds without progress, and after this many times the longest
# wait of the same kind before. torchrun kills after 30 s.
STUCK_SECONDS, STUCK_FACTOR = 10.0, 3.0
_PACKAGE = Path(__file__).resolve().parents[1]


class _Place(NamedTuple):
    where: str
    timeout: float
    since: float
    kind: str


class Watchdog:
    """A context manager around the run, which calls `at` whenever something new begins.

    store: where the ranks tell each other; made once a job.
    signal_received: set while signals ask the run to leave: the number of one that came, or 0.
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
        self.signal_received: Callable[[], int] = lambda: 0
        self._longest: dict[str, float] = {}
        self._end = end
        # Replaced as a whole: the thread never sees the time of one place and the timeout of another.
        self._place = _Place("the start", math.inf, time.monotonic(), "")
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, where: str, timeout_seconds: float = math.inf, kind: str = "") -> None:
        """Something new begins, which may take `timeout_seconds`.

        kind: of work that takes about as long each time, so that a stuck rank differs from a busy one.
        """
        now, before = time.monotonic(), self._place
        if before.kind:
            self._longest[before.kind] = max(self._longest.get(before.kind, 0.0), now - before.since)
        self._place = _Place(where, timeout_seconds, now, kind)

    @property
    def where(self) -> str:
        """What the main thread does."""
        return self._place.where

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told = False
        while not self._stop.wait(min(1.0, 0.05 * self._place.timeout)):
            place = self._place
            idle, timeout = time.monotonic() - place.since, place.timeout
            if idle > self._stuck_after(place.kind) and (number := self.signal_received()):
                self._leave(number, idle)
                return
            if idle <= SPEAKS_AT * timeout:
                told = False
            elif not told:
                told = True
                self._tell(idle)
            elif idle > ENDS_AT * timeout:
                print(f"rank {self.rank} is ended after {idle:.0f} s without progress", file=sys.stderr, flush=True)
                self._end(1)
                return

    def _stuck_after(self, kind: str) -> float:
        longest = self._longest.get(kind)
        return math.inf if longest is None else max(STUCK_SECONDS, STUCK_FACTOR * longest)

    def _leave(self, number: int, idle: float) -> None:
        print(
            f"rank {self.rank}: {signal.Signals(number).name}, but no progress for {idle:.0f} s in {self.where}: "
            "another rank is gone; ends without saving",
            file=sys.stderr,
            flush=True,
        )
        self._end(1)

    def _tell(self, idle: float) -> None:
        """Leave this rank's place for the others; the first to do so prints the places of all."""
        self.store.set(f"hbp_titan/stands/{self.rank}", f"{self.where}: {place_of(self._watched)}")
        if self.store.add("hbp_titan/stands", 1) != 1:
            return
        # The others come to the same conclusion within a second or two.
        self._stop.wait(min(5.0, 0.1 * self._place.timeout))
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
