"""The most memory that iterations of each level hold, while training runs.

Owns the reading: the allocator's peak on a GPU, the process's resident set on a CPU (levels/memory.py measures to the
byte, and too slowly for training).
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


class MemoryUse:
    """`add` after every iteration. peak: the most so far, GiB, as the last `take` saw it.

    On a GPU a level's figure is the peak of active memory during its iterations, and CUDA's peak statistics are reset;
    on a CPU it is the resident set after them.
    """

    def __init__(self, device: torch.device, num_levels: int) -> None:
        self.device = device
        self.peak = 0.0
        self._levels = [0.0] * num_levels

    def add(self, level: int) -> None:
        """An iteration of `level` has been launched. It may still run: a GPU allocates as work is launched."""
        held = self._read()
        self._levels[level] = max(self._levels[level], held)
        self.peak = max(self.peak, held)

    def take(self) -> list[float]:
        """GiB by level since the last call, 0 for those that did not run."""
        self.peak = max(self.peak, self._read() if self.device.type == "cuda" else _peak_resident())
        levels, self._levels = self._levels, [0.0] * len(self._levels)
        return levels

    def _read(self) -> float:
        if self.device.type == "cuda":
            active = torch.cuda.memory_stats(self.device)["active_bytes.all.peak"]
            torch.cuda.reset_peak_memory_stats(self.device)
            return active / 2**30
        if not _STATM.exists():
            return _peak_resident()
        return int(_STATM.read_text().split()[1]) * resource.getpagesize() / 2**30


def _peak_resident() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
