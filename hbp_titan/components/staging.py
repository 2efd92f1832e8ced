"""Host copies of what is about to be saved, so that training goes on while they are written.

Owns one buffer in host memory, allocated at the first save and used again by every later one. Forked processes do not
inherit it.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Of each tensor in the buffer: enough for any dtype.
_ALIGNMENT = 64
# cudaHostRegisterPortable.
_PORTABLE = 1


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class HostBuffer:
    """The local parts of a set of tensors in one block of host memory, pinned where they come from a GPU."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CPU copies of the local parts, by name; good until the next call. Returns when the last byte is there."""
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        ends = [0]
        for part in parts.values():
            ends.append(ends[-1] + -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT)
        on_gpu = any(part.is_cuda for part in parts.values())
        if self._block.numel() < ends[-1]:
            self._allocate(ends[-1], on_gpu)
        copies = {}
        for (name, part), start in zip(parts.items(), ends, strict=False):
            room = self._block[start : start + part.nbytes]
            copies[name] = room.view(part.dtype).view(part.shape)
            copies[name].copy_(part, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _allocate(self, size: int, pinned: bool) -> None:
        self.close()
        if not size:
            return
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Loader workers are forked at each epoch, and Linux gives a child a copy of pinned pages at once. They do not
        # need these.
        block.madvise(mmap.MADV_DONTFORK)
        self._block = torch.frombuffer(block, dtype=torch.uint8)
        if pinned:
            # torch's own pinned allocator would round up to a power of two: gigabytes here.
            _check(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), size, _PORTABLE))

    def close(self) -> None:
        """Give the memory back."""
        if self._block.is_pinned():
            _check(torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr()))
        self._block = torch.empty(0, dtype=torch.uint8)


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"host memory for checkpoints could not be pinned or given back: CUDA error {int(code)}")
