"""An engine as benchmarks use it: timed, its memory measured, and replaced where memory did not suffice.

Owns what one iteration of a benchmark is, and what its time and its peak of memory mean on one rank and on several.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.components.optimizer import build_optimizer
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, all_reduce_values, barrier
from hbp_titan.levels.engine import Engine
from hbp_titan.levels.memory import measure_memory
from hbp_titan.models.decoder import ModelArgs

T = TypeVar("T")


class EngineSlot:
    """At most one engine at a time, with its optimizer; rebuilt after a failure for want of memory.

    FSDP's state is not to be trusted after an exception in the middle of an iteration, so the engine goes with it.
    """

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, optimizer_step: bool = False) -> None:
        self.config = config
        self.args = args
        self.world = world
        self.optimizer_step = optimizer_step
        self.engine: Engine | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def set_layers(self, layers: int) -> None:
        """Continue with a model of so many layers."""
        if layers != self.args.num_layers:
            self.clear()
            self.args = dataclasses.replace(self.args, num_layers=layers)

    def clear(self) -> None:
        """Free the engine."""
        self.engine = self.optimizer = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def attempt(self, work: Callable[..., T], *inputs: Any) -> T | None:
        """work(engine, *inputs); None where memory does not suffice.

        On several ranks that is an error: the others may wait in a collective that this rank has left.
        """
        try:
            if self.engine is None:
                # Graphs of an earlier model would count towards the compiler's limit.
                torch._dynamo.reset()
                self.engine = Engine(self.config, self.args, self.world)
                if self.optimizer_step:
                    self.optimizer = build_optimizer(self.engine.model, self.config.optimizer)
            return work(self.engine, *inputs)
        except RuntimeError as error:
            failures = (error, error.__cause__)
            if self.world.size > 1 or not any(isinstance(e, torch.OutOfMemoryError) for e in failures):
                raise
        # Here the exception is gone, and the tensors that its traceback held.
        self.clear()
        return None

    def iterate(self, engine: Engine, batch: PackedBatch) -> None:
        """One iteration, with the optimizer's step where it is asked for; gradients are gone afterwards."""
        engine.forward_backward(batch)
        if self.optimizer is not None:
            self.optimizer.step()
        engine.model.zero_grad()

    def seconds(self, engine: Engine, batches: Sequence[PackedBatch]) -> float:
        """Time of iterations one after another: from when all ranks are ready to when the slowest is done."""
        self._wait_for_device()
        barrier()
        started = time.perf_counter()
        for batch in batches:
            self.iterate(engine, batch)
        self._wait_for_device()
        return all_reduce_values([time.perf_counter() - started], "max", self.world.device)[0]

    def peak_bytes(self, engine: Engine, batch: PackedBatch) -> int:
        """Most memory held during one iteration, on the rank that holds most."""
        held = self._held_bytes(engine)
        with measure_memory(self.world.device) as use:
            self.iterate(engine, batch)
        return int(all_reduce_values([held + use.peak_bytes], "max", self.world.device)[0])

    def _held_bytes(self, engine: Engine) -> int:
        if self.world.device.type == "cuda":
            return torch.cuda.memory_allocated(self.world.device)
        states = self.optimizer.state.values() if self.optimizer else ()
        held: list[Tensor] = [*engine.model.parameters(), *(value for state in states for value in state.values())]
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in held)

    def _wait_for_device(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
