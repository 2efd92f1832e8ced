"""PackedBatch: one pack as the tensors of a training step, and the context-parallel shard of it.

Owns the layout of a pack: documents one after the other, the longest first (models/documents.py says why), positions
that restart in each, labels shifted inside each, padding at the end. For documents a a a and b b, padded up to T = 8:

    input_ids     a0 a1 a2 b0 b1  p  p  p
    position_ids   0  1  2  0  1  0  1  2
    labels        a1 a2  .  b1 .  .  .  .     "." = IGNORE_INDEX, also where the loss mask is 0
    documents      3     2     3              lengths, those of padding too
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
PAD_DOCUMENT_TOKENS = 1024
"""Padding is cut into documents of at most so many tokens: its attention stays linear in its length."""


class SampleSource(Protocol):
    """What a batch needs of a token store."""

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [len] and loss mask [len] of one sample."""


@dataclass(frozen=True)
class PackedBatch:
    """One rank's share of a pack. S = T / cp_degree tokens; T = level.max_tokens.

    input_ids, position_ids, labels: int64 [S]. documents: of the whole pack; a HeadTailShard for attention over
    gathered keys and values, where the shard is one of heads and tails (data/sequence_shard.py).
    loss_weights: float32 [S], what the loss of each label counts (0 where there is none).
    loss_index: int64 [L], the positions of the shard whose label is trained. num_tokens, num_loss_tokens: of the
    whole pack, padding not counted. sample_ids: int64 [n], the samples of the whole pack in its order; an array,
    because it stays on the host. lengths: int64 [documents], tokens of each document of the whole pack, those of
    padding last; on the host too.
    document_ids: int64 [S], the document of each token, padding's included. document_shares: float32 [slots], the
    sum of the loss weights of each document of the pack, whatever the shard (models/balance.py); zeros behind the
    documents fill it up to a size that all packs of a level have.
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

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; copies run asynchronously from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return PackedBatch(**tree_map_only(Tensor, change, values))


def document_slots(level: Level, max_documents: int) -> int:
    """Length of document_shares for every pack of a level: its most documents and its most padding."""
    return max_documents + -(-level.max_tokens // PAD_DOCUMENT_TOKENS)


def make_batch(
    store: SampleSource,
    sample_ids: Sequence[int] | np.ndarray,
    level: Level,
    level_index: int,
    max_documents: int,
    sample_weights: np.ndarray | None = None,
) -> PackedBatch:
    """The whole pack of `sample_ids` as a batch (the shard of cp_degree 1).

    sample_weights: float [n], the loss weight of each trained token of each sample; 1 unless given.
    """
    capacity = level.max_tokens
    ids = np.array(sample_ids, dtype=np.int64)
    samples = [store.sample(index) for index in ids.tolist()]
    order = np.argsort([-len(tokens) for tokens, _ in samples], kind="stable").astype(np.int64)
    ids, samples = ids[order], [samples[place] for place in order]
    lengths = np.array([len(tokens) for tokens, _ in samples], dtype=np.int64)
    num_tokens = int(lengths.sum())
    assert num_tokens <= capacity, f"pack of {num_tokens} tokens exceeds its level's {capacity}"
    counts = np.concatenate([lengths, _padding_documents(capacity - num_tokens)])
    ends = np.cumsum(counts)
    starts = ends - counts

    # One more than the pack, for what follows a token: the label of position i is input_ids[i + 1].
    input_ids = np.zeros(capacity + 1, dtype=np.int64)
    trained = np.zeros(capacity + 1, dtype=np.bool_)
    weights = np.zeros(capacity, dtype=np.float32)
    if samples:
        np.concatenate([tokens for tokens, _ in samples], out=input_ids[:num_tokens])
        np.concatenate([mask for _, mask in samples], out=trained[:num_tokens], casting="unsafe")
        own_weights = np.ones(len(ids)) if sample_weights is None else sample_weights[order]
        weights[:num_tokens] = np.repeat(own_weights.astype(np.float32), lengths)
    # The first token of a document is predicted by nothing.
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


def _padding_documents(tokens: int) -> NDArray[np.int64]:
    """Lengths of the documents that `tokens` of padding are cut into."""
    return np.diff(np.append(np.arange(0, tokens, PAD_DOCUMENT_TOKENS), tokens))


def shard_batch(batch: PackedBatch, cp_rank: int, cp_degree: int, gather_degree: int = 1) -> PackedBatch:
    """The sequence shard of `cp_rank`. Labels were shifted before: a boundary loses no label.

    gather_degree: groups of cp ranks between which keys and values are all-gathered; they hold head-tail shards, and
    the ranks of a group hold contiguous parts of its shard. 1: contiguous shards of the pack itself.
    """
    if cp_degree == 1:
        return batch
    tokens, documents = torch.arange(len(batch.input_ids)), batch.documents
    group, part = divmod(cp_rank, cp_degree // gather_degree)
    if gather_degree > 1:
        positions, documents = head_tail_shard(batch.lengths, group, gather_degree)
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
        loss_index=torch.nonzero(labels != IGNORE_INDEX).flatten(),
        document_ids=batch.document_ids[tokens],
        documents=documents,
    )
