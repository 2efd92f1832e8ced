"""WorkClock: how long each iteration of this rank took, and how much of that it worked rather than waited.

Owns the reading of both on a CPU and on a GPU. Ranks wait for each other inside collectives, so wall time is the same
on all of them and says nothing of who was slow. On a CPU a waiting thread sleeps: its own CPU time is its work. On a
GPU a waiting collective spins: the work is taken between a block's parameters being there and its output, on the
stream, over all blocks' forward passes, which is in proportion to the whole. Work is compared between ranks only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hbp_titan.models.decoder import Decoder


class WorkClock:
    """Made after the model is parallelized, so that its hooks lie inside FSDP's: those wait, these do not."""

    def __init__(self, model: Decoder, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._cpu: list[tuple[float, float]] = []
        # For each iteration the events at its two ends, then those around each block's forward.
        self._gpu: list[list[torch.cuda.Event]] = []
        self._blocks: list[torch.cuda.Event] | None = None
        if self.on_gpu:
            for block in model.blocks():
                block.register_forward_pre_hook(self._mark)
                block.register_forward_hook(self._mark, prepend=True)

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Around one forward and backward."""
        if self.on_gpu:
            self._blocks = []
            start = _recorded()
            yield
            self._gpu.append([start, _recorded(), *self._blocks])
            self._blocks = None
        else:
            wall, work = time.perf_counter(), time.thread_time()
            yield
            self._cpu.append((time.perf_counter() - wall, time.thread_time() - work))

    def read(self) -> list[tuple[float, float]]:
        """(wall, work) in seconds of each iteration since the last call; on a GPU waits for the last to end."""
        if self.on_gpu:
            torch.cuda.synchronize()
            read = [_seconds(events) for events in self._gpu]
        else:
            read = self._cpu
        self._cpu, self._gpu = [], []
        return read

    def _mark(self, *_: Any) -> None:
        # Validation and the probe run the blocks too, outside of any iteration.
        if self._blocks is not None:
            self._blocks.append(_recorded())


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(events: list[torch.cuda.Event]) -> tuple[float, float]:
    start, end, *marks = events
    work = sum(a.elapsed_time(b) for a, b in zip(marks[::2], marks[1::2], strict=True))
    return start.elapsed_time(end) / 1000, work / 1000
