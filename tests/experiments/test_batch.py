"""Packs of a benchmark: full, the same lengths on every rank, shards that make up the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hbp_titan.data.batch import IGNORE_INDEX
from hbp_titan.experiments.bench_train import Documents, parse_documents, random_batches
from hbp_titan.models.registry import get_flavor
from hbp_titan.packing import Level


def test_documents_fill_a_pack_with_the_median_asked_for() -> None:
    assert Documents(0).lengths(8192, seed=3).tolist() == [8192]
    lengths = Documents(600).lengths(1_000_000, seed=0)
    assert lengths.sum() == 1_000_000
    assert lengths.min() >= 1
    assert np.median(lengths) == pytest.approx(600, rel=0.1)
    # Lognormal with sigma 1: 84% lie below e times the median.
    assert (lengths < 600 * np.e).mean() == pytest.approx(0.84, abs=0.03)
    assert Documents(600).lengths(5000, seed=1).tolist() != Documents(600).lengths(5000, seed=2).tolist()


def test_documents_are_parsed_and_mistakes_named() -> None:
    assert parse_documents("one, 600") == (Documents(0), Documents(600))
    assert [str(documents) for documents in parse_documents("one,600")] == ["one", "median 600"]
    for word in ("0", "-1", "x", ""):
        with pytest.raises(ValueError, match=f"'{word}' is neither 'one' nor a median number of tokens"):
            parse_documents(f"one,{word}")


def test_cp_shards_make_up_the_pack_and_dp_ranks_differ_in_tokens_alone() -> None:
    level, packs = Level(64, cp_degree=2), [np.array([40, 24]), np.array([64])]
    ranks = [random_batches(packs, get_flavor("debug"), level, 5, rank) for rank in range(4)]
    wholes = [random_batches(packs, get_flavor("debug"), Level(64), 5, dp_rank) for dp_rank in range(2)]
    for dp_rank in range(2):
        for number, whole in enumerate(wholes[dp_rank]):
            shards = [ranks[2 * dp_rank + cp_rank][number] for cp_rank in range(2)]
            for name in ("input_ids", "position_ids", "labels", "loss_weights"):
                joined = torch.cat([getattr(shard, name) for shard in shards])
                assert joined.equal(getattr(whole, name)), name
            assert {shard.level for shard in shards} == {5}
    first, second = wholes[0][0], wholes[1][0]
    assert first.lengths.tolist() == second.lengths.tolist() == [40, 24]
    assert not first.input_ids.equal(second.input_ids)
    # Every token but each document's first is trained; the loss is their mean.
    assert int((first.labels != IGNORE_INDEX).sum()) == 62
    assert float(first.loss_weights.sum()) == pytest.approx(1)
    # Static shapes: one graph for each level.
    assert first.document_shares.shape == wholes[0][1].document_shares.shape
