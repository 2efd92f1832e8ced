"""OutOfMemory: where memory ran out, and what torch says of it.

Owns the recognition of the error, which has another type on a GPU than on a CPU, and the figures in torch's words. What
to do about it is memory_advice.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

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
