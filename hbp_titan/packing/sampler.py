"""HBPBatchSampler: the planner as the batch sampler of another trainer's DataLoader.

Owns what a trainer needs besides packs: the same number of micro-batches on every rank and in every epoch, no empty
pack, resume in the middle of an epoch, and the loss tokens of an optimizer step. NumPy only: torch's and torchdata's
loaders take any iterable of lists of sample ids.

Ranks are data-parallel ranks. A trainer with a fixed context-parallel degree gives all ranks of a context-parallel
group the same data-parallel rank, so they get the same pack. A trainer that changes the degree between micro-batches
passes levels with a cp_degree and its global rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hbp_titan.packing.build import build_plan
from hbp_titan.packing.hbp import longest_processing_time
from hbp_titan.packing.level import Level, parse_levels
from hbp_titan.packing.plan import Plan
from hbp_titan.packing.ragged import IntArray, Ragged, offsets_of

RANDOM_NUMBER_OF_PACKS = ("hbp_paper", "isf", "random", "ffs", "bfs")
"""Methods whose number of packs depends on random numbers, hence on the epoch."""


class PackIndices(list[int]):
    """Sample ids of one pack, as a DataLoader passes them to the data set's __getitems__, also in a worker process.

    level: index of the pack's level. max_tokens: of that level. micro_batch: number in the epoch. step_loss_tokens:
    tokens with a loss of all ranks in the optimizer step of this micro-batch.
    """

    level: int
    max_tokens: int
    micro_batch: int
    step_loss_tokens: int


class HBPBatchSampler:
    """Yields the sample ids of one pack per micro-batch, for one rank.

    lengths, levels: as in build_plan; levels also in the short form "16384,131072".
    rank, world_size: of data parallelism. rank None yields the packs of all ranks, micro-batch by micro-batch, for a
        loader that distributes them itself: batch i is for rank i % world_size (accelerate's prepare).
    micro_batches_per_step: constant number for gradient accumulation; the last step of an epoch may have fewer. None
        keeps the steps of global_batch_tokens, whose number of micro-batches varies (plan.step_offsets).
    padding_index: sample id without loss tokens, yielded for a pack that has none.
    options: further arguments of build_plan, such as loss_tokens, method, cost and overlong. level_order is
        "interleave" unless given, so that each step has its share of every level.

    Usage: DataLoader(dataset, batch_sampler=sampler, collate_fn=...), with sampler.set_epoch(epoch) before each epoch.
    Raises ValueError for an option outside its domain, a method whose number of packs depends on the epoch, and a pack
    that stays empty without padding_index.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        levels: Sequence[Level] | str,
        *,
        rank: int | None,
        world_size: int,
        seed: int = 0,
        micro_batches_per_step: int | None = None,
        padding_index: int | None = None,
        **options: Any,
    ) -> None:
        if rank is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be from 0 to world_size - 1 = {world_size - 1}")
        if micro_batches_per_step is not None and micro_batches_per_step < 1:
            raise ValueError(f"micro_batches_per_step={micro_batches_per_step} must be at least 1")
        if micro_batches_per_step is not None and options.get("global_batch_tokens"):
            raise ValueError("micro_batches_per_step and global_batch_tokens: both set the size of a step; give one")
        method = options.get("method", "hbp")
        if method in RANDOM_NUMBER_OF_PACKS:
            raise ValueError(
                f"method={method!r}: its number of packs differs between epochs, and a trainer that reads the length "
                'once would lose samples; use "hbp" or "flat_sorted"'
            )
        self.rank, self.world_size, self.padding_index = rank, world_size, padding_index
        self.micro_batches_per_step = micro_batches_per_step
        levels = parse_levels(levels) if isinstance(levels, str) else tuple(levels)
        self._options = {
            "level_order": "interleave",
            **options,
            "lengths": np.asarray(lengths),
            "levels": levels,
            "seed": seed,
        }
        self._num_iterations = 0
        self.plan = self._plan(0)
        self._num_iterations = self.plan.num_iterations
        self._yielded = 0
        self._resume_at = 0

    @property
    def epoch(self) -> int:
        return self.plan.epoch

    @property
    def batch_size(self) -> None:
        """None: packs differ in size. accelerate reads it before it distributes the batches of a sampler to ranks.

        Raises ValueError if this sampler yields one rank's packs: distributed again, most samples would be lost.
        """
        if self.rank is not None and self.world_size > 1:
            raise ValueError(
                "this HBPBatchSampler yields the packs of one rank; do not let accelerate prepare its DataLoader, or "
                "make it with rank=None"
            )

    @property
    def _batches_per_micro_batch(self) -> int:
        return self.world_size if self.rank is None else 1

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same in every epoch."""
        return self.plan.num_iterations * self._batches_per_micro_batch

    def __iter__(self) -> Iterator[PackIndices]:
        # Once after load_state_dict; every other pass is a whole epoch.
        first, self._resume_at = self._resume_at, 0
        for batch in range(first, len(self)):
            self._yielded = batch + 1
            yield self._pack(batch)

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch; the current one keeps its position."""
        if epoch != self.epoch:
            self.plan = self._plan(epoch)
            self._yielded = self._resume_at = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain values: batches yielded so far, and what identifies the plan.

        A DataLoader with workers reads ahead of training. torchdata's StatefulDataLoader corrects that; with torch's,
        set "yielded" to the number of trained batches.
        """
        return {"yielded": self._yielded, "settings": self.plan.settings(), "fingerprint": self.plan.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after those of `state`; ValueError if it is of other settings or lengths."""
        if state["settings"]["epoch"] != self.epoch:
            self.plan = self._plan(int(state["settings"]["epoch"]))
        own = self.plan.settings()
        differences = [
            f"{name} was {value} and is {own.get(name)}" for name, value in state["settings"].items()
            if own.get(name) != value
        ]  # fmt: skip
        if state["fingerprint"] != self.plan.fingerprint:
            differences = differences or ["lengths, loss_tokens or micro_batches_per_step differ"]
            raise ValueError(
                f"sampler state of another plan: {'; '.join(differences)}; restore these, or start the epoch again"
            )
        self._yielded = self._resume_at = int(state["yielded"])

    def _pack(self, batch: int) -> PackIndices:
        """Return batch `batch` of the epoch."""
        micro_batch, rank = divmod(batch, self._batches_per_micro_batch)
        at = self.plan.pack_at(micro_batch, rank if self.rank is None else self.rank)
        ids = self.plan.samples_of_pack(at).tolist()
        pack = PackIndices(ids or [self.padding_index])
        pack.level = int(self.plan.pack_levels[at])
        pack.max_tokens = self.plan.levels[pack.level].max_tokens
        pack.micro_batch = micro_batch
        pack.step_loss_tokens = int(self.plan.step_loss_tokens[self.plan.step_of_iteration[micro_batch]])
        return pack

    def _plan(self, epoch: int) -> Plan:
        """Return the plan of an epoch with the steps and without the empty packs of build_plan's."""
        plan = without_empty_packs(build_plan(world_size=self.world_size, epoch=epoch, **self._options))
        if self._num_iterations not in (0, plan.num_iterations):
            raise RuntimeError(
                f"epoch {epoch} has {plan.num_iterations} micro-batches, epoch 0 has {self._num_iterations}: a trainer "
                "that read the length once would lose samples; report it with the levels and the method"
            )
        empty = int(np.count_nonzero(plan.packs.counts == 0))
        if empty and self.padding_index is None:
            raise ValueError(
                f"{empty} packs of epoch {epoch} have no sample, and the others of their level one each; use fewer "
                "ranks or levels, or give padding_index"
            )
        if self.micro_batches_per_step is None:
            return plan
        starts = np.arange(0, plan.num_iterations, self.micro_batches_per_step)
        return dataclasses.replace(plan, step_offsets=np.append(starts, plan.num_iterations))


def without_empty_packs(plan: Plan) -> Plan:
    """Return the plan with each empty pack filled by half of another one: of its iteration if that has two samples.

    Otherwise half of the pack of its level with the most samples. Packs stay empty where each pack of their level has
    one sample. The numbers of packs and iterations are the same.
    """
    counts = plan.packs.counts
    empty = np.flatnonzero(counts == 0).tolist()
    if not empty:
        return plan
    packs = [plan.samples_of_pack(at) for at in range(plan.packs.num_rows)]
    for at in empty:
        own_level = plan.pack_levels == plan.pack_levels[at]
        for among in (own_level & (plan.iteration_of_pack == plan.iteration_of_pack[at]), own_level):
            donor = int(np.argmax(np.where(among, counts, 0)))
            if counts[donor] > 1:
                packs[donor], packs[at] = _halves(packs[donor], plan.lengths)
                counts[[donor, at]] = len(packs[donor]), len(packs[at])
                break
    return dataclasses.replace(plan, packs=Ragged(np.concatenate(packs), offsets_of(counts)))


def _halves(pack: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
    """Return two packs of nearly equal tokens with the samples of `pack`, at least two of them."""
    pack = pack[np.argsort(-lengths[pack], kind="stable")]
    half = longest_processing_time(lengths[pack], 2, int(lengths[pack].sum()))
    assert half is not None  # the capacity is the sum of all
    return pack[half == 0], pack[half == 1]
