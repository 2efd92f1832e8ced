"""PackLoader: a rank's batches in the plan's order, prepared ahead by worker processes.

Owns the walk over one epoch's plan. Its state is (epoch, iteration) alone, whatever the number of workers: any
position is reached at once, without reading what lies before it.
"""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from hbp_titan.data.batch import PackedBatch, SampleSource, make_batch, shard_batch
from hbp_titan.packing import Plan

SampleWeights = Callable[[Plan, int, NDArray[np.int64]], NDArray[np.float64]]
"""(plan, iteration, sample ids [n]) -> the loss weight of each trained token of each sample [n]."""


@dataclass(frozen=True)
class BatchShapes:
    """What fixes the shape of each level's batches beside its max_tokens; one entry a level.

    gather_degrees: groups between which keys and values are gathered (`shard_batch`). max_documents: at least the most
    documents of a pack. Epochs differ by a few documents in their fullest pack: one power of two for all of them, and
    for validation, means that a compiled block meets no new shape after the first iterations.
    """

    gather_degrees: tuple[int, ...]
    max_documents: tuple[int, ...]

    @classmethod
    def from_plan(cls, plan: Plan, num_kv_heads: int) -> BatchShapes:
        """The shapes that `plan` needs for a model with `num_kv_heads`."""
        gather_degrees = tuple(level.cp_shape(num_kv_heads)[0] for level in plan.levels)
        return cls(gather_degrees, (1,) * len(plan.levels)).enlarged_for(plan)

    def enlarged_for(self, plan: Plan) -> BatchShapes:
        """These shapes, or larger ones where a pack of `plan` has more documents."""
        needed = [1 << max(plan.max_documents(k) - 1, 0).bit_length() for k in range(len(plan.levels))]
        return replace(self, max_documents=tuple(map(max, self.max_documents, needed)))


class PlanDataset(Dataset[PackedBatch]):
    """Maps an iteration of the plan to this rank's batch.

    shapes: of this plan or of more (`BatchShapes.enlarged_for`).
    sample_weights: the normalizer; weights of 1 unless given.
    """

    def __init__(
        self,
        plan: Plan,
        store: SampleSource,
        rank: int,
        shapes: BatchShapes,
        sample_weights: SampleWeights | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.rank = rank
        self.sample_weights = sample_weights
        self.shapes = shapes

    def __len__(self) -> int:
        return self.plan.num_iterations

    def __getitem__(self, iteration: int) -> PackedBatch:
        index = int(self.plan.level_of_iteration[iteration])
        level = self.plan.levels[index]
        dp_rank, cp_rank = divmod(self.rank, level.cp_degree)
        sample_ids = self.plan.pack(iteration, dp_rank)
        weights = self.sample_weights(self.plan, iteration, sample_ids) if self.sample_weights else None
        batch = make_batch(self.store, sample_ids, level, index, self.shapes.max_documents[index], weights)
        planned = int(self.plan.loss_tokens[sample_ids].sum())
        if batch.num_loss_tokens != planned:
            # The loss is divided by the plan's count: a difference would scale it wrongly in silence.
            raise RuntimeError(
                f"iteration {iteration}, samples {sample_ids.tolist()}: the batch has {batch.num_loss_tokens} loss "
                f"tokens, the plan {planned}"
            )
        return shard_batch(batch, cp_rank, level.cp_degree, self.shapes.gather_degrees[index])


class _From(Sampler[int]):
    """Iterations first..end-1 in order."""

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.end))

    def __len__(self) -> int:
        return self.end - self.first


class PackLoader:
    """Iterates over this rank's batches of one epoch from `first_iteration` on."""

    def __init__(
        self,
        plan: Plan,
        store: SampleSource,
        rank: int,
        shapes: BatchShapes,
        *,
        sample_weights: SampleWeights | None = None,
        first_iteration: int = 0,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
    ) -> None:
        dataset = PlanDataset(plan, store, rank, shapes, sample_weights)
        with warnings.catch_warnings():
            # torchdata 0.11 calls what torch 2.13 deprecates; nothing here depends on it.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader = StatefulDataLoader(
                dataset,
                batch_size=None,
                sampler=_From(first_iteration, plan.num_iterations),
                num_workers=num_workers,
                prefetch_factor=prefetch_factor if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_start_worker if num_workers else None,
                # Its draw for the workers' seeds would move the rank's own generator at every start of a run.
                generator=torch.Generator(),
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._loader)


def _start_worker(worker: int) -> None:
    """What a forked worker must not share with its rank."""
    # A signal to a worker does not count as the rank's, whose pipe (components/preemption.py) it has inherited.
    signal.set_wakeup_fd(-1)
    # torchrun signals a rank's process group: a worker that died of that could not feed the step to be saved.
    os.setpgrp()
    # Training runs the rank's collector by itself (components/garbage_collection.py); nobody runs the worker's.
    gc.enable()
