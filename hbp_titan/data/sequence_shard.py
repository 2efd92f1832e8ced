"""Head-tail sequence shards: which tokens of a pack each rank holds where keys and values are all-gathered.

Owns the cut of a pack into shards whose causal work is even for any mix of documents. Every document, padding
documents too, is cut into 2C chunks; rank r of C holds chunk r (a cheap head) and chunk 2C-1-r (a dear tail). Chunks
of a document differ by at most one token: what its length leaves over 2C is dealt one token a chunk, going round the
chunks and, in the next document, on from where the last one stopped. A document shorter than 2C just has empty chunks.

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
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]


class HeadTailShard(NamedTuple):
    """What attention of one rank's shard needs beside its tokens: two passes of varlen attention over gathered K/V.

    head_q, head_k: int32 [2 * slots + 1] (slots: documents that cu_seqlens has room for), cu_seqlens of queries and
        keys of the pass over the heads: for each document its chunk against its keys up to the chunk's end, then the
        rest of its keys, which has no query. Padded like cu_seqlens.
    tail_q, tail_k: the same of the pass over the tails.
    kv_order: int64 [T], the place of each token of the pack in the shards of all ranks laid end to end.
    """

    head_q: Tensor
    head_k: Tensor
    tail_q: Tensor
    tail_k: Tensor
    kv_order: Tensor


def head_tail_shard(cu_seqlens: IntArray, rank: int, degree: int) -> tuple[IntArray, HeadTailShard]:
    """The tokens of `rank` (positions in the pack, int64 [T / degree]) and what its attention needs.

    cu_seqlens: [slots + 1], 0 first and T last; T is a multiple of `degree`.
    """
    bounds = chunk_bounds(cu_seqlens, degree)
    shards = [_shard_tokens(bounds, other) for other in range(degree)]
    kv_order = np.empty(cu_seqlens[-1], dtype=np.int64)
    kv_order[np.concatenate(shards)] = np.arange(cu_seqlens[-1])
    head_q, head_k = _segments(bounds, rank)
    tail_q, tail_k = _segments(bounds, 2 * degree - 1 - rank)
    return shards[rank], HeadTailShard(head_q, head_k, tail_q, tail_k, torch.from_numpy(kv_order))


def chunk_bounds(cu_seqlens: IntArray, degree: int) -> IntArray:
    """Where the chunks of each document begin and end, int64 [documents, 2 * degree + 1], as positions in the pack."""
    chunks = 2 * degree
    starts = cu_seqlens[:-1].astype(np.int64)
    base, spare = np.divmod(np.diff(cu_seqlens.astype(np.int64)), chunks)
    first = (np.cumsum(spare) - spare)[:, None]
    turn = (np.arange(chunks) - first) % chunks
    sizes = base[:, None] + (turn < spare[:, None])
    return starts[:, None] + np.pad(np.cumsum(sizes, axis=1), ((0, 0), (1, 0)))


def _shard_tokens(bounds: IntArray, rank: int) -> IntArray:
    """Positions of the heads of `rank` in the order of the documents, then of its tails."""
    tail = bounds.shape[1] - 2 - rank
    starts = np.concatenate([bounds[:, rank], bounds[:, tail]])
    sizes = np.concatenate([bounds[:, rank + 1], bounds[:, tail + 1]]) - starts
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def _segments(bounds: IntArray, chunk: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens of queries and of keys, [2 * documents + 1]: the chunk and keys up to its end, none and the rest."""
    ends = bounds[:, chunk + 1]
    keys = np.stack([ends, bounds[:, -1]], axis=1).ravel()
    queries = np.repeat(np.cumsum(ends - bounds[:, chunk]), 2)
    cu_seqlens_q, cu_seqlens_k = (torch.from_numpy(np.pad(x, (1, 0)).astype(np.int32)) for x in (queries, keys))
    return cu_seqlens_q, cu_seqlens_k
