"""Head-tail shards: the cut by literals, its properties for any documents, and how even the causal work is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.data.sequence_shard import chunk_bounds, head_tail_shard
from tests.properties import examples


def boundaries(lengths: list[int], empty: int = 0) -> np.ndarray:
    return np.array([0, *np.cumsum(lengths), *[sum(lengths)] * empty], dtype=np.int32)


def causal_pairs(cu_seqlens: np.ndarray, degree: int) -> np.ndarray:
    """(query, key) pairs that each rank computes: a token sees itself and what lies before it in its document."""
    seen = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)) + 1
    return np.array([seen[head_tail_shard(cu_seqlens, rank, degree)[0]].sum() for rank in range(degree)])


def test_each_rank_holds_a_head_and_a_tail_of_each_document() -> None:
    # 9 tokens: chunks of 3, 2, 2, 2; 7 tokens: the spare ones go on at the second chunk: 1, 2, 2, 2; no third document.
    cu_seqlens = boundaries([9, 7], empty=1)
    assert chunk_bounds(cu_seqlens, 2).tolist() == [[0, 3, 5, 7, 9], [9, 10, 12, 14, 16], [16] * 5]
    first, second = (head_tail_shard(cu_seqlens, rank, 2) for rank in (0, 1))
    assert first[0].tolist() == [0, 1, 2, 9, 7, 8, 14, 15]
    assert second[0].tolist() == [3, 4, 10, 11, 5, 6, 12, 13]
    # The two shards end to end are tokens 0 1 2 9 7 8 14 15 3 4 10 11 5 6 12 13: token 3 is the ninth, at 8.
    order = [0, 1, 2, 8, 9, 12, 13, 4, 5, 3, 10, 11, 14, 15, 6, 7]
    assert first[1].kv_order.tolist() == second[1].kv_order.tolist() == order


def test_segments_are_a_chunk_with_its_keys_and_the_rest_of_the_document() -> None:
    shard = head_tail_shard(boundaries([9, 7], empty=1), 0, 2)[1]
    assert shard.head_q.tolist() == [0, 3, 3, 4, 4, 4, 4]
    assert shard.head_k.tolist() == [0, 3, 9, 10, 16, 16, 16]
    assert shard.tail_q.tolist() == [0, 2, 2, 4, 4, 4, 4]
    assert shard.tail_k.tolist() == [0, 9, 9, 16, 16, 16, 16]


def test_single_tokens_go_round_the_ranks() -> None:
    shards = [head_tail_shard(boundaries([1] * 8), rank, 2)[0].tolist() for rank in (0, 1)]
    assert shards == [[0, 4, 3, 7], [1, 5, 2, 6]]


def test_causal_pairs_of_one_even_document_are_equal() -> None:
    # Chunks of two tokens that see 1+2, 3+4, 5+6, 7+8 tokens: rank 0 has the first and the last.
    assert causal_pairs(boundaries([8]), 2).tolist() == [3 + 15, 7 + 11]
    assert causal_pairs(boundaries([4, 12]), 2).tolist() == [1 + 4 + 6 + 33, 2 + 3 + 15 + 24]


@st.composite
def packs(draw: st.DrawFn) -> tuple[list[int], int]:
    """Document lengths that a number of ranks divides together, with zeros, ones and long ones among them."""
    degree = draw(st.integers(2, 8))
    lengths = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=12))
    return [*lengths, -sum(lengths) % degree + degree], degree


@examples(200)
@given(packs())
def test_shards_are_equal_parts_whose_queries_see_exactly_their_past(pack: tuple[list[int], int]) -> None:
    lengths, degree = pack
    cu_seqlens = boundaries(lengths)
    total = sum(lengths)
    start = np.repeat(cu_seqlens[:-1], lengths)
    shards = [head_tail_shard(cu_seqlens, rank, degree) for rank in range(degree)]
    gathered = np.concatenate([tokens for tokens, _ in shards])
    assert gathered[shards[0][1].kv_order.numpy()].tolist() == list(range(total))
    heads = (total // degree + 1) // 2
    for tokens, shard in shards:
        assert len(tokens) == total // degree
        halves = ((tokens[:heads], shard.head_q, shard.head_k), (tokens[heads:], shard.tail_q, shard.tail_k))
        for queries, cu_q, cu_k in halves:
            assert len(cu_q) == len(cu_k) == 2 * len(lengths) + 1
            assert (cu_q[-1], cu_k[-1]) == (len(queries), total)
            assert cu_q.diff().max() <= heads
            for i in range(2 * len(lengths)):
                mine = queries[cu_q[i] : cu_q[i + 1]]
                if len(mine):
                    # Bottom-right: the queries are the last keys; the keys begin where their document does.
                    assert mine.tolist() == list(range(int(cu_k[i + 1]) - len(mine), int(cu_k[i + 1])))
                    assert set(start[mine].tolist()) == {int(cu_k[i])}


@examples(200)
@given(packs())
def test_largest_rank_exceeds_the_mean_by_less_than_two_pairs_a_token(pack: tuple[list[int], int]) -> None:
    lengths, degree = pack
    pairs = causal_pairs(boundaries(lengths), degree)
    assert pairs.max() - pairs.mean() < 2 * sum(lengths)


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 16])
def test_bound_holds_for_each_document_wherever_the_dealing_stands(degree: int) -> None:
    # The spare tokens of a document start at any of the 2C chunks: a first document of so many tokens sets it.
    for length in [*range(1, 6 * degree), 1000, 4097]:
        for first in range(2 * degree):
            bounds = chunk_bounds(boundaries([first, length]), degree)[1] - first
            pairs = np.diff(bounds * (bounds + 1) // 2)
            by_rank = pairs[:degree] + pairs[: degree - 1 : -1]
            assert by_rank.max() - by_rank.mean() < 2 * length


@pytest.mark.parametrize(
    ("median", "degree", "excess"), [(80, 8, 0.01), (400, 8, 0.001), (8000, 8, 0.0001), (8000, 64, 0.002)]
)
def test_work_is_even_for_mixed_documents_of_a_long_pack(median: int, degree: int, excess: float) -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(np.log(median), 1.2, size=20000).astype(int) + 1, 131072)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), 131072)]
    pairs = causal_pairs(boundaries([*lengths.tolist(), 131072 - int(lengths.sum())]), degree)
    assert pairs.max() / pairs.mean() - 1 < excess
