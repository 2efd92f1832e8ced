"""How much memory a rank has, and how much a piece of work takes, on a GPU or a CPU, to the byte.

Owns the measurement: CUDA's allocator keeps the statistics itself; on the CPU torch's profiler reports every
allocation and release, also those inside operators (work is slower while it watches: do not time it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


def device_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank can use: of its GPU what others leave, of a machine with `local_ranks` ranks its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks


@dataclass
class MemoryUse:
    """Bytes above what was held when the measurement began: the most at any time, and what is held at its end.

    On the CPU only what the body itself allocates counts; what it releases of earlier memory does not.
    """

    peak_bytes: int = 0
    held_bytes: int = 0


@contextmanager
def measure_memory(device: torch.device) -> Iterator[MemoryUse]:
    """Measure the body; the yielded MemoryUse is filled when it ends. Resets CUDA's peak statistics."""
    use = MemoryUse()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield use
        use.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        use.held_bytes = torch.cuda.memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield use
    assert prof.profiler is not None
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        use.held_bytes += event.nbytes()
        use.peak_bytes = max(use.peak_bytes, use.held_bytes)
