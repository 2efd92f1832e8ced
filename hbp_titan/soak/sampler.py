"""Memory and handles of a run's processes over time, and whether they are flat.

Owns the samples and the criterion. A process counts from its first checkpoint on, which brings a buffer and connections
that stay. Levels and saves come and go, so peaks are compared: it is flat where the peak of the last third of its time
exceeds that of the two before by at most MEMORY_GROWTH and MEMORY_SLACK_BYTES together, and by HANDLE_SLACK handles.
In a life of a minute or two a third holds a few packs and a save or none, and its peak is chance: such lives are judged
together, by the median of what their last thirds exceed the others by. Chance has both signs, a leak has one.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hbp_titan.components.checkpoint import completed
from hbp_titan.soak.processes import open_handles, ranks_of, resident_bytes

MEMORY_GROWTH, MEMORY_SLACK_BYTES, HANDLE_SLACK = 0.05, 16 << 20, 2
LONG_SECONDS = 600
"""From then on a life is judged by itself."""
_MIN_SAMPLES = 16


@dataclass
class Lifetime:
    """One process. samples: (seconds since the soak's start, bytes, handles) from its first checkpoint on."""

    name: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first to the last sample."""
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def peaks(self, column: int) -> list[float]:
        """The largest value of a column in each third of the samples."""
        size = len(self.samples)
        return [max(s[column] for s in self.samples[size * n // 3 : size * (n + 1) // 3]) for n in range(3)]

    def faults(self) -> list[str]:
        """What is not flat, a line each."""
        *memory, last_memory = self.peaks(1)
        *handles, last_handles = self.peaks(2)
        where = f"{self.name} (process {self.pid}, {self.seconds:.0f} s)"
        found = []
        if last_memory > max(memory) * (1 + MEMORY_GROWTH) + MEMORY_SLACK_BYTES:
            found.append(f"{where}: memory grew from {max(memory) / 2**20:.0f} to {last_memory / 2**20:.0f} MiB")
        if last_handles > max(handles) + HANDLE_SLACK:
            found.append(f"{where}: handles grew from {max(handles):.0f} to {last_handles:.0f}")
        return found


def growth(lives: Sequence[Lifetime], long_seconds: float = LONG_SECONDS) -> list[str]:
    """What is not flat: of each life of `long_seconds` or more, and of the shorter ones of the ranks together."""
    found = [fault for life in lives if life.seconds >= long_seconds for fault in life.faults()]
    short = [life for life in lives if life.seconds < long_seconds and life.name != "torchrun"]
    for what, column, unit, slack in (("memory", 1, 2**20, MEMORY_SLACK_BYTES), ("handles", 2, 1, HANDLE_SLACK)):
        grown = [last - max(before) for *before, last in (life.peaks(column) for life in short)]
        if grown and statistics.median(grown) > slack:
            size = f"{statistics.median(grown) / unit:.0f}{' MiB' if unit > 1 else ''}"
            found.append(f"{what} grew by {size} in the median of {len(grown)} lives shorter than {long_seconds:.0f} s")
    return found


class Sampler:
    """A thread that samples torchrun and its ranks. launcher: torchrun's process id, None while there is none."""

    def __init__(self, folder: Path, launcher: Callable[[], int | None], interval_seconds: float) -> None:
        self.folder = folder
        self.launcher = launcher
        self.interval = interval_seconds
        self.lifetimes: dict[int, Lifetime] = {}
        self._saved_at_birth: dict[int, list[Path]] = {}
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def judged(self, min_seconds: float) -> list[Lifetime]:
        """The processes that trained for at least `min_seconds`."""
        found = self.lifetimes.values()
        return [life for life in found if life.seconds >= min_seconds and len(life.samples) >= _MIN_SAMPLES]

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            launcher = self.launcher()
            if launcher is None:
                continue
            saved = completed(self.folder / "checkpoint")[-1:]
            for name, pid in {"torchrun": launcher, **{f"rank {r}": p for r, p in ranks_of(launcher).items()}}.items():
                life = self.lifetimes.setdefault(pid, Lifetime(name, pid))
                if saved != self._saved_at_birth.setdefault(pid, saved):
                    memory, handles = resident_bytes(pid), open_handles(pid)
                    if memory and handles:
                        life.samples.append((time.monotonic() - self._start, memory, handles))
