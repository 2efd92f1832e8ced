"""Batches for benchmarks: packs of documents with drawn lengths and random tokens.

Owns how a benchmark's pack is filled. The batch itself is the trainer's (data/batch.py). Every rank of a level gets a
pack with the same document lengths: a benchmark measures a level, and packs that run side by side cost the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp_titan.data.batch import PackedBatch, make_batch, shard_batch
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing import Level
from hbp_titan.packing.arrays import IntArray

SIGMA = 1.0
"""Spread of the lognormal lengths; sources of the Tulu3 mixture lie between 0.3 and 1.1 (packing/synthetic.py)."""


@dataclass(frozen=True)
class Documents:
    """median: tokens of the median document, lengths are lognormal; 0: one document fills the pack."""

    median: int

    def __str__(self) -> str:
        return f"median {self.median}" if self.median else "one"

    def lengths(self, max_tokens: int, seed: int) -> IntArray:
        """Lengths of a pack's documents, int64; they sum to `max_tokens`, the last is cut."""
        if not self.median:
            return np.array([max_tokens])
        rng = np.random.default_rng(seed)
        lengths: list[int] = []
        left = max_tokens
        while left:
            drawn = max(2, round(self.median * float(np.exp(SIGMA * rng.standard_normal()))))
            lengths.append(min(drawn, left))
            left -= lengths[-1]
        return np.array(lengths)


def parse_documents(text: str) -> tuple[Documents, ...]:
    """From "one,600": one document that fills the pack, lognormal lengths with a median of 600."""
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word != "one" and not (word.isdecimal() and int(word)):
            raise ValueError(f"documents {text!r}: {word!r} is neither 'one' nor a median number of tokens")
    return tuple(Documents(0 if word == "one" else int(word)) for word in words)


class RandomSamples:
    """A source of documents with the given lengths and random tokens, all of them trained."""

    def __init__(self, lengths: IntArray, vocab_size: int, seed: int) -> None:
        self.ends = np.cumsum(lengths)
        self.tokens = np.random.default_rng(seed).integers(0, vocab_size, int(self.ends[-1]))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [len] and loss mask [len] of one document."""
        tokens = self.tokens[self.ends[index - 1] if index else 0 : self.ends[index]]
        return tokens, np.ones(len(tokens), dtype=bool)


def random_batches(
    packs: Sequence[IntArray], args: ModelArgs, level: Level, level_index: int, rank: int
) -> list[PackedBatch]:
    """This rank's shard of each pack of document lengths; all have the static shapes of one level.

    The loss of a pack is the mean over its trained tokens.
    """
    dp_rank, cp_rank = divmod(rank, level.cp_degree)
    max_documents = max(len(lengths) for lengths in packs)
    batches = []
    for number, lengths in enumerate(packs):
        source = RandomSamples(lengths, args.vocab_size, seed=dp_rank * len(packs) + number)
        weights = np.full(len(lengths), 1.0 / max(int((lengths - 1).sum()), 1))
        batch = make_batch(source, range(len(lengths)), level, level_index, max_documents, weights)
        gather_degree = level.cp_shape(args.num_kv_heads)[0]
        batches.append(shard_batch(batch, cp_rank, level.cp_degree, gather_degree))
    return batches
