"""FSDP2: collectives counted per micro-batch, and gradients equal to one process."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hbp_titan import engine
from hbp_titan.components.optimizer import square_norm
from hbp_titan.config import load_config, validate
from hbp_titan.data.batch import PackedBatch
from hbp_titan.data.loader import BatchShapes, PlanDataset
from hbp_titan.distributed import parallelize
from hbp_titan.distributed.fsdp import has_separate_reductions, whole_tensor
from hbp_titan.distributed.world import World
from hbp_titan.engine import Engine
from hbp_titan.packing import Level, build_plan
from hbp_titan.testing.equivalence import Outcome, compare, reference, run_case
from hbp_titan.testing.equivalence_cases import Case
from hbp_titan.testing.local_ranks import run_distributed
from tests.distributed.test_expert_parallel import RandomSamples
from tests.models.deepseek_tiny import tiny_args
from tests.runs import equal

SEED = 3
ARGS = tiny_args(4)
SPARSE = sum(ARGS.is_sparse(layer) for layer in range(ARGS.num_layers))
# The name that FSDP2 calls from torch 2.13 on, and before.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
LEVELS = (
    Level(40, 2, reshard_after_forward=False),
    Level(120, 4, "hybrid", reshard_after_forward=True),
    Level(256, 4, "hybrid", "full", reshard_after_forward=2),
)
COPIES = (Level(40, 2), Level(120, 4, "hybrid"), Level(256, 4, "hybrid"))
CASES = [
    Case("levels reshard differently", 4, LEVELS),
    Case("experts over 2 ranks", 4, LEVELS, expert_parallel=2),
    Case("2 copies", 4, COPIES, dp_replicate=2),
    Case("2 copies, experts over 2 ranks", 4, COPIES, expert_parallel=2, dp_replicate=2),
]
# The same with parameters in host memory.
OFFLOADED = [
    dataclasses.replace(case, name=f"{case.name}, offloaded", cpu_offload=True) for case in (CASES[0], CASES[3])
]


class Samples(RandomSamples):
    """More short samples, so that the lowest level has packs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows += self.rows[4:6] * 3
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.loss_tokens = np.array([int(mask[1:].sum()) for _, mask in self.rows])


Passes = list[tuple[int, bool, Counter]]
"""Per micro-batch: level, whether it is the last of its step, and calls by (collective, size of its group)."""


def _counted(found: Passes) -> Callable[..., Tensor]:
    """Return Engine.forward_backward with FSDP's collectives counted."""
    run, gather, reduce = Engine.forward_backward, getattr(dist, GATHER), dist.all_reduce

    def counted(self: Engine, batch: PackedBatch, last: bool = True) -> Tensor:
        calls: Counter = Counter()

        def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def counted_call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
                calls[name, dist.get_world_size(group)] += 1
                return call(*args, group=group, **kwargs)

            return counted_call

        setattr(dist, GATHER, counting("gather", gather))
        dist.all_reduce = counting("reduce", reduce)
        try:
            losses_S = run(self, batch, last)
        finally:
            setattr(dist, GATHER, gather)
            dist.all_reduce = reduce
        found.append((batch.level, last, calls))
        return losses_S

    return counted


def _run(world: World, cases: list[Case], separate: bool) -> list[tuple[Outcome, Passes]]:
    config = load_config([f"--training.seed={SEED}"])
    results = []
    for case in cases:
        passes: Passes = []
        whole = Engine.forward_backward
        Engine.forward_backward = _counted(passes)  # type: ignore[method-assign, assignment]
        # As on GPUs from torch 2.13 on: the micro-batches of a step then overlap, too.
        for module in (parallelize, engine):
            module.has_separate_reductions = lambda *_: separate  # type: ignore[attr-defined]
        try:
            results.append((run_case(world, config, ARGS, case, Samples()), passes))  # type: ignore[arg-type]
        finally:
            Engine.forward_backward = whole  # type: ignore[method-assign]
            for module in (parallelize, engine):
                module.has_separate_reductions = has_separate_reductions  # type: ignore[attr-defined]
    return results


@cache
def _expected() -> Outcome:
    return reference(ARGS, SEED, Samples(), torch.device("cpu"))[1]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Outcome, Passes]]:
    results = run_distributed(_run, 4, CASES + OFFLOADED, False)[0]
    return {case.name: result for case, result in zip(CASES + OFFLOADED, results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gradients_equal_one_process(found: dict, case: Case) -> None:
    difference = compare(_expected(), found[case.name][0])
    assert difference.loss < 1e-6
    assert max(difference.grads.values()) < 1e-5, difference.grads


@pytest.mark.parametrize("case", OFFLOADED, ids=[case.name for case in OFFLOADED])
def test_parameters_in_host_memory_change_no_bit(found: dict, case: Case) -> None:
    plain, other = found[case.name.removesuffix(", offloaded")][0], found[case.name][0]
    assert other.loss == plain.loss
    assert equal(other.grads, plain.grads)


def test_levels_control_how_often_parameters_are_gathered(found: dict) -> None:
    layers, seen = ARGS.num_layers, set()
    # The embedding and the head are gathered once at every level.
    for level, _, calls in found["levels reshard differently"][1]:
        others = calls["gather", 4] - (layers if level != 1 else 2 * layers)
        assert others == 2, (level, calls)
        # In backward: no gather, from all ranks, from the two that keep the parameters.
        assert calls["gather", 2] == (layers if level == 2 else 0), (level, calls)
        seen.add(level)
    assert seen == {0, 1, 2}


def test_expert_parallel_groups_follow_the_level_where_torch_can(found: dict) -> None:
    layers, seen = ARGS.num_layers, set()
    for level, _, calls in found["experts over 2 ranks"][1]:
        # Experts are sharded over groups of 2 ranks, and always gathered again from these.
        again = {0: 0, 1: SPARSE, 2: layers + SPARSE}[level]
        assert calls["gather", 2] == SPARSE + again, (level, calls)
        assert calls["gather", 4] - (2 * layers if level == 1 else layers) == 2, (level, calls)
        seen.add(level)
    assert seen == {0, 1, 2}


def test_parameter_copies_reduce_once_per_step(found: dict) -> None:
    for name, groups in (("2 copies", ARGS.num_layers + 2), (CASES[3].name, ARGS.num_layers + 2 + SPARSE)):
        passes = found[name][1]
        ends = [last for _, last, _ in passes]
        assert ends.count(False) > 0, "no step has several micro-batches"
        for _, last, calls in passes:
            assert calls["reduce", 2] == (groups if last else 0), (name, last, calls)


def _separate(world: World) -> tuple[Outcome, Passes, int]:
    groups = []
    made = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        if "reduce" in kwargs.get("group_desc", ""):
            groups.append(args or kwargs)
        return made(*args, **kwargs)

    dist.new_group = new_group
    ((result, passes),) = _run(world, [Case("separate", 2, (Level(64, 1), Level(256, 2)))], True)
    return result, passes, len(groups)


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "set_separate_reduce_scatter_group"),
    reason="needs torch 2.13; run: .venv/bin/pip install torch==2.13.0 && scripts/run_tests.sh tests/distributed",
)
def test_separate_reductions_and_overlapping_micro_batches_change_no_gradient() -> None:
    result, passes, groups = run_distributed(_separate, 2)[0]
    assert groups == 1
    # A step has several micro-batches, and none gathers more than the others of its level.
    assert {last for _, last, _ in passes} == {False, True}
    gathers = {(level, calls["gather", 2]) for level, _, calls in passes}
    assert len(gathers) == len({level for level, _ in gathers})
    assert max(compare(_expected(), result).grads.values()) < 1e-5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--parallelism.reshard_after_forward=3"], "parallelism.reshard_after_forward=3"),
        (["--parallelism.reshard_after_forward=1"], "parallelism.reshard_after_forward=1"),
        (["--levels=64:1" + 10 * ":"], "64:1::::::::"),
        (["--levels=64:1:ulysses:none::8"], "reshard_after_forward=8"),
    ],
)
def test_number_of_ranks_that_does_not_fit(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load_config(["--levels=64:1", "--parallelism.dp_replicate=2", *argv]), 8)


def _gradients(world: World) -> list[dict[str, Tensor]]:
    found = []
    for dtype in ("auto", "bfloat16"):
        config = load_config([f"--training.gradient_dtype={dtype}", "--levels=256:2", f"--training.seed={SEED}"])
        engine = Engine(config, ARGS, world)
        samples = Samples()
        plan = build_plan(samples.lengths, config.levels, world.size, loss_tokens=samples.loss_tokens)
        batches = PlanDataset(plan, samples, world.rank, BatchShapes.from_plan(plan, ARGS.num_kv_heads))  # type: ignore[arg-type]
        engine.forward_backward(batches[0])
        gradients = {name: p.grad for name, p in engine.model.named_parameters()}
        norm = square_norm(engine.model)
        dist.all_reduce(norm)
        found.append({name: whole_tensor(grad) for name, grad in gradients.items() if grad is not None} | {"": norm})
    return found


def test_gradients_in_bfloat16_are_rounded_after_their_reduction() -> None:
    whole, narrow = run_distributed(_gradients, 2)[0]
    norm, rounded_norm = whole.pop(""), narrow.pop("")
    assert equal(narrow, {name: grad.bfloat16() for name, grad in whole.items()})
    # Computed in float32: a norm in bfloat16 would have 8 bits.
    assert float(rounded_norm) == pytest.approx(float(norm), rel=1e-3)
