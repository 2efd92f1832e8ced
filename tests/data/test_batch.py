"""The layout of a pack by literals: labels, positions, boundaries, padding and shards."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from hbp_titan.data.batch import IGNORE_INDEX, PAD_DOCUMENT_TOKENS, make_batch, shard_batch
from hbp_titan.models.documents import HeadTailShard
from hbp_titan.packing import Level

X = IGNORE_INDEX


class Samples:
    """Two samples: a user token and trained tokens (1), as a token store returns them."""

    rows: tuple[tuple[Any, Any], ...] = (([11, 12, 13], [0, 1, 1]), ([21, 22], [1, 1]), ([31], [1]))

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = self.rows[index]
        return np.array(tokens, np.uint32), np.array(mask, np.uint8)


def test_labels_are_shifted_inside_each_document_and_positions_restart() -> None:
    batch = make_batch(Samples(), [0, 1], Level(8, 2), 1, max_documents=4)
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.labels.tolist() == [12, 13, X, 22, X, X, X, X]
    assert batch.loss_index.tolist() == [0, 1, 3]
    assert batch.lengths.tolist() == [3, 2, 3]
    assert batch.documents.whole.cu_seqlens_q.tolist() == batch.documents.whole.cu_seqlens_k.tolist() == [0, 3, 5, 8]
    assert batch.documents.whole.max_seqlen_q == batch.documents.whole.max_seqlen_k == 3
    assert (batch.num_tokens, batch.num_loss_tokens, batch.level) == (5, 3, 1)


def test_documents_lie_longest_first_with_their_weights_and_numbers() -> None:
    batch = make_batch(Samples(), [2, 1, 0], Level(8), 0, max_documents=3, sample_weights=np.array([4.0, 2.0, 0.5]))
    assert batch.sample_ids.tolist() == [0, 1, 2]
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 31, 0, 0]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0, 2.0, 0, 0, 0, 0]
    assert batch.document_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert batch.document_shares.tolist() == [1.0, 2.0, 0, 0]


def test_attention_is_called_by_groups_of_similar_length() -> None:
    samples = Samples()
    samples.rows = tuple((np.ones(n), np.ones(n)) for n in (1, 600, 130, 2, 140, 3))
    batch = make_batch(samples, range(6), Level(1000), 0, max_documents=6)
    # The padding of 124 tokens lies with the short documents behind.
    assert [group.cu_seqlens_q.tolist() for group in batch.documents.groups] == [
        [0, 600],
        [0, 140, 270],
        [0, 3, 5, 6, 130],
    ]
    assert [group.max_seqlen_q for group in batch.documents.groups] == [600, 140, 124]


def test_shards_cut_the_sequence_but_no_label() -> None:
    batch = make_batch(Samples(), [0, 1], Level(8, 4), 0, max_documents=2)
    shards = [shard_batch(batch, rank, 4) for rank in range(4)]
    assert [shard.input_ids.tolist() for shard in shards] == [[11, 12], [13, 21], [22, 0], [0, 0]]
    assert [shard.labels.tolist() for shard in shards] == [[12, 13], [X, 22], [X, X], [X, X]]
    assert [shard.position_ids.tolist() for shard in shards] == [[0, 1], [2, 0], [1, 0], [1, 2]]
    assert [shard.loss_index.tolist() for shard in shards] == [[0, 1], [1], [], []]
    assert all(shard.documents is batch.documents for shard in shards)


def test_head_tail_shards_take_labels_positions_and_weights_along() -> None:
    # Documents of 3, 2 and 3 (padding) tokens in four chunks: 0 | 1 | 2 | - and 3 | - | - | 4 and - | 5 | 6 | 7.
    batch = make_batch(Samples(), [0, 1], Level(8, 2, "allgather"), 0, 2, np.array([0.5, 2.0]))
    first, second = (shard_batch(batch, rank, 2, gather_degree=2) for rank in range(2))
    assert first.input_ids.tolist() == [11, 21, 22, 0]
    assert first.position_ids.tolist() == [0, 0, 1, 2]
    assert first.labels.tolist() == [12, 22, X, X]
    assert first.loss_weights.tolist() == [0.5, 2.0, 0.0, 0.0]
    assert first.loss_index.tolist() == [0, 1]
    assert second.input_ids.tolist() == [12, 0, 13, 0]
    assert second.labels.tolist() == [13, X, X, X]
    assert second.loss_index.tolist() == [0]
    assert isinstance(first.documents, HeadTailShard)
    # Chunks of one token: its keys are the document up to it. Of the tails 2 and 1 tokens.
    assert first.documents.heads.documents.whole.cu_seqlens_k.tolist() == [0, 1, 2]
    assert first.documents.tails.documents.whole.cu_seqlens_k.tolist() == [0, 2, 5]


def test_documents_have_numbers_and_shares_which_shards_take_along() -> None:
    # Three, two and (padding) three tokens; two trained tokens of weight 0.25 and one of 0.5.
    batch = make_batch(Samples(), [0, 1], Level(8, 2, "allgather"), 0, 2, np.array([0.25, 0.5]))
    assert batch.document_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.document_shares.tolist() == [0.5, 0.5, 0.0]
    assert batch.document_shares.sum() == batch.loss_weights.sum()
    shards = [shard_batch(batch, rank, 2, gather_degree=2) for rank in range(2)]
    assert [shard.document_ids.tolist() for shard in shards] == [[0, 1, 1, 2], [0, 2, 0, 2]]
    assert all(shard.document_shares.equal(batch.document_shares) for shard in shards)


def test_ranks_of_a_group_hold_contiguous_parts_of_its_head_tail_shard() -> None:
    batch = make_batch(Samples(), [0, 1], Level(8, 4, "hybrid"), 0, max_documents=2)
    shards = [shard_batch(batch, rank, 4, gather_degree=2) for rank in range(4)]
    assert [shard.input_ids.tolist() for shard in shards] == [[11, 21], [22, 0], [12, 0], [13, 0]]
    assert [shard.loss_index.tolist() for shard in shards] == [[0, 1], [], [0], []]


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = make_batch(Samples(), [0, 1], Level(8, 2, "allgather"), 0, max_documents=2)
    moved = shard_batch(batch, 0, 2, gather_degree=2).to(torch.device("meta"))
    tensors = [leaf for leaf in tree_leaves(dataclasses.astuple(moved)) if isinstance(leaf, torch.Tensor)]
    # Seven of the batch; of each pass the rows of its keys, and the boundaries of its group and of the whole.
    assert len(tensors) == 7 + 2 * (1 + 2 + 2)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.num_tokens == 5


def test_copies_on_a_stream_of_their_own_are_waited_for_and_keep_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            log.append(f"off {self.name}")

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    copies, compute = Stream("copies"), Stream("compute")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, non_blocking: log.append("copy") or tensor.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"used on {stream.name}"))
    batch = make_batch(Samples(), [0, 1], Level(8), 0, max_documents=2)
    moved = batch.to(torch.device("cpu"), copies)  # type: ignore[arg-type]
    tensors = sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(dataclasses.astuple(batch)))
    assert log == [
        *("on copies", *["copy"] * tensors, "off copies", "compute waits for copies"),
        *["used on compute"] * tensors,
    ]
    assert moved.input_ids.equal(batch.input_ids)


def test_a_batch_names_the_samples_of_the_whole_pack_on_the_host() -> None:
    batch = make_batch(Samples(), [1, 0], Level(8, 2), 0, max_documents=2)
    for shard in (shard_batch(batch, rank, 2) for rank in range(2)):
        moved = shard.to(torch.device("meta"))
        assert isinstance(moved.sample_ids, np.ndarray)
        assert moved.sample_ids.tolist() == [0, 1]


def test_labels_and_weights_equal_those_filled_document_by_document() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        samples = Samples()
        lengths = generator.integers(1, 9, size=generator.integers(0, 6))
        lengths = np.sort(lengths)[::-1]
        samples.rows = tuple((generator.integers(1, 9, n), generator.integers(0, 2, n)) for n in lengths)
        weights = generator.random(len(lengths))
        capacity = int(lengths.sum() + generator.integers(1, 2000))
        batch = make_batch(samples, range(len(lengths)), Level(capacity), 0, max_documents=8, sample_weights=weights)
        labels, loss_weights = [X] * capacity, [0.0] * capacity
        start = 0
        for (tokens, mask), weight in zip(samples.rows, weights, strict=True):
            for i in range(len(tokens) - 1):
                if mask[i + 1]:
                    labels[start + i], loss_weights[start + i] = tokens[i + 1], weight
            start += len(tokens)
        assert batch.labels.tolist() == labels
        assert batch.loss_weights.equal(torch.tensor(loss_weights, dtype=torch.float32))
        assert batch.loss_index.tolist() == [i for i in range(capacity) if labels[i] != X]


def test_single_token_document_trains_nothing_and_an_empty_pack_is_padding() -> None:
    single = make_batch(Samples(), [2], Level(4), 0, max_documents=1)
    assert single.labels.tolist() == [X, X, X, X]
    empty = make_batch(Samples(), [], Level(4), 0, max_documents=1)
    assert empty.lengths.tolist() == [4]
    assert empty.num_tokens == 0


def test_padding_is_cut_into_documents_of_bounded_length() -> None:
    level = Level(4 * PAD_DOCUMENT_TOKENS)
    batch = make_batch(Samples(), [1], level, 0, max_documents=3)
    assert batch.lengths.tolist() == [2, 1024, 1024, 1024, 1022]
    # Three documents and four pieces of padding, whatever the pack holds.
    assert len(batch.document_shares) == 7
    assert batch.position_ids.max() == PAD_DOCUMENT_TOKENS - 1


def test_pack_over_its_capacity_is_refused() -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        make_batch(Samples(), [0, 1], Level(4), 0, max_documents=2)
