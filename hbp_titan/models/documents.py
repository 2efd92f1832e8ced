"""Documents of a packed sequence: the arguments of varlen attention kernels, and the shards of context parallelism.

Owns two divisions of a pack. `pack_documents` groups contiguous documents of similar length into a few kernel calls:
flash kernels launch ceil(max_seqlen / 128) thread blocks for every document of a call, however short it is, so one
document of 8K with 20 of 400 tokens launches 16 times the useful blocks. As documents are ordered longest first
(data/batch.py), two or three calls need at most a third more than the useful blocks (docs/benchmarks.md;
grid: flash-attention v2.8 csrc/flash_attn/src/flash_fwd_launch_template.h).
`head_tail_shard` divides a pack over cp ranks that all-gather keys and values, with even causal work for any documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

BLOCK_TOKENS = 128
"""Queries (or, in backward, keys) of a document that one thread block processes, per head."""
MAX_GROUPS = 3
# Another call has costs of its own (a launch, a last wave of blocks), so it must save this share of the blocks.
_MIN_SAVING = 0.02

IntArray = NDArray[np.int64]


class DocumentGroup(NamedTuple):
    """Contiguous documents and the arguments of their kernel call.

    cu_seqlens_q, cu_seqlens_k: int32 [documents + 1], ascending offsets of the documents in the group's queries and
        keys, from 0 to num_queries or num_keys. Every document has at least one query and a key for each query.
    num_queries, num_keys: rows of the group. max_seqlen_q, max_seqlen_k: of its longest document.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    num_queries: int
    num_keys: int
    max_seqlen_q: int
    max_seqlen_k: int


class Documents(NamedTuple):
    """All documents of a packed sequence, as consecutive groups and as a single group (`whole`)."""

    groups: tuple[DocumentGroup, ...]
    whole: DocumentGroup


def pack_documents(
    lengths: ArrayLike,
    lengths_k: ArrayLike | None = None,
    max_groups: int = MAX_GROUPS,
    device: torch.device | str | None = None,
) -> Documents:
    """Return consecutive documents of these lengths in at most `max_groups` groups.

    lengths: int [documents], queries of each, at least 1. lengths_k: keys of each, at least its queries; default
    `lengths`. device: of the tensors. Raises ValueError for other lengths.
    """
    queries = np.asarray(lengths, dtype=np.int64)
    keys = queries if lengths_k is None else np.asarray(lengths_k, dtype=np.int64)
    if (queries < 1).any() or (keys < queries).any():
        raise ValueError(
            f"documents have {queries.tolist()} queries and {keys.tolist()} keys; each needs at least one query, and a "
            "key for each query"
        )
    bounds = [0, *group_ends(queries, keys, max_groups)]
    groups = tuple(_group(queries[first:end], keys[first:end], device) for first, end in itertools.pairwise(bounds))
    return Documents(groups, groups[0] if len(groups) == 1 else _group(queries, keys, device))


def group_ends(queries: IntArray, keys: IntArray, max_groups: int = MAX_GROUPS) -> list[int]:
    """Return the end of each group, as a number of documents, for the division that launches the fewest blocks.

    Fewer groups are preferred if more would save less than _MIN_SAVING.
    """
    if not len(queries):
        return []
    sizes = np.stack([-(-queries // BLOCK_TOKENS), -(-keys // BLOCK_TOKENS)])
    # Neighbors of equal size share a group: a pack of a thousand short documents has only a few dozen sizes.
    ends = np.flatnonzero(np.append((np.diff(sizes) != 0).any(axis=0), True)) + 1
    costs = _costs_of_ranges(sizes[:, ends - 1], np.diff(ends, prepend=0))
    cuts = _best_cuts(costs, min(max_groups, len(ends)))
    fewest = min(total for total, _ in cuts)
    chosen = next(cut for total, cut in cuts if total <= (1 + _MIN_SAVING) * fewest)
    return [int(ends[i - 1]) for i in chosen]


def launched_blocks(documents: Sequence[DocumentGroup]) -> int:
    """Return the thread blocks per head that kernels launch in forward, with or without work."""
    return sum((len(g.cu_seqlens_q) - 1) * -(-g.max_seqlen_q // BLOCK_TOKENS) for g in documents)


def _costs_of_ranges(sizes: IntArray, counts: IntArray) -> IntArray:
    """Return the blocks [first, last] of runs first..last as one group, forward and backward, for first <= last.

    sizes: blocks of a document of each run, over queries and over keys, [2, runs]. counts: documents of each run.
    """
    num_runs = len(counts)
    longest = np.zeros((2, num_runs, num_runs), dtype=np.int64)
    for first in range(num_runs):
        longest[:, first, first:] = np.maximum.accumulate(sizes[:, first:], axis=1)
    documents = np.cumsum(counts)[None, :] - (np.cumsum(counts) - counts)[:, None]
    return longest.sum(axis=0) * documents


def _best_cuts(costs: IntArray, max_groups: int) -> list[tuple[int, list[int]]]:
    """Return, for 1, 2, ... groups, the fewest blocks and the end of each group as a number of runs."""
    num_runs = len(costs)
    # Dynamic programming over the number of groups. best[i]: fewest blocks of runs 0..i.
    best = costs[0].copy()
    found: list[tuple[int, list[int]]] = [(int(best[-1]), [num_runs])]
    cut_before: list[IntArray] = []
    for _ in range(1, max_groups):
        # total[i, j]: runs 0..i-1 in one group less, runs i..j as the last group.
        total = np.full((num_runs, num_runs), np.iinfo(np.int64).max // 2)
        for first in range(1, num_runs):
            total[first, first:] = best[first - 1] + costs[first, first:]
        cut_before.append(total.argmin(axis=0))
        best = total.min(axis=0)
        ends = [num_runs]
        for cuts in reversed(cut_before):
            ends.append(int(cuts[ends[-1] - 1]))
        found.append((int(best[-1]), ends[::-1]))
    return found


def _group(queries: IntArray, keys: IntArray, device: torch.device | str | None) -> DocumentGroup:
    ends_q, ends_k = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (queries, keys))
    return DocumentGroup(
        # Copied from lists, not shared with NumPy: under FakeTensorMode (dry runs) the copies are fake tensors.
        torch.tensor(ends_q.tolist(), dtype=torch.int32, device=device),
        torch.tensor(ends_k.tolist(), dtype=torch.int32, device=device),
        int(ends_q[-1]),
        int(ends_k[-1]),
        int(queries.max(initial=0)),
        int(keys.max(initial=0)),
    )


class ShardPass(NamedTuple):
    """One of two passes of varlen attention over gathered keys and values: all heads, or all tails.

    documents: for each document with queries in this pass, its chunk as queries and its keys up to the chunk's end.
    key_rows: int64 [keys], the row of each of these keys in the concatenated shards of all ranks; ascending inside a
        chunk, each row at most once.
    """

    documents: Documents
    key_rows: Tensor


class HeadTailShard(NamedTuple):
    """The two attention passes of one rank's shard.

    windowed: the same for layers with a sliding window of `window`, without keys that no query of the pass attends to.
    """

    heads: ShardPass
    tails: ShardPass
    windowed: tuple[ShardPass, ShardPass] | None = None
    window: int | None = None

    def passes(self, window: int | None) -> tuple[ShardPass, ShardPass]:
        """Return the passes of heads and of tails of a layer with this window, with all keys for another window."""
        return (self.heads, self.tails) if window != self.window or self.windowed is None else self.windowed


def head_tail_shard(
    lengths: IntArray, rank: int, degree: int, window: int | None = None
) -> tuple[IntArray, HeadTailShard]:
    """Return the tokens of `rank` (positions in the pack, int64 [T / degree]) and its attention passes.

    lengths: of the pack's documents, padding included; they sum to T, a multiple of `degree` = C. window: of the
    model's layers that have one (ModelArgs.sliding_window). Every document is cut
    into 2C chunks whose sizes differ by at most one token; rank r holds chunk r (a cheap head) and chunk 2C-1-r (an
    expensive tail). Tokens that 2C does not divide go to one chunk each, round-robin, continuing in the next document.
    So every rank holds T / C tokens, first ceil(T / 2C) of heads, then floor(T / 2C) of tails: static shapes.
    The largest rank's causal pairs exceed the mean by less than 2 per token of the pack, for any documents.

    With documents of 9 and 7 tokens and C = 2 (digits: rank of the token; ^: a chunk that got an extra token):

        document   0 0 0 1 1 1 1 0 0 | 0 1 1 1 1 0 0
        chunk      0 0 0 1 1 2 2 3 3 | 0 1 1 2 2 3 3
                   ^                 |   ^   ^   ^
    """
    bounds = chunk_bounds(lengths, degree)
    shards = [_shard_tokens(bounds, other) for other in range(degree)]
    num_tokens = int(lengths.sum())
    rows = np.empty(num_tokens, dtype=np.int64)
    rows[np.concatenate(shards)] = np.arange(num_tokens)

    def passes(window: int | None) -> tuple[ShardPass, ShardPass]:
        return _pass(bounds, rank, rows, window), _pass(bounds, 2 * degree - 1 - rank, rows, window)

    return shards[rank], HeadTailShard(*passes(None), passes(window) if window else None, window)


def chunk_bounds(lengths: IntArray, degree: int) -> IntArray:
    """Return the bounds of each document's chunks as positions in the pack, int64 [documents, 2 * degree + 1]."""
    chunks = 2 * degree
    starts = np.cumsum(lengths) - lengths
    base, spare = np.divmod(lengths, chunks)
    first = (np.cumsum(spare) - spare)[:, None]
    turn = (np.arange(chunks) - first) % chunks
    sizes = base[:, None] + (turn < spare[:, None])
    return starts[:, None] + np.pad(np.cumsum(sizes, axis=1), ((0, 0), (1, 0)))


def _shard_tokens(bounds: IntArray, rank: int) -> IntArray:
    """Return the positions of the heads of `rank` in document order, then those of its tails."""
    tail = bounds.shape[1] - 2 - rank
    starts = np.concatenate([bounds[:, rank], bounds[:, tail]])
    return _ranges(starts, np.concatenate([bounds[:, rank + 1], bounds[:, tail + 1]]) - starts)


def _pass(bounds: IntArray, chunk: int, rows: IntArray, window: int | None) -> ShardPass:
    """Return the attention pass of one chunk of all documents. rows: row of each token among the gathered keys."""
    # Documents too short to have tokens in this chunk have no query here, and kernels would launch blocks for them.
    bounds = bounds[bounds[:, chunk + 1] > bounds[:, chunk]]
    ends = bounds[:, chunk + 1]
    queries, keys = ends - bounds[:, chunk], ends - bounds[:, 0]
    if window is not None:
        keys = np.minimum(keys, queries + window - 1)
    return ShardPass(pack_documents(queries, keys), torch.from_numpy(rows[_ranges(ends - keys, keys)]))


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return starts[0], starts[0] + 1, ... (sizes[0] of them), then those of starts[1], and so on."""
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


@dataclass
class BalanceState:
    """The documents of the current pack, read by layers with experts; without them there are no balance losses.

    document_ids_T: int64 [T], the document of each of this rank's tokens. document_shares_N: float32 [N], each
        document's share of the loss weight of the optimizer step.
    sum_counts: sums a tensor over the ranks that share the documents (context parallelism).
    """

    document_ids_T: Tensor | None = None
    document_shares_N: Tensor | None = None
    sum_counts: Callable[[Tensor], Tensor] = lambda counts: counts

    def set_documents(self, document_ids_T: Tensor, document_shares_N: Tensor) -> None:
        """Set the documents of the next forward and of its recomputation."""
        self.document_ids_T, self.document_shares_N = document_ids_T, document_shares_N
