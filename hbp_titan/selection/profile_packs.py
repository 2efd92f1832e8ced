"""Packs for a profile: drawn from the user's real lengths, light ones and heavy ones, filled with random tokens.

Owns which samples a timed pack holds. The batch itself is the trainer's (data/batch.py). All data-parallel ranks get
packs with the same documents, so that an iteration's time is that of its load and of no other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.levels.level_time import FloatArray, pack_loads
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level, Plan, build_plan
from hbp_titan.packing.arrays import IntArray


class RandomSamples:
    """Samples with given lengths and numbers of trained tokens; their tokens are random, the last ones are trained."""

    def __init__(self, lengths: IntArray, loss_tokens: IntArray, vocab_size: int) -> None:
        self.lengths, self.loss_tokens, self.vocab_size = lengths, loss_tokens, vocab_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [len] and loss mask [len]."""
        length = int(self.lengths[index])
        tokens = np.random.default_rng(index).integers(0, self.vocab_size, length)
        return tokens, np.arange(length) >= length - int(self.loss_tokens[index])


@dataclass(frozen=True)
class Packs:
    """Packs of one length, lightest first; loads: float64 [n, 4] as from pack_loads."""

    plan: Plan
    chosen: list[int]
    loads: FloatArray
    max_documents: int
    samples: RandomSamples

    @classmethod
    def draw(cls, max_tokens: int, lengths: IntArray, loss_tokens: IntArray, count: int, vocab_size: int) -> Packs:
        """`count` packs of the samples that fit, at even distances from the least attention to the most.

        Best-fit decreasing packs samples of like length together, so that packs differ as much as the data allow.
        Where there are fewer packs, some are taken more than once.
        """
        plan = build_plan(lengths, [Level(max_tokens)], 1, "flat_sorted", loss_tokens=loss_tokens, overlong="skip")
        order = np.argsort(plan.pack_sum_sq, kind="stable")
        # What was left over at the end may be nearly empty packs.
        half_full = order[2 * plan.pack_tokens[order] >= max_tokens]
        order = half_full if len(half_full) else order
        chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)].tolist()
        documents = max(int(plan.packs.counts[pack]) for pack in chosen)
        samples = RandomSamples(plan.lengths, plan.loss_tokens, vocab_size)
        return cls(plan, chosen, pack_loads(plan)[chosen], documents, samples)

    @property
    def heaviest(self) -> int:
        """The pack with the most attention."""
        return len(self.chosen) - 1

    @property
    def max_loss_tokens(self) -> int:
        """Most trained tokens of a pack."""
        return int(self.loads[:, 1].max())

    def batch(self, number: int, level: Level, level_index: int, args: ModelArgs, rank: int) -> PackedBatch:
        """This rank's shard of pack `number` at a level of this length; its loss is a mean over trained tokens."""
        samples = self.plan.pack(self.chosen[number], 0)
        weights = np.full(len(samples), 1.0 / max(float(self.loads[number, 1]), 1.0))
        whole = make_batch(self.samples, samples, level, level_index, self.max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        return shard_batch(whole, rank % level.cp_degree, level.cp_degree, gather_degree)
