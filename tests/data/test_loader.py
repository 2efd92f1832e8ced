"""The loader's order, its start in mid-epoch and its check against the plan."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest

from hbp_titan.config import load_config
from hbp_titan.data.loader import BatchShapes, PackLoader, PlanDataset
from hbp_titan.data.prepare import prepare
from hbp_titan.data.token_store import TokenStore
from hbp_titan.models.documents import HeadTailShard
from hbp_titan.packing import Level, Plan, build_plan
from tests.tiny_run import write_tiny_run

LEVELS = (Level(16, 1), Level(64, 2))
LENGTHS = np.array([3, 60, 7, 16, 9, 33, 2, 5, 11, 40, 8, 4])


class Samples:
    """Sample i has tokens i, i + 1, ... and trains all but its first."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(index, index + LENGTHS[index], dtype=np.uint32), np.ones(LENGTHS[index], np.uint8)


def _plan(loss_tokens: np.ndarray | None = None) -> Plan:
    return build_plan(LENGTHS, LEVELS, 2, loss_tokens=loss_tokens)


# Two kv heads: no level gathers keys and values.
SHAPES = BatchShapes((1, 1), (16, 16))


def _ids(plan: Plan, rank: int, **options: int) -> list[list[int]]:
    return [batch.input_ids.tolist() for batch in PackLoader(plan, Samples(), rank, SHAPES, **options)]


def test_loader_yields_the_plan_of_its_rank_in_order() -> None:
    plan = _plan()
    for rank in (0, 1):
        for micro_batch, batch in enumerate(PackLoader(plan, Samples(), rank, SHAPES)):
            level = plan.levels[batch.level]
            cp_rank = rank % level.cp_degree
            tokens = np.concatenate([Samples().sample(i)[0] for i in plan.pack(micro_batch, rank)] or [[]])
            padded = np.zeros(level.max_tokens, np.int64)
            padded[: len(tokens)] = tokens
            share = level.max_tokens // level.cp_degree
            assert batch.input_ids.tolist() == padded[cp_rank * share : (cp_rank + 1) * share].tolist()
        assert micro_batch == plan.num_iterations - 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_that_gather_hold_each_token_of_the_pack_once(num_workers: int) -> None:
    plan = _plan()
    shapes = BatchShapes((1, 2), (16, 16))
    shards = [list(PackLoader(plan, Samples(), rank, shapes, num_workers=num_workers)) for rank in (0, 1)]
    contiguous = [list(PackLoader(plan, Samples(), rank, SHAPES)) for rank in (0, 1)]
    for iteration, (first, second) in enumerate(zip(*shards, strict=True)):
        wanted = [batches[iteration] for batches in contiguous]
        assert isinstance(first.documents, HeadTailShard) == (first.level == 1)
        for name in ("input_ids", "position_ids", "labels"):
            found = [*getattr(first, name).tolist(), *getattr(second, name).tolist()]
            assert sorted(found) == sorted(value for batch in wanted for value in getattr(batch, name).tolist())


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_start_in_mid_epoch_equals_skipping_for_any_number_of_workers(num_workers: int) -> None:
    plan = _plan()
    assert plan.num_iterations >= 4
    assert _ids(plan, 1, first_micro_batch=3, num_workers=num_workers) == _ids(plan, 1)[3:]
    assert _ids(plan, 1, first_micro_batch=plan.num_iterations, num_workers=num_workers) == []
    found = [batch.sample_ids.tolist() for batch in PackLoader(plan, Samples(), 0, SHAPES, num_workers=num_workers)]
    assert found == [plan.pack(i, 0).tolist() for i in range(plan.num_iterations)]


def test_workers_survive_signals_and_end_with_the_epoch() -> None:
    # As in a SLURM job without cgroups, whose processes are all signalled.
    plan, before = _plan(), set(multiprocessing.active_children())
    batches = iter(PackLoader(plan, Samples(), 1, SHAPES, num_workers=1, prefetch_factor=1))
    found = [next(batches).input_ids.tolist()]
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(int(worker.pid or 0), number)
    found += [batch.input_ids.tolist() for batch in batches]
    assert found == _ids(plan, 1)
    worker.join(60)
    assert worker.exitcode == 0


def test_a_batch_with_other_loss_tokens_than_planned_stops_the_run() -> None:
    plan = _plan(loss_tokens=np.maximum(LENGTHS - 2, 0))
    with pytest.raises(RuntimeError, match="loss tokens, the plan"):
        PlanDataset(plan, Samples(), 0, SHAPES)[0]


def test_shapes_cover_every_plan_in_powers_of_two() -> None:
    few, many = (build_plan(lengths, [Level(16)], 2) for lengths in ([4] * 4, [3] * 6))
    assert [few.max_documents(0), many.max_documents(0)] == [2, 3]
    shapes = BatchShapes.from_plan(few, num_kv_heads=2)
    assert shapes == BatchShapes((1,), (2,))
    assert shapes.enlarged_for(many) == BatchShapes((1,), (4,))
    assert shapes.enlarged_for(many).enlarged_for(few) == shapes.enlarged_for(many)
    assert BatchShapes.from_plan(build_plan([3], [Level(16, 2, "allgather")], 2), 2).gather_degrees == (2,)


def test_a_rank_reads_only_its_own_packs() -> None:
    class Spied(Samples):
        def __init__(self) -> None:
            self.read: list[int] = []

        def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            self.read.append(index)
            return super().sample(index)

    plan = _plan()
    for rank in (0, 1):
        store, wanted = Spied(), []
        batches = list(PackLoader(plan, store, rank, SHAPES, first_micro_batch=1))
        for micro_batch, batch in enumerate(batches, start=1):
            own = plan.pack(micro_batch, rank).tolist()
            assert batch.sample_ids.tolist() == own
            wanted += own
        assert store.read == wanted
        assert len(wanted) < len(LENGTHS)


def test_a_pickled_data_set_has_the_plan_but_no_data(tmp_path: Path) -> None:
    """Where worker processes are not forked, they open the store's memory maps themselves."""
    config = load_config(write_tiny_run(tmp_path, num_rows=150))
    store = TokenStore.open(prepare(config, progress=False)[0])
    assert len(pickle.dumps(store)) < 1000
    plan = build_plan(store.lengths, config.levels, 2, loss_tokens=store.loss_tokens)
    dataset = PlanDataset(plan, store, 0, BatchShapes.from_plan(plan, 2))
    again = pickle.loads(pickle.dumps(dataset))
    for iteration in range(len(dataset)):
        assert again[iteration].input_ids.equal(dataset[iteration].input_ids)
        assert again[iteration].sample_ids.tolist() == dataset[iteration].sample_ids.tolist()
