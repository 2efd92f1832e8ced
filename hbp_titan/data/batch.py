"""PackedBatch: one pack as the tensors of a micro-batch, and its context-parallel shards.

Owns the layout of a pack: documents in descending length (models/documents.py has the reason), positions that restart
in each, labels shifted inside each, padding at the end. For documents a a a and b b, padded to T = 8:

    input_ids     a0 a1 a2 b0 b1  p  p  p
    position_ids   0  1  2  0  1  0  1  2
    labels        a1 a2  .  b1 .  .  .  .     "." = IGNORE_INDEX, also where the loss mask is 0
    documents      3     2     3              lengths, padding included
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hbp_titan.models.documents import Documents, HeadTailShard, head_tail_shard, pack_documents
from hbp_titan.packing.level import Level

IGNORE_INDEX = -100
# Padding is cut into documents of this length, so that the cost of its attention stays linear in its length.
PAD_DOCUMENT_TOKENS = 1024


class SampleSource(Protocol):
    """What a batch needs of a token store."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [len] and loss mask [len] of one sample."""


@dataclass(frozen=True)
class PackedBatch:
    """One rank's share of a pack: S = T / cp_degree tokens, with T = level.max_tokens.

    Of the shard:
        input_ids, position_ids, labels: int64 [S].
        loss_weights: float32 [S], weight of each label's loss; 0 without a label.
        loss_index: int64 [L], positions of the shard that have a label.
        document_ids: int64 [S], document of each token, padding documents included.
    Of the whole pack:
        documents: for attention; a HeadTailShard if keys and values are gathered (models/documents.py).
        level: index of the level. num_tokens, num_loss_tokens: without padding.
        sample_ids: int64 [n]. lengths: int64 [documents], padding documents last. Both are arrays, not tensors: they
            stay on the host.
        document_shares: float32 [slots], sum of the loss weights of each document (for the balance loss of experts);
            zero-filled to a size that all packs of a level have.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    documents: Documents | HeadTailShard
    loss_weights: Tensor
    loss_index: Tensor
    level: int
    num_tokens: int
    num_loss_tokens: int
    sample_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document_ids: Tensor
    document_shares: Tensor

    def to(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> PackedBatch:
        """Return the batch on `device`; copies from pinned memory are asynchronous.

        stream: a stream for the copies, which then do not wait for what the current stream still has to compute.
        """
        if stream is None:
            return self._map(lambda tensor: tensor.to(device, non_blocking=True))
        with torch.cuda.stream(stream):
            moved = self.to(device)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)

        def used(tensor: Tensor) -> Tensor:
            # It was allocated on `stream`, whose next copies would otherwise reuse its memory too early.
            tensor.record_stream(current)
            return tensor

        return moved._map(used)

    def pin_memory(self) -> PackedBatch:
        """Return the batch in pinned memory (called by the DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return PackedBatch(**tree_map_only(Tensor, change, values))


def document_slots(level: Level, max_documents: int) -> int:
    """Return the length of document_shares for every pack of a level: most documents plus most padding documents."""
    return max_documents + -(-level.max_tokens // PAD_DOCUMENT_TOKENS)


def make_batch(
    store: SampleSource,
    sample_ids: Sequence[int] | np.ndarray,
    level: Level,
    level_index: int,
    max_documents: int,
    sample_weights: np.ndarray | None = None,
) -> PackedBatch:
    """Return the whole pack of `sample_ids` as a batch, not sharded.

    max_documents: most documents of any pack of the level. sample_weights: float [n], loss weight of each trained token
    of each sample; None means 1.
    """
    capacity = level.max_tokens
    ids = np.array(sample_ids, dtype=np.int64)
    samples = [store.sample(index) for index in ids.tolist()]
    # Stable: samples of equal length keep the plan's order.
    order = np.argsort([-len(tokens) for tokens, _ in samples], kind="stable").astype(np.int64)
    ids, samples = ids[order], [samples[place] for place in order]
    lengths = np.array([len(tokens) for tokens, _ in samples], dtype=np.int64)
    num_tokens = int(lengths.sum())
    assert num_tokens <= capacity, f"pack of {num_tokens} tokens exceeds its level's {capacity}"
    padding = np.diff(np.append(np.arange(0, capacity - num_tokens, PAD_DOCUMENT_TOKENS), capacity - num_tokens))
    counts = np.concatenate([lengths, padding])
    ends = np.cumsum(counts)
    starts = ends - counts

    # One element more than the pack: the label of position i is input_ids[i + 1].
    input_ids = np.zeros(capacity + 1, dtype=np.int64)
    trained = np.zeros(capacity + 1, dtype=np.bool_)
    weights = np.zeros(capacity, dtype=np.float32)
    # Into preallocated arrays of the capacity: padding costs no second copy.
    if samples:
        np.concatenate([tokens for tokens, _ in samples], out=input_ids[:num_tokens])
        np.concatenate([mask for _, mask in samples], out=trained[:num_tokens], casting="unsafe")
        own_weights = np.ones(len(ids)) if sample_weights is None else sample_weights[order]
        weights[:num_tokens] = np.repeat(own_weights.astype(np.float32), lengths)
    # Nothing predicts the first token of a document. Clearing it also removes the label across a boundary.
    trained[starts] = False
    has_label = trained[1:]
    loss_index = np.flatnonzero(has_label)
    document_ids = np.repeat(np.arange(len(counts)), counts)
    slots = document_slots(level, max_documents)
    shares = np.bincount(document_ids, weights=weights * has_label, minlength=slots)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids[:capacity]),
        position_ids=torch.from_numpy(np.arange(capacity) - np.repeat(starts, counts)),
        labels=torch.from_numpy(np.where(has_label, input_ids[1:], IGNORE_INDEX)),
        documents=pack_documents(counts),
        loss_weights=torch.from_numpy(weights * has_label),
        loss_index=torch.from_numpy(loss_index),
        level=level_index,
        num_tokens=num_tokens,
        num_loss_tokens=len(loss_index),
        sample_ids=ids,
        lengths=counts,
        document_ids=torch.from_numpy(document_ids),
        document_shares=torch.from_numpy(shares.astype(np.float32)),
    )


def shard_batch(
    batch: PackedBatch, cp_rank: int, cp_degree: int, gather_degree: int = 1, window: int | None = None
) -> PackedBatch:
    """Return the sequence shard of `cp_rank`. Labels are shifted already, so a shard boundary loses none.

    gather_degree: number of groups of cp ranks between which keys and values are all-gathered. Each group holds a
    head-tail shard, each rank a contiguous part of its group's shard. 1 means contiguous shards of the pack itself.
    window: the model's sliding window, which saves layers that have it gathered keys.
    """
    if cp_degree == 1:
        return batch
    # `documents` stays that of the whole pack: attention runs after the exchange between the cp ranks.
    tokens, documents = torch.arange(len(batch.input_ids)), batch.documents
    group, part = divmod(cp_rank, cp_degree // gather_degree)
    if gather_degree > 1:
        positions, documents = head_tail_shard(batch.lengths, group, gather_degree, window)
        tokens = torch.from_numpy(positions)
    size = len(batch.input_ids) // cp_degree
    tokens = tokens[part * size : (part + 1) * size]
    labels = batch.labels[tokens]
    return replace(
        batch,
        input_ids=batch.input_ids[tokens],
        position_ids=batch.position_ids[tokens],
        labels=labels,
        loss_weights=batch.loss_weights[tokens],
        # Positions in the shard, not in the pack.
        loss_index=torch.nonzero(labels != IGNORE_INDEX).flatten(),
        document_ids=batch.document_ids[tokens],
        documents=documents,
    )
