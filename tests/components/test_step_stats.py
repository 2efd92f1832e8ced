"""Step statistics: the step's collectives and waits, times, losses by group, by hand."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from hbp_titan.components.optimizer import build_optimizer, step_unless
from hbp_titan.components.profiling import GarbageCollection
from hbp_titan.components.step_stats import StepTimes
from hbp_titan.config import load_config
from hbp_titan.distributed.world import World
from hbp_titan.job_config import Optimizer
from hbp_titan.testing.local_ranks import run_distributed
from hbp_titan.train import Trainer
from tests.tiny_run import write_tiny_run

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__")


def test_skipped_update_changes_neither_parameters_nor_moments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5))

    def state() -> list[torch.Tensor]:
        kept = [value for of in optimizer.state.values() for value in of.values()]
        return [value.detach().clone() for value in (*model.parameters(), *kept)]

    def step(skips: float, grad: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        step_unless(optimizer, torch.tensor(skips))

    step(0.0, 1.0)
    before = state()
    step(1.0, float("nan"))
    assert all(a.equal(b) for a, b in zip(before, state(), strict=True))
    step(0.0, 1.0)
    assert not any(a.equal(b) for a, b in zip(before, state(), strict=True))
    assert not hasattr(optimizer, "found_inf")


def _watched(world: World, argv: list[str]) -> tuple[list[str], list[bool], list[int]]:
    """Collectives and reads of one step after its micro-batches, what of the metrics was there, and collections."""
    trainer = Trainer(load_config(argv), world)
    events: list[str] = []
    watching = [False]
    written: list[bool] = []

    def recorded(name: str, call: Any) -> Any:
        def recording(*args: Any, **kwargs: Any) -> Any:
            if watching[0]:
                events.append(name)
            return call(*args, **kwargs)

        return recording

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "broadcast"):
        if hasattr(dist, name):
            setattr(dist, name, recorded(name, getattr(dist, name)))
    for name in READS:
        setattr(torch.Tensor, name, recorded(f"read {name}", getattr(torch.Tensor, name)))
    trainer.optimizer.step = recorded("update", trainer.optimizer.step)  # type: ignore[method-assign]
    whole_step, square, path = trainer.train_step, trainer.stats.reduce, trainer.folder / "metrics.jsonl"
    forward_backward = trainer.engine.forward_backward

    def from_here(*args: Any) -> Any:
        watching[0] = trainer.step == 2
        return square(*args)

    def micro_batch(*args: Any, **kwargs: Any) -> Any:
        if trainer.sample_log._file is not None:
            written.append(len(path.read_text().splitlines()) == trainer.step if path.exists() else False)
        return forward_backward(*args, **kwargs)

    def step(*args: Any) -> Any:
        record = whole_step(*args)
        watching[0] = False
        return record

    trainer.stats.reduce = from_here  # type: ignore[method-assign]
    trainer.engine.forward_backward = micro_batch  # type: ignore[method-assign]
    trainer.train_step = step  # type: ignore[method-assign]
    collections: list[int] = []
    gc.callbacks.append(lambda phase, info: collections.append(trainer.step) if phase == "start" else None)
    trainer.train()
    gc.callbacks.pop()
    assert gc.isenabled()
    return events, written, collections


def test_step_synchronizes_once_and_writes_its_metrics_during_the_next_step(tmp_path: Path) -> None:
    argv = write_tiny_run(tmp_path, saves=False)
    argv += ["--metrics.timing_check_interval=0", "--training.gc_interval=3", "--training.steps=8"]
    events, written, collections = run_distributed(_watched, 2, argv)[0]
    # One sum before the update, which nobody reads; one gather after it; one copy to the host.
    assert events[:2] == ["all_reduce", "update"], events
    assert [event for event in events if not event.startswith("read")] == ["all_reduce", "update", events[2]]
    assert events[2].startswith("all_gather")
    # The copy, and numpy's view of it.
    assert events[3:] == ["read cpu", "read numpy"], events
    assert written.count(False) >= 5
    assert [step for step in collections if 0 < step < 8] == [3, 6]


def test_garbage_is_collected_only_at_the_interval() -> None:
    assert gc.isenabled()
    with GarbageCollection(2) as collection:
        assert not gc.isenabled()
        frozen = gc.get_freeze_count()
        assert frozen > 0
        cycle: list[Any] = []
        cycle.append(cycle)
        del cycle
        collection.after_step(1)
        collection.after_step(2)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with GarbageCollection(0) as collection:
        assert gc.isenabled()
    with pytest.raises(KeyError), GarbageCollection(1):
        raise KeyError
    assert gc.isenabled()


def test_waiting_is_the_slowest_ranks_work_minus_the_mean() -> None:
    # Two ranks: 1 s and 3 s of work in an iteration of 3 s, then 2 s and 2 s in one of 4 s (half of it communication).
    times = StepTimes(wall=[3.0, 4.0], work=[2.0, 2.0], slowest=[3.0, 2.0], data_wait=1.0, whole=10.0)
    assert times.waiting.tolist() == pytest.approx([1.0, 0.0])
    assert times.imbalance == pytest.approx(1 - 4 / 5)
    assert times.idle_share == pytest.approx((1 + 1) / 10)
    # Iterations take 3/7 and 4/7 of the step, and of the wait for data.
    assert times.shares(np.array([True, False])) == pytest.approx((10 * 3 / 7, 1 + 3 / 7))
    assert times.shares(np.array([False, True])) == pytest.approx((10 * 4 / 7, 4 / 7))
    # Untimed: divided by the number of micro-batches.
    times = StepTimes([], [], [], data_wait=1.0, whole=9.0)
    assert (times.imbalance, times.idle_share) == (None, None)
    assert times.shares(np.array([True, False, False])) == (3.0, 0.0)
