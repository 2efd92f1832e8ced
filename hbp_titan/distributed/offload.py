"""Activations in host memory between a block's forward and its backward, for levels with an offload policy.

Owns the buffers in host memory and the copies to and from them. On a GPU the buffers are pinned and copies run on a
stream of their own, next to the computation (after torchtune's OffloadActivations, which knows no levels):

    forward    copy block i | meanwhile compute block i + 1 | free block i's device memory when block i + 1 ends
    backward   copy block i - 1 back | meanwhile compute block i

Buffers are kept for the next micro-batch: allocating pinned memory takes longer than a step. On a CPU the same code
copies to a second buffer, at once.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hbp_titan.errors import UserError
from hbp_titan.utils import human_bytes

_ALIGNMENT = 64
"""Bytes; enough for every dtype."""
# cudaHostRegisterPortable.
_PORTABLE = 1


@dataclass
class _Kept:
    """One tensor that a block keeps; `uses` counts its saved references, which autograd unpacks once each.

    source: the tensor on the device, detached from the graph, until its copy to `host` has ended. fetched: its copy
        back on the device.
    """

    source: Tensor | None
    host: Tensor
    uses: int = 1
    fetched: Tensor | None = None


@dataclass
class _Block:
    """What one block keeps. copied, arrived: the ends of its copies to the host and back, None on a CPU.

    host_bytes: taken of the block's host memory.
    """

    index: int
    host_bytes: int = 0
    kept: list[_Kept] = field(default_factory=list)
    copied: torch.cuda.Event | None = None
    arrived: torch.cuda.Event | None = None


class HostActivations:
    """Host memory for the activations of all blocks of a rank.

    The forwards and backwards of a micro-batch must alternate: all blocks forward, then all blocks backward.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # By (block, first byte). A block has one buffer, because the sizes of what it keeps depend on the documents of
        # a pack, but not their sum; what does not fit gets buffers of its own until the block's next forward.
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._needed: dict[int, int] = {}
        self._blocks: list[_Block] = []

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory that are allocated."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @contextmanager
    def block(self, index: int, shared: Sequence[Tensor]) -> Iterator[None]:
        """Keep what autograd saves in this context in host memory.

        index: of the block, ascending in a forward. shared: tensors of all blocks, which stay on the device.
        """
        if self._blocks and index <= self._blocks[-1].index:
            # A new forward although the last one had no backward, for example after an error.
            self._blocks.clear()
        block = _Block(index)
        by_place: dict[Any, _Kept] = {}
        stays = {tensor.untyped_storage()._cdata for tensor in shared}

        def pack(tensor: Tensor) -> Any:
            # Nothing of size 0 can be pinned: a pass of attention may have no queries.
            if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
                return tensor
            storage = tensor.untyped_storage()._cdata
            if storage in stays:
                return tensor
            # Several operators save the same tensor. `source` keeps its storage from being used again in this block.
            place = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            if place in by_place:
                by_place[place].uses += 1
            else:
                by_place[place] = self._copy_to_host(block, tensor)
            return block, by_place[place]

        def unpack(packed: Any) -> Tensor:
            return self._device_tensor(*packed) if isinstance(packed, tuple) else packed

        with saved_tensors_hooks(pack, unpack):
            yield
        if self.stream is not None:
            block.copied = self.stream.record_event()
        # The previous block's copies ran during this block.
        for earlier in self._blocks[-1:]:
            self._free_sources(earlier)
        self._blocks.append(block)

    def _copy_to_host(self, block: _Block, tensor: Tensor) -> _Kept:
        host = self._buffer((block.index, block.host_bytes), tensor)
        block.host_bytes += -(-host.nbytes // _ALIGNMENT) * _ALIGNMENT
        kept = _Kept(tensor.detach(), host)
        block.kept.append(kept)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        assert kept.source is not None
        self._copy(host, kept.source)
        return kept

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def _buffer(self, key: tuple[int, int], tensor: Tensor) -> Tensor:
        """Return host memory of the tensor's shape and dtype; it grows to the largest level's. key: as of _buffers."""
        (index, start), nbytes = key, tensor.numel() * tensor.element_size()
        needed = self._needed[index] = max(self._needed.get(index, 0), start + nbytes)
        if start == 0 and ((index, 0) not in self._buffers or self._buffers[index, 0].nbytes < needed):
            if self.stream is not None:
                # A copy of the last micro-batch may still use the smaller ones, which are freed first.
                self.stream.synchronize()
            for old in [old for old in self._buffers if old[0] == index]:
                del self._buffers[old]
            # Alignment makes the sum vary a little.
            self._buffers[key] = self._allocate(needed if needed == nbytes else needed + needed // 128)
        whole = self._buffers[index, 0]
        if start + nbytes > whole.nbytes:
            whole, start = self._allocate(nbytes), 0
            self._buffers[key] = whole
        return whole[start : start + nbytes].view(tensor.dtype).view(tensor.shape)

    def _allocate(self, nbytes: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8)
        return host_memory(nbytes, True, "activations; lower levels.offload_layers, or raise the job's memory limit")

    def _free_sources(self, block: _Block) -> None:
        """Drop the device tensors of a block whose copies have ended by the time the device gets here."""
        if block.copied is not None:
            # The allocator may hand their memory to the current stream now, so that stream must wait.
            torch.cuda.current_stream(self.device).wait_event(block.copied)
        for kept in block.kept:
            kept.source = None

    def _device_tensor(self, block: _Block, kept: _Kept) -> Tensor:
        """Return a kept tensor on the device, and start to fetch those of the block before."""
        if self._blocks and self._blocks[-1] is block:
            # The first use in this block's backward.
            self._blocks.pop()
            self._fetch(block)
            for earlier in self._blocks[-1:]:
                self._fetch(earlier)
            if block.copied is not None:
                # The copy to the host may still read what autograd frees next.
                torch.cuda.current_stream(self.device).wait_event(block.copied)
            if block.arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(block.arrived)
        assert kept.fetched is not None
        tensor = kept.fetched
        kept.uses -= 1
        if not kept.uses:
            # Autograd holds what it still needs.
            kept.fetched = None
        return tensor

    def _fetch(self, block: _Block) -> None:
        if any(kept.fetched is not None for kept in block.kept):
            return
        if block.kept and block.kept[0].source is not None:
            # The last block of the forward: nothing has freed its tensors.
            for kept in block.kept:
                kept.source, kept.fetched = None, kept.source
            return
        # Allocated on the current stream, which frees them; the copies wait until it may have used the memory before.
        for kept in block.kept:
            kept.fetched = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self.device)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for kept in block.kept:
            assert kept.fetched is not None
            self._copy(kept.fetched, kept.host)
        if self.stream is not None:
            block.arrived = self.stream.record_event()


def host_memory(nbytes: int, pin: bool, use: str) -> Tensor:
    """Return host memory of its own pages, uint8 [nbytes], pinned on request; freed with the tensor.

    torch's own allocator of pinned memory takes the next power of two (CachingHostAllocator, torch 2.11 to 2.13), up to
    twice as much. As torch.distributed's state dicts, this registers memory instead. Raises UserError if there is not
    enough of it. use: for the message, what it is for and what to change.
    """
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Loader workers are forked at each epoch, and Linux copies pinned pages for a child at once.
    block.madvise(mmap.MADV_DONTFORK)
    buffer = torch.frombuffer(block, dtype=torch.uint8)
    if pin:
        runtime = torch.cuda.cudart()
        if code := int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, _PORTABLE)):
            raise UserError([f"{human_bytes(nbytes)} of host memory could not be pinned (CUDA error {code}) for {use}"])
        # Not at exit, when the CUDA runtime may be gone.
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer
