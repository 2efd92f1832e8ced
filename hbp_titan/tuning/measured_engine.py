"""An engine for measurements: micro-batches are timed, peaks of memory measured, out of memory survived.

Owns what one measured micro-batch is, what memory is held around it, and the recovery after running out of memory.
Profiles (profile.py) and benchmarks (experiments/bench_train.py) measure with it.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from hbp_titan.components.oom import OutOfMemory, is_out_of_memory
from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm
from hbp_titan.config import JobConfig
from hbp_titan.data.batch import PackedBatch
from hbp_titan.distributed.world import World, all_reduce_values, any_rank, barrier
from hbp_titan.engine import Engine, LevelRuntime
from hbp_titan.job_config import NEW_WEIGHTS
from hbp_titan.models.configs import ModelArgs
from hbp_titan.packing import Level

T = TypeVar("T")

LONE_OOM_SECONDS = 60
"""How long a rank out of memory waits for the others, which normally run out at the same operator."""


class MeasuredEngine:
    """At most one engine with its optimizer, built on first use and again after running out of memory.

    levels: of the engine; `level_index` may add more.
    accumulate: gradients and optimizer state exist before a micro-batch and stay, as within an optimizer step of a run.
        Otherwise each micro-batch is a step by itself and leaves no gradients; AdamW's step is part of it with
        optimizer_step.
    load_weights: the initial ones; weights affect neither time nor memory.
    """

    def __init__(
        self,
        config: JobConfig,
        args: ModelArgs,
        world: World,
        levels: Sequence[Level],
        *,
        accumulate: bool = False,
        optimizer_step: bool = False,
        load_weights: bool = False,
    ) -> None:
        self.config = copy.deepcopy(config)
        self.config.levels = list(levels)
        if not load_weights:
            self.config.checkpoint.initial_load_path = NEW_WEIGHTS
        self.args, self.world = args, world
        self.accumulate, self.optimizer_step = accumulate, optimizer_step
        self.levels = list(levels)
        self._engine: Engine | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def engine(self) -> Engine:
        """The engine, built on first use."""
        if self._engine is None:
            # Graphs of an earlier engine would count towards the compiler's limit.
            torch._dynamo.reset()
            self._engine = Engine(self.config, self.args, self.world)
            self._add_levels(self._engine.runtime)
            if self.accumulate or self.optimizer_step:
                self._optimizer = build_optimizer(self._engine.model, self.config.optimizer)
            if self.accumulate:
                for parameter in self._engine.model.parameters():
                    parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        return self._engine

    def clear(self) -> None:
        """Free the engine."""
        self._engine = self._optimizer = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def set_layers(self, layers: int) -> None:
        """Continue with a model of `layers` layers."""
        if layers != self.args.num_layers:
            self.clear()
            self.args = self.args.with_layers(layers)

    def level_index(self, level: Level) -> int:
        """Return the index of `level`, which is added if it differs in checkpointing from those the engine has."""
        if level not in self.levels:
            self.levels.append(level)
            if self._engine is not None:
                self._add_levels(self._engine.runtime)
        return self.levels.index(level)

    def _add_levels(self, runtime: LevelRuntime) -> None:
        # Meshes depend only on the cp shape, so no group is made here.
        shapes = [level.cp_shape(self.args.num_kv_heads) for level in runtime.levels]
        for level in self.levels[len(runtime.levels) :]:
            runtime.levels = (*runtime.levels, level)
            runtime.meshes.append(runtime.meshes[shapes.index(level.cp_shape(self.args.num_kv_heads))])

    def run(self, batch: PackedBatch) -> None:
        """Run one micro-batch."""
        self.engine.forward_backward(batch)
        if not self.accumulate:
            if self._optimizer is not None:
                self._optimizer.step()
            # To None, so that the next micro-batch allocates its gradients as the first one did.
            self.engine.model.zero_grad()

    def seconds(self, batches: Sequence[PackedBatch]) -> float | None:
        """Return the time of consecutive micro-batches, from when all ranks are ready to when the slowest is done.

        None if a rank runs out of memory.
        """

        def timed(_: Engine) -> float:
            self._synchronize()
            barrier()
            started = time.perf_counter()
            for batch in batches:
                self.run(batch)
            self._synchronize()
            return time.perf_counter() - started

        # The reduction is outside of the attempt: a rank out of memory would not take part in it.
        seconds = self.attempt(timed)
        return None if seconds is None else all_reduce_values([seconds], "max", self.world.device)[0]

    def peak_bytes(self, batch: PackedBatch, warm_up: bool = True) -> int | None:
        """Return the most bytes that any rank holds during a micro-batch; None if a rank runs out of memory.

        warm_up: run it once before, unmeasured. Compilation always needs that: it has a peak of its own.
        """

        def measured(_: Engine) -> int:
            if warm_up or self.config.compile.enable:
                self.run(batch)
            held = self.held_bytes()
            with measure_memory(self.world.device) as use:
                self.run(batch)
            return held + use.peak_bytes

        peak = self.attempt(measured)
        return None if peak is None else int(all_reduce_values([float(peak)], "max", self.world.device)[0])

    def step_seconds(self, repeats: int = 3) -> float:
        """Return the median time of clipping, the optimizer's step and the reduction of the losses."""
        engine, taken = self.engine, []
        assert self._optimizer is not None
        for _ in range(repeats):
            self._synchronize()
            barrier()
            started = time.perf_counter()
            float(clip_grad_norm(engine.model, self.config.training.max_norm))
            all_reduce_values([0.0] * len(self.config.levels), "sum", self.world.device)
            self._optimizer.step()
            self._synchronize()
            taken.append(time.perf_counter() - started)
        return all_reduce_values([sorted(taken)[repeats // 2]], "max", self.world.device)[0]

    def held_bytes(self) -> int:
        """Return the bytes that this rank holds between micro-batches."""
        parameters = list(self.engine.model.parameters())
        if self.world.device.type == "cuda":
            return torch.cuda.memory_allocated(self.world.device)
        # On the CPU no allocator keeps statistics, so tensors are counted.
        states = [] if self._optimizer is None else list(self._optimizer.state.values())
        held: list[Tensor] = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        held += [value for state in states for value in state.values()]
        host = self.engine.runtime.ac_state.host
        buffers = 0 if host is None else host.buffer_bytes
        return buffers + sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in held)

    def attempt(self, work: Callable[[Engine], T]) -> T | None:
        """Return what `work` of the engine returns; None on every rank, and no engine, if any rank runs out of memory.

        All ranks must run the same shapes, so that they run out together, at the same operator. They then agree in the
        control group: in a group that computes, NCCL would pair the agreement with the next collective of a rank that
        continues. If one rank alone runs out (the GPUs of a job differ by what else is on them), the others wait for it
        in such a collective, which cannot be cancelled; the rank then raises ValueError after LONE_OOM_SECONDS.
        """
        result, failed = None, False
        try:
            result = work(self.engine)
        except RuntimeError as error:
            if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
            failed = True
        # Outside of the except block the exception is gone, and with it the tensors that its traceback held.
        if self._any_rank(failed):
            # FSDP's state is undefined after an exception in the middle of a micro-batch.
            self.clear()
            return None
        return result

    def _any_rank(self, failed: bool) -> bool:
        try:
            return any_rank(failed, timeout_seconds=LONE_OOM_SECONDS if failed else None)
        except RuntimeError:
            if not failed:
                raise
            raise ValueError(
                f"rank {self.world.rank}: out of memory on this rank alone while levels are measured; end other "
                "processes on its GPU (nvidia-smi), or use [[levels]] blocks that need less"
            ) from None

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


@dataclass
class MemoryUse:
    """Peak and final bytes relative to the start of the measurement.

    On the CPU, memory that was allocated before and is released inside does not count.
    """

    peak_bytes: int = 0
    held_bytes: int = 0


@contextmanager
def measure_memory(device: torch.device) -> Iterator[MemoryUse]:
    """Measure the body to the byte; the yielded MemoryUse is filled when it ends. Resets CUDA's peak statistics.

    On the CPU torch's profiler reports every allocation, inside operators too; do not time the body at the same time.
    """
    use = MemoryUse()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield use
        use.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        use.held_bytes = torch.cuda.memory_allocated(device) - before
        return
    # torch has no allocation counters for the CPU; the profiler sees every one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield use
    assert prof.profiler is not None
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        use.held_bytes += event.nbytes()
        use.peak_bytes = max(use.peak_bytes, use.held_bytes)
