"""Out of memory: recognizing the error, torch's figures in it, and how much memory a rank has.

A GPU, a CPU and NCCL raise different errors for it. What to change in the configuration is tuning/oom_advice.py's
knowledge, which is loaded only when memory has run out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch

from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World
from hbp_titan.errors import UserError
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level, Plan

SETTING_UP, TRAINING, UPDATE, VALIDATION = "setting up", "training", "the optimizer step", "validation"

# Errors without a type of their own. NCCL allocates when a communicator is first used, outside of torch's allocator,
# and raises DistBackendError with "unhandled cuda error" and one of these lines (NVIDIA/nccl #2363).
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
    """Figures of torch's message in bytes, 0 if absent.

    tried: size of the failed allocation; allocated: of all other tensors; unallocated: reserved but fragmented.
    """

    tried: int = 0
    allocated: int = 0
    unallocated: int = 0

    @classmethod
    def of(cls, message: str) -> TorchFigures:
        """Parse a message of CUDA's caching allocator or of the CPU's."""
        return cls(
            tried=_bytes(rf"[Tt]ried to allocate {_SIZE}", message),
            allocated=_bytes(rf"{_SIZE} is allocated by PyTorch", message),
            unallocated=_bytes(rf"{_SIZE} is reserved by PyTorch but unallocated", message),
        )


class OutOfMemory(RuntimeError):
    """work: what ran out, one of the constants above; level: the active one, None if it does not matter."""

    def __init__(self, work: str, level: Level | None, figures: TorchFigures) -> None:
        at = "" if level is None else f" at the level with max_tokens={level.max_tokens}, cp_degree={level.cp_degree}"
        super().__init__(f"out of memory in {work}{at}")
        self.work, self.level, self.figures = work, level, figures


@contextmanager
def out_of_memory_in(work: str, level: Level | None = None) -> Iterator[None]:
    """Raise OutOfMemory if the body runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(work, level, TorchFigures.of(str(error))) from error


class OOMAdvice:
    """Context manager that turns OutOfMemory into UserError with the fastest change that fits; other errors pass.

    plan: the epoch's, once there is one: its packs say which change costs least.
    """

    def __init__(self, config: JobConfig, args: ModelArgs, world: World) -> None:
        self.config, self.args, self.world = config, args, world
        # Before the levels are resolved: the advice may be to measure again.
        self.measures_levels = config.measures_levels
        self.plan: Plan | None = None

    def __enter__(self) -> OOMAdvice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OutOfMemory):
            # Only now: the estimates trace the model, which takes seconds and which a run that fits never needs.
            from hbp_titan.tuning.oom_advice import advice

            raise UserError(
                advice(error, self.config, self.args, self.world, self.plan, self.measures_levels)
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out: in torch's allocators (GPU, CPU), in the CUDA runtime, or in NCCL."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def _bytes(pattern: str, message: str) -> int:
    found = re.search(pattern, message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def device_memory(device: torch.device, local_ranks: int) -> int:
    """Return the bytes that this rank can use: what others leave of its GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        # What the allocator holds is this rank's as well, though CUDA counts it as used.
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_ranks
