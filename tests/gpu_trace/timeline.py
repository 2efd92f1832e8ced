"""When FSDP2's collectives and the computation of a GPU would run: its real hooks on streams with a simulated clock.

FSDP2 gets streams and events that hold times instead of work: an operation starts when its stream, the host and (for a
collective) its communicator are ready, and events order streams as on a GPU. Real: the engine, FSDP2's hooks, the order
in which the host issues everything. Given: how long each kind of operation takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tests.gpu_trace.harness import TracedEngine

COMPUTE, GATHER, REDUCE = "compute", "gather", "reduce"


class Event:
    """A point in the work of a stream, at its time."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.time = timeline, 0.0

    def record(self, stream: Stream | None = None) -> Event:
        self.time = (stream or self.timeline.current).ready
        return self


class Stream:
    """A queue of work. ready: when all that was put into it has ended."""

    def __init__(self, timeline: Timeline, priority: int = 0) -> None:
        self.timeline, self.ready = timeline, 0.0

    def wait_event(self, event: Event) -> None:
        self.ready = max(self.ready, event.time)

    def wait_stream(self, other: Stream) -> None:
        self.ready = max(self.ready, other.ready)

    def record_event(self, event: Event | None = None) -> Event:
        return (event or Event(self.timeline)).record(self)


@dataclass(frozen=True)
class Work:
    """One operation: its kind, the module that it belongs to, and when it ran."""

    kind: str
    module: str
    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass
class Timeline:
    """A device handle for FSDP2.

    block: time of a block's forward; its backward takes twice as long. launch: the host's time for a block's forward.
    gather: time to gather a block; a reduction, in fp32, takes twice as long. What other modules take is in proportion
    to their parameters.
    """

    block: float = 0.0
    launch: float = 0.0
    gather: float = 0.0
    host: float = 0.0
    work: list[Work] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams: list[Stream] = []
        self.default = self.current = self.Stream()
        self.communicators: dict[str, float] = {}
        self.elements: dict[int, str] = {}
        self.block_elements = 1

    def restart(self, block: float, gather: float, launch: float = 0.0) -> None:
        """Set the clock to 0, with other times of operations."""
        self.block, self.gather, self.launch, self.host = block, gather, launch, 0.0
        self.work, self.communicators = [], {}
        for stream in self.streams:
            stream.ready = 0.0

    # What FSDP2 uses of torch.cuda.

    def Stream(self, priority: int = 0) -> Stream:
        self.streams.append(Stream(self, priority))
        return self.streams[-1]

    def Event(self) -> Event:
        return Event(self)

    def current_stream(self) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def run(self, kind: str, module: str, duration: float, communicator: str = "") -> None:
        """Put one operation into the current stream."""
        start = max(self.current.ready, self.host, self.communicators.get(communicator, 0.0))
        self.work.append(Work(kind, module, start, start + duration))
        self.current.ready = start + duration
        if communicator:
            self.communicators[communicator] = start + duration

    def compute(self, module: str, share: float, passes: int) -> None:
        self.host += passes * share * self.launch
        self.run(COMPUTE, module, passes * share * self.block)

    def collective(self, kind: str, whole: Tensor, group: Any) -> None:
        module = self.elements.get(whole.numel(), "?")
        duration = self.gather * whole.numel() / self.block_elements * (2 if kind == REDUCE else 1)
        self.run(kind, module, duration, group.group_name)


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, timeline: Timeline, module: str, share: float) -> Tensor:
        ctx.of = timeline, module, share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        timeline, module, share = ctx.of
        timeline.compute(module, share, 2)
        return grad, None, None, None


@contextmanager
def simulated(timeline: Timeline, preset: str, argv: Sequence[str] = (), **options: Any) -> Iterator[TracedEngine]:
    """Yield a traced engine whose collectives and computation run on `timeline`."""
    package = importlib.import_module("torch.distributed.fsdp._fully_shard")
    names = ("_fsdp_collectives", "_fsdp_init", "_fsdp_param_group", "_fsdp_state")
    collectives = package._fsdp_collectives

    def timed(kind: str, whole: str, call: Any) -> Any:
        def run(self: Any, output_tensor: Tensor, input_tensor: Tensor, group: Any, *args: Any, **kwargs: Any) -> Any:
            timeline.collective(kind, output_tensor if whole == "output" else input_tensor, group)
            return call(self, output_tensor, input_tensor, group, *args, **kwargs)

        return run

    with ExitStack() as stack:
        for name in names:
            module = getattr(package, name)
            stack.enter_context(mock.patch.object(module, "_get_device_handle", return_value=timeline))
        for kind, whole, cls in (
            (GATHER, "output", collectives.DefaultAllGather),
            (REDUCE, "input", collectives.DefaultReduceScatter),
        ):
            stack.enter_context(mock.patch.object(cls, "__call__", timed(kind, whole, cls.__call__)))
        engine = stack.enter_context(TracedEngine(preset, argv, **options))
        _time_modules(timeline, engine.engine.model)
        yield engine


def _time_modules(timeline: Timeline, model: nn.Module) -> None:
    sharded = {name: module for name, module in model.named_modules() if name and isinstance(module, FSDPModule)}
    numels = {name: sum(p.numel() for p in module.parameters()) for name, module in sharded.items()}  # type: ignore[attr-defined]
    timeline.block_elements = next(numel for name, numel in numels.items() if name.startswith("layers."))
    for name, module in sharded.items():
        # A lookup takes next to no time.
        share = 0.0 if isinstance(module, nn.Embedding) else numels[name] / timeline.block_elements
        kind = "block" if name.startswith("layers.") else name
        timeline.elements.setdefault(numels[name], kind)

        def before(_: Any, inputs: Any, name: str = name, share: float = share) -> Any:
            timeline.compute(name, share, 1)
            x = inputs[0]
            return (_Passes.apply(x, timeline, name, share), *inputs[1:]) if x.requires_grad else None

        module.register_forward_pre_hook(before)  # type: ignore[attr-defined]
