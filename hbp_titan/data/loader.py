"""PackLoader: one rank's batches in the plan's order, prepared ahead of time by worker processes.

Owns the iteration over one plan. Its only state is the index of the next micro-batch, for any number of workers: a
resumed run continues there at once, without reading the earlier ones.
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
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from hbp_titan.data.batch import PackedBatch, SampleSource, make_batch, shard_batch
from hbp_titan.packing import Plan

SampleWeights = Callable[[Plan, int, NDArray[np.int64]], NDArray[np.float64]]
"""(plan, micro-batch, sample ids [n]) -> loss weight of each trained token of each sample [n]."""


@dataclass(frozen=True)
class BatchShapes:
    """What determines the shapes of each level's batches in addition to max_tokens; one entry per level.

    gather_degrees: groups between which keys and values are gathered (`shard_batch`). max_documents: power of two that
    is at least the number of documents of any pack. window: the model's sliding window.
    """

    gather_degrees: tuple[int, ...]
    max_documents: tuple[int, ...]
    window: int | None = None

    @classmethod
    def from_plan(cls, plan: Plan, num_kv_heads: int, window: int | None = None) -> BatchShapes:
        """Return the shapes that `plan` needs for a model with `num_kv_heads` and this sliding window."""
        gather_degrees = tuple(level.cp_shape(num_kv_heads)[0] for level in plan.levels)
        return cls(gather_degrees, (1,) * len(plan.levels), window).enlarged_for(plan)

    def enlarged_for(self, plan: Plan) -> BatchShapes:
        """Return these shapes, or larger ones if a pack of `plan` has more documents."""
        # Epochs differ by a few documents in their fullest pack. One power of two for all of them, and for validation,
        # spares the compiled blocks a new shape, hence a recompilation, after the first micro-batches.
        needed = [1 << max(plan.max_documents(k) - 1, 0).bit_length() for k in range(len(plan.levels))]
        return replace(self, max_documents=tuple(map(max, self.max_documents, needed)))


class PlanDataset(Dataset[PackedBatch]):
    """Maps the index of a micro-batch of the plan to this rank's batch.

    shapes: must cover this plan (`BatchShapes.enlarged_for`). sample_weights: loss normalization; None means 1.
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

    def __getitem__(self, micro_batch: int) -> PackedBatch:
        pack = self.plan.pack_at(micro_batch, self.rank)
        index = int(self.plan.pack_levels[pack])
        level = self.plan.levels[index]
        sample_ids = self.plan.samples_of_pack(pack)
        weights = self.sample_weights(self.plan, micro_batch, sample_ids) if self.sample_weights else None
        batch = make_batch(self.store, sample_ids, level, index, self.shapes.max_documents[index], weights)
        planned = int(self.plan.loss_tokens[sample_ids].sum())
        if batch.num_loss_tokens != planned:
            # The loss is divided by the plan's count: a difference would silently scale it wrongly.
            raise RuntimeError(
                f"micro-batch {micro_batch}, samples {sample_ids.tolist()}: the batch has {batch.num_loss_tokens} loss "
                f"tokens, the plan {planned}"
            )
        # A pack starts at a rank that its degree divides.
        cp_rank = self.rank % level.cp_degree
        return shard_batch(batch, cp_rank, level.cp_degree, self.shapes.gather_degrees[index], self.shapes.window)


class PackLoader:
    """Iterates over this rank's batches of one plan, starting with `first_micro_batch`."""

    def __init__(
        self,
        plan: Plan,
        store: SampleSource,
        rank: int,
        shapes: BatchShapes,
        *,
        sample_weights: SampleWeights | None = None,
        first_micro_batch: int = 0,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
    ) -> None:
        dataset = PlanDataset(plan, store, rank, shapes, sample_weights)
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 deprecates; nothing here depends on it.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader = StatefulDataLoader(
                dataset,
                # An item of the data set is a whole pack already.
                batch_size=None,
                sampler=range(first_micro_batch, plan.num_iterations),
                num_workers=num_workers,
                prefetch_factor=prefetch_factor if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_start_worker if num_workers else None,
                # Of its own: drawing the workers' seeds would advance the rank's generator at every start of a run.
                generator=torch.Generator(),
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._loader)


def _start_worker(worker: int) -> None:
    """Undo what a forked worker inherits from its rank."""
    # A signal to a worker is not one to the rank: the worker inherits the pipe of the rank's signal handler.
    signal.set_wakeup_fd(-1)
    # A worker that died of a warning could not feed the step before the checkpoint. torchrun signals a rank's process
    # group, and SLURM without cgroups every process of the job. Workers end by themselves when their rank does.
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The trainer disables the automatic collector and runs the rank's collector itself, but not the workers'.
    gc.enable()
