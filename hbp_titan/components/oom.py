"""OutOfMemory: where memory ran out, and what torch says of it.

Owns the recognition of the error, which has another type on a GPU than on a CPU, and the figures in torch's words. What
to do about it is memory_advice.py's.

How much memory a rank has, and how much a piece of work takes, on a GPU or a CPU, to the byte.

Owns the measurement: CUDA's allocator keeps the statistics itself; on the CPU torch's profiler reports every
allocation and release, also those inside operators (work is slower while it watches: do not time it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from hbp_titan.packing import Level

SETTING_UP, TRAINING, UPDATE, VALIDATION = "setting up", "training", "the optimizer step", "validation"

# In errors that have no type of their own. NCCL allocates when a communicator is first used, outside of torch's
# allocator, and raises DistBackendError with "unhandled cuda error" and one of the next two lines (NVIDIA/nccl #2363).
_PHRASES = (
    "DefaultCPUAllocator: can't allocate memory",
    "Failed to CUDA calloc",
    "Failed to CUDA host alloc",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"


@dataclass(frozen=True)
class TorchFigures:
    """Bytes, 0 where torch does not say. tried: of the tensor that was one too many. allocated: of all other tensors.
    unallocated: held back by the allocator, in pieces too small for it."""

    tried: int = 0
    allocated: int = 0
    unallocated: int = 0

    @classmethod
    def of(cls, message: str) -> TorchFigures:
        """As the message of CUDA's caching allocator, or of the CPU's, has them."""
        return cls(
            tried=_bytes(rf"[Tt]ried to allocate {_SIZE}", message),
            allocated=_bytes(rf"{_SIZE} is allocated by PyTorch", message),
            unallocated=_bytes(rf"{_SIZE} is reserved by PyTorch but unallocated", message),
        )


class OutOfMemory(RuntimeError):
    """work: what was being done, one of the constants above; level: the one that was active, None where it does not
    matter; figures: torch's."""

    def __init__(self, work: str, level: Level | None, figures: TorchFigures) -> None:
        at = "" if level is None else f" at the level with max_tokens={level.max_tokens}, cp_degree={level.cp_degree}"
        super().__init__(f"out of memory in {work}{at}")
        self.work, self.level, self.figures = work, level, figures


@contextmanager
def out_of_memory_in(work: str, level: Level | None = None) -> Iterator[None]:
    """Raise OutOfMemory where the body runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(work, level, TorchFigures.of(str(error))) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: in torch's allocator of a GPU or of the CPU, in the CUDA runtime, or in NCCL."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def _bytes(pattern: str, message: str) -> int:
    found = re.search(pattern, message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


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
