"""The engine as a profile uses it: any level at any depth, iterations timed, peaks measured, out of memory survived.

Owns what one measured iteration is, what is held beside it, and what happens when memory does not suffice.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp_titan.components.optimizer import build_optimizer, clip_grad_norm
from hbp_titan.config import JobConfig
from hbp_titan.distributed.world import World, all_reduce_values, any_rank, barrier, ranks_per_node
from hbp_titan.levels.engine import Engine
from hbp_titan.levels.memory import device_memory, measure_memory
from hbp_titan.levels.out_of_memory import OutOfMemory, is_out_of_memory
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.selection.profile_packs import Packs

T = TypeVar("T")

ALONE_SECONDS = 60
"""How long a rank out of memory waits for the others, which run out at the same operator if they do."""


def available_memory(world: World) -> int:
    """Bytes that a rank can use, the least over all ranks: of its GPU what others leave, of a machine its share."""
    own = device_memory(world.device, ranks_per_node(world.size))
    return int(-all_reduce_values([-float(own)], "max", world.device)[0])


class ProfileEngine:
    """At most one engine with its optimizer, made when it is first needed.

    Out of memory ends the iteration on the rank where it is raised. Every rank runs the same shapes on packs with the
    same documents, so ranks run out together, at the same operator; they then agree in the control group, and the
    engine is built again, because FSDP's state is not to be trusted after a broken iteration. The groups that compute
    carry no agreement: NCCL would pair it with the next collective of a rank that goes on. Where one rank alone runs
    out (GPUs of a job differ by what else is on them), the others wait for it in such a collective, which cannot be
    taken back: the rank ends the run after ALONE_SECONDS. An estimate keeps what surely does not fit from being tried.
    """

    def __init__(self, config: JobConfig, args: ModelArgs, world: World, levels: Sequence[Level]) -> None:
        self.config = copy.deepcopy(config)
        self.config.levels = list(levels)
        # Weights do not matter to time or memory.
        self.config.checkpoint.initial_load_path = ""
        self.args, self.world = args, world
        self._engine: Engine | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def clear(self) -> None:
        """Free the engine."""
        self._engine = self._optimizer = None
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, level: Level, packs: Packs) -> int | None:
        """The most that a rank holds during an iteration on the heaviest pack; None where memory does not suffice.

        Gradients and optimizer state are there before, as in every step but a run's first.
        """

        def measured() -> int:
            if self.config.compile.enable:
                self._iterate(level, packs, packs.heaviest)  # compilation has a peak of its own
            held = self.held_bytes()
            with measure_memory(self.world.device) as use:
                self._iterate(level, packs, packs.heaviest)
            return held + use.peak_bytes

        peak = self._attempt(measured)
        return None if peak is None else int(all_reduce_values([float(peak)], "max", self.world.device)[0])

    def seconds(self, level: Level, packs: Packs, number: int) -> float | None:
        """Time of an iteration, from when all ranks are ready to when the slowest is done; None: out of memory."""

        def timed() -> float:
            batch = packs.batch(number, level, self._index(level), self.args, self.world.rank)
            self._wait()
            started = time.perf_counter()
            self.engine.forward_backward(batch)
            self._wait_for_device()
            return time.perf_counter() - started

        taken = self._attempt(timed)
        return None if taken is None else all_reduce_values([taken], "max", self.world.device)[0]

    def step_seconds(self, repeats: int = 3) -> float:
        """Time of clipping, the optimizer's step and the reduction of the losses; the median of a few."""
        engine, taken = self.engine, []
        assert self._optimizer is not None
        for _ in range(repeats):
            self._wait()
            started = time.perf_counter()
            float(clip_grad_norm(engine.model, self.config.training.max_norm))
            all_reduce_values([0.0] * len(self.config.levels), "sum", self.world.device)
            self._optimizer.step()
            self._wait_for_device()
            taken.append(time.perf_counter() - started)
        return all_reduce_values([sorted(taken)[repeats // 2]], "max", self.world.device)[0]

    def held_bytes(self) -> int:
        """What a rank holds between iterations."""
        parameters = list(self.engine.model.parameters())
        if self.world.device.type == "cuda":
            return torch.cuda.memory_allocated(self.world.device)
        assert self._optimizer is not None
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        held: list[Tensor] = [*parameters, *(p.grad for p in parameters if p.grad is not None), *states]
        return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in held)

    @property
    def engine(self) -> Engine:
        """The engine, with gradients of zero and the optimizer's state."""
        if self._engine is None:
            # Graphs of an earlier engine would count towards the compiler's limit.
            torch._dynamo.reset()
            self._engine = Engine(self.config, self.args, self.world)
            self._optimizer = build_optimizer(self._engine.model, self.config.optimizer)
            for parameter in self._engine.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return self._engine

    def _index(self, level: Level) -> int:
        """Where the engine has `level`; another depth or policy of a level that it was made with is added."""
        runtime = self.engine.runtime
        if level not in runtime.levels:
            shape = level.cp_shape(self.args.num_kv_heads)
            same = [k for k, other in enumerate(runtime.levels) if other.cp_shape(self.args.num_kv_heads) == shape]
            runtime.levels = (*runtime.levels, level)
            runtime.meshes.append(runtime.meshes[same[0]])
        return runtime.levels.index(level)

    def _iterate(self, level: Level, packs: Packs, number: int) -> None:
        self.engine.forward_backward(packs.batch(number, level, self._index(level), self.args, self.world.rank))

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None on every rank where any ran out of memory."""
        result, failed = None, False
        try:
            result = work()
        except RuntimeError as error:
            if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                raise
            failed = True
        # Here the exception is gone, and the tensors that its traceback held.
        if self._any_rank(failed):
            self.clear()
            return None
        return result

    def _any_rank(self, failed: bool) -> bool:
        """Whether any rank failed; ValueError on one that did where others do not come within ALONE_SECONDS."""
        try:
            return any_rank(failed, timeout_seconds=ALONE_SECONDS if failed else None)
        except RuntimeError:
            if not failed:
                raise
            raise ValueError(
                f"rank {self.world.rank}: out of memory while levels are measured, on this rank alone: end other "
                "processes on its GPU (nvidia-smi), or name [[levels]] blocks that need less"
            ) from None

    def _wait(self) -> None:
        self._wait_for_device()
        barrier()

    def _wait_for_device(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
