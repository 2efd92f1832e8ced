"""Head-tail sequence shards: which tokens of a pack each rank holds where keys and values are all-gathered.

Owns the cut of a pack into shards whose causal work is even for any mix of documents. Every document, padding
documents too, is cut into 2C chunks; rank r of C holds chunk r (a cheap head) and chunk 2C-1-r (an expensive tail).
Chunks of a document differ by at most one token: what its length leaves over 2C is dealt one token a chunk, going round
the chunks and, in the next document, on from where the last one stopped. A document shorter than 2C just has empty
chunks.

So after any number of documents the 2C columns of chunks differ by at most one token, and at the end of the pack
every rank holds T / C tokens, its heads first (ceil(T / 2C)), then its tails (floor(T / 2C)): static shapes. The
largest rank's causal pairs exceed the mean by less than 2 per token of the pack (tests/data/test_sequence_shard.py),
whatever the documents; a token of a document of length L has L / 2 pairs on average.

With documents of 9 and 7 tokens and C = 2 (digits: the rank that holds the token; a chunk that got a spare token: ^):

    document   0 0 0 1 1 1 1 0 0 | 0 1 1 1 1 0 0
    chunk      0 0 0 1 1 2 2 3 3 | 0 1 1 2 2 3 3
               ^                 |   ^   ^   ^
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hbp_titan.models.documents import Documents, IntArray, pack_documents


class ShardPass(NamedTuple):
    """One of the two passes of varlen attention over gathered keys and values: of all heads, or of all tails.

    documents: for each document with queries in this pass, its chunk as queries and its keys up to the chunk's end.
    key_rows: int64 [keys], where each of these keys lies in the shards of all ranks laid end to end; ascending inside
        a chunk, each row at most once.
    """

    documents: Documents
    key_rows: Tensor


class HeadTailShard(NamedTuple):
    """What attention of one rank's shard needs in addition to its tokens."""

    heads: ShardPass
    tails: ShardPass


def head_tail_shard(lengths: IntArray, rank: int, degree: int) -> tuple[IntArray, HeadTailShard]:
    """The tokens of `rank` (positions in the pack, int64 [T / degree]) and what its attention needs.

    lengths: of the pack's documents, padding included; they sum to T, a multiple of `degree`.
    """
    bounds = chunk_bounds(lengths, degree)
    shards = [_shard_tokens(bounds, other) for other in range(degree)]
    num_tokens = int(lengths.sum())
    rows = np.empty(num_tokens, dtype=np.int64)
    rows[np.concatenate(shards)] = np.arange(num_tokens)
    passes = (_pass(bounds, chunk, rows) for chunk in (rank, 2 * degree - 1 - rank))
    return shards[rank], HeadTailShard(*passes)


def chunk_bounds(lengths: IntArray, degree: int) -> IntArray:
    """Where the chunks of each document begin and end, int64 [documents, 2 * degree + 1], as positions in the pack."""
    chunks = 2 * degree
    starts = np.cumsum(lengths) - lengths
    base, spare = np.divmod(lengths, chunks)
    first = (np.cumsum(spare) - spare)[:, None]
    turn = (np.arange(chunks) - first) % chunks
    sizes = base[:, None] + (turn < spare[:, None])
    return starts[:, None] + np.pad(np.cumsum(sizes, axis=1), ((0, 0), (1, 0)))


def _shard_tokens(bounds: IntArray, rank: int) -> IntArray:
    """Positions of the heads of `rank` in the order of the documents, then of its tails."""
    tail = bounds.shape[1] - 2 - rank
    starts = np.concatenate([bounds[:, rank], bounds[:, tail]])
    return _ranges(starts, np.concatenate([bounds[:, rank + 1], bounds[:, tail + 1]]) - starts)


def _pass(bounds: IntArray, chunk: int, rows: IntArray) -> ShardPass:
    """Attention of chunk `chunk` of all documents. rows: of each token of the pack among the gathered keys."""
    # A document too short to have tokens in this chunk has no query here, and kernels would launch blocks for it.
    bounds = bounds[bounds[:, chunk + 1] > bounds[:, chunk]]
    queries, keys = bounds[:, chunk + 1] - bounds[:, chunk], bounds[:, chunk + 1] - bounds[:, 0]
    return ShardPass(pack_documents(queries, keys), torch.from_numpy(rows[_ranges(bounds[:, 0], keys)]))


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... (sizes[0] of them), then those of starts[1], and so on."""
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
