"""FSDP2's collectives next to the computation, on streams with a simulated clock: what waits for what."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast
from unittest import mock

import pytest
from torch.distributed.fsdp import FSDPModule

from hbp_titan.distributed import parallelize
from hbp_titan.distributed.fsdp import MicroBatchOverlap, apply_fsdp
from tests.gpu_trace.harness import CAN_DIFFERENTIATE, TracedEngine
from tests.gpu_trace.timeline import COMPUTE, GATHER, REDUCE, Timeline, Work, simulated

pytestmark = [
    pytest.mark.skipif(
        not CAN_DIFFERENTIATE, reason="needs a GPU; run: HBP_TRACE_DEVICE=cuda scripts/trace_all_torch.sh"
    ),
    pytest.mark.skipif(
        not hasattr(FSDPModule, "set_separate_reduce_scatter_group"),
        reason="needs torch 2.13; run: TORCH_VERSIONS=2.13.0 scripts/trace_all_torch.sh",
    ),
]
LAYERS = 3
UNTIED = {"tie_embeddings": False}
BLOCKS = [f"layers.{i}" for i in range(LAYERS)]


@pytest.fixture(scope="module")
def simulation(request: pytest.FixtureRequest) -> Iterator[Simulation]:
    """An engine of two levels on 2 ranks, the second of which keeps gathered blocks.

    param: whether reductions have a communicator of their own, by default true.
    """
    separate = getattr(request, "param", True)
    argv = ("--compile.enable=false", "--levels=1024:1:ulysses:none,2048:1:ulysses:none::false")

    def apply(*args: Any, **options: Any) -> None:
        apply_fsdp(*args, **{**options, "separate_reduce_scatter": separate})

    timeline = Timeline()
    with (
        mock.patch.object(parallelize, "apply_fsdp", apply),
        simulated(timeline, "debug_model", argv, world_size=2, layers=LAYERS, model=UNTIED) as traced,
    ):
        yield Simulation(timeline, traced)


class Simulation(NamedTuple):
    timeline: Timeline
    traced: TracedEngine

    def step(self, prefetch: int = 0, overlap: bool = False, **times: float) -> tuple[list[Work], float]:
        """Run an optimizer step of two micro-batches, each at one level; return its work and its end.

        prefetch: blocks that each block gathers in advance by FSDP2's explicit prefetch, in forward and backward.
        """
        self.timeline.restart(**times)
        engine = self.traced.engine
        blocks = [cast(FSDPModule, block) for block in engine.model.blocks()]
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - prefetch) : i][::-1])
        engine.overlap = MicroBatchOverlap(engine.model) if overlap else None
        batches = [self.traced.batch(level, (700, 60)) for level in (1, 0)]
        with self.traced.mode:
            for number, batch in enumerate(batches):
                engine.forward_backward(batch, last=number == 1)
        return self.timeline.work, self.timeline.default.ready


def modules(work: list[Work], kind: str) -> list[str]:
    return [one.module for one in work if one.kind == kind]


def idle(step: tuple[list[Work], float]) -> float:
    """Return how long nothing is computed until everything that the optimizer waits for has ended."""
    return step[1] - sum(work.duration for work in step[0] if work.kind == COMPUTE)


@pytest.mark.parametrize(
    ("block", "gather", "launch"),
    [
        pytest.param(4, 1, 0.2, id="compute", marks=pytest.mark.slow),
        pytest.param(1, 3, 0.2, id="traffic", marks=pytest.mark.slow),
        pytest.param(1, 1, 4, id="launches"),
    ],
)
def test_explicit_prefetch_gains_nothing_over_fsdps_own(
    simulation: Simulation, block: float, gather: float, launch: float
) -> None:
    ends = [simulation.step(ahead, block=block, gather=gather, launch=launch)[1] for ahead in (0, 2)]
    assert ends[0] == pytest.approx(ends[1])


def test_no_block_waits_for_parameters_but_the_first(simulation: Simulation) -> None:
    work, _ = simulation.step(block=4, gather=1)
    order = [one for one in work if one.kind == COMPUTE and one.module in BLOCKS]
    assert [one.module for one in order] == [*BLOCKS, *reversed(BLOCKS)] * 2
    for before, after in itertools.pairwise(order):
        if before.module != after.module:
            assert after.start == before.end
    # The level of the first micro-batch keeps its blocks from forward to backward.
    assert modules(work, GATHER).count("block") == LAYERS * (1 + 2)


def test_micro_batches_of_a_step_follow_each_other_without_waiting(simulation: Simulation) -> None:
    waits, follows = (simulation.step(overlap=overlap, block=4, gather=1) for overlap in (False, True))
    # Around a micro-batch: the embeddings and the first block are gathered, and reduced in fp32.
    embeddings = next(one.duration for one in waits[0] if (one.kind, one.module) == (GATHER, "tok_embeddings"))
    around = (embeddings + 1) * (1 + 2)
    assert idle(waits) == pytest.approx(2 * around)
    # The embeddings' backward still waits for the first block's reduction, so that two gradients are in memory, not 3.
    assert idle(follows) == pytest.approx(around + 2)
    for kind in (GATHER, REDUCE):
        assert modules(follows[0], kind) == modules(waits[0], kind)


def test_the_embeddings_gradient_is_free_before_the_end_of_the_next_forward(simulation: Simulation) -> None:
    model = cast(Any, simulation.traced.engine.model)
    held: list[int] = []

    def count(*_: Any) -> None:
        held.append(len(model._get_fsdp_state()._comm_ctx.reduce_scatter_states))

    hooks = [block.register_forward_pre_hook(count) for block in (model.layers[0], model.layers[-1])]
    simulation.step(overlap=True, block=4, gather=1)
    for hook in hooks:
        hook.remove()
    assert held == [0, 0, 1, 0]


@pytest.mark.parametrize("simulation", [False], indirect=True)
def test_on_one_communicator_gathers_queue_behind_reductions(simulation: Simulation) -> None:
    waits, follows = (simulation.step(overlap=overlap, block=4, gather=1) for overlap in (False, True))
    assert follows[1] == pytest.approx(waits[1])
