"""PackLoader: a rank's batches in the plan's order, prepared ahead by worker processes.

Owns the walk over one epoch's plan. Its state is (epoch, iteration) alone, whatever the number of workers: any
position is reached at once, without reading what lies before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from hbp_titan.data.batch import PackedBatch, SampleSource, make_batch, shard_batch
from hbp_titan.packing import Plan

SampleWeights = Callable[[Plan, int, NDArray[np.int64]], NDArray[np.float64]]
"""(plan, iteration, sample ids [n]) -> the loss weight of each trained token of each sample [n]."""


class PlanDataset(Dataset[PackedBatch]):
    """Maps an iteration of the plan to this rank's batch.

    gather_degrees: for each level the gather_degree of `shard_batch`; 1 unless given.
    """

    def __init__(
        self,
        plan: Plan,
        store: SampleSource,
        rank: int,
        sample_weights: SampleWeights | None = None,
        gather_degrees: Sequence[int] | None = None,
    ) -> None:
        self.plan = plan
        self.store = store
        self.rank = rank
        self.sample_weights = sample_weights
        self.gather_degrees = gather_degrees or [1] * len(plan.levels)
        self.max_documents = [plan.max_documents(index) for index in range(len(plan.levels))]

    def __len__(self) -> int:
        return self.plan.num_iterations

    def __getitem__(self, iteration: int) -> PackedBatch:
        index = int(self.plan.level_of_iteration[iteration])
        level = self.plan.levels[index]
        dp_rank, cp_rank = divmod(self.rank, level.cp_degree)
        sample_ids = self.plan.pack(iteration, dp_rank)
        weights = self.sample_weights(self.plan, iteration, sample_ids) if self.sample_weights else None
        batch = make_batch(self.store, sample_ids, level, index, self.max_documents[index], weights)
        planned = int(self.plan.loss_tokens[sample_ids].sum())
        if batch.num_loss_tokens != planned:
            # The loss is divided by the plan's count: a difference would scale it wrongly in silence.
            raise RuntimeError(
                f"iteration {iteration}, samples {sample_ids.tolist()}: the batch has {batch.num_loss_tokens} loss "
                f"tokens, the plan {planned}"
            )
        return shard_batch(batch, cp_rank, level.cp_degree, self.gather_degrees[index])


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
        *,
        sample_weights: SampleWeights | None = None,
        gather_degrees: Sequence[int] | None = None,
        first_iteration: int = 0,
        num_workers: int = 0,
        prefetch_factor: int = 4,
        pin_memory: bool = False,
    ) -> None:
        dataset = PlanDataset(plan, store, rank, sample_weights, gather_degrees)
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
            )

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._loader)
