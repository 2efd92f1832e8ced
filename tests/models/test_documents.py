"""Head-tail shards: the cut by literals, its properties for any documents, and how even the causal work is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.models.documents import chunk_bounds, head_tail_shard
from tests.properties import examples


def causal_pairs(lengths: np.ndarray, degree: int) -> np.ndarray:
    """(query, key) pairs that each rank computes: a token sees itself and what lies before it in its document."""
    seen = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    return np.array([seen[head_tail_shard(lengths, rank, degree)[0]].sum() for rank in range(degree)])


def test_each_rank_holds_a_head_and_a_tail_of_each_document() -> None:
    # 9 tokens: chunks of 3, 2, 2, 2; 7 tokens: the spare ones continue at the second chunk: 1, 2, 2, 2.
    lengths = np.array([9, 7])
    assert chunk_bounds(lengths, 2).tolist() == [[0, 3, 5, 7, 9], [9, 10, 12, 14, 16]]
    first, second = (head_tail_shard(lengths, rank, 2) for rank in (0, 1))
    assert first[0].tolist() == [0, 1, 2, 9, 7, 8, 14, 15]
    assert second[0].tolist() == [3, 4, 10, 11, 5, 6, 12, 13]


def test_a_pass_attends_to_the_keys_up_to_the_end_of_its_chunks() -> None:
    # The two shards end to end are tokens 0 1 2 9 7 8 14 15 3 4 10 11 5 6 12 13: token 3 is the ninth, in row 8.
    heads, tails = head_tail_shard(np.array([9, 7]), 0, 2)[1].passes(None)
    assert heads.documents.whole.cu_seqlens_q.tolist() == [0, 3, 4]
    assert heads.documents.whole.cu_seqlens_k.tolist() == [0, 3, 4]
    assert heads.key_rows.tolist() == [0, 1, 2, 3]
    assert tails.documents.whole.cu_seqlens_q.tolist() == [0, 2, 4]
    assert tails.documents.whole.cu_seqlens_k.tolist() == [0, 9, 16]
    assert tails.key_rows.tolist() == [0, 1, 2, 8, 9, 12, 13, 4, 5, 3, 10, 11, 14, 15, 6, 7]


def test_a_pass_of_a_window_has_only_keys_that_its_queries_attend_to() -> None:
    shard = head_tail_shard(np.array([9, 7]), 0, 2, window=3)[1]
    heads, tails = shard.passes(3)
    assert heads.key_rows.tolist() == [0, 1, 2, 3]
    # The tails 7, 8 and 14, 15 attend to tokens from 5 and from 12 on.
    assert tails.documents.whole.cu_seqlens_q.tolist() == [0, 2, 4]
    assert tails.documents.whole.cu_seqlens_k.tolist() == [0, 4, 8]
    assert tails.key_rows.tolist() == [12, 13, 4, 5, 14, 15, 6, 7]
    # Layers without a window, or with another one, get all keys.
    assert len(shard.passes(None)[1].key_rows) == len(shard.passes(4)[1].key_rows) == 16


def test_causal_pairs_of_one_even_document_are_equal() -> None:
    # Chunks of two tokens that see 1+2, 3+4, 5+6, 7+8 tokens: rank 0 has the first and the last.
    assert causal_pairs(np.array([8]), 2).tolist() == [3 + 15, 7 + 11]
    assert causal_pairs(np.array([4, 12]), 2).tolist() == [1 + 4 + 6 + 33, 2 + 3 + 15 + 24]


@st.composite
def packs(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Document lengths that a number of ranks divides together, with very short and long ones among them."""
    degree = draw(st.integers(2, 8))
    lengths = draw(st.lists(st.one_of(st.integers(1, 3), st.integers(1, 200)), min_size=1, max_size=12))
    return np.array([*lengths, -sum(lengths) % degree + degree]), degree


@examples(200)
@given(packs(), st.sampled_from([None, 1, 7, 60]))
def test_shards_are_equal_parts_whose_queries_see_exactly_their_past(
    pack: tuple[np.ndarray, int], window: int | None
) -> None:
    lengths, degree = pack
    total = int(lengths.sum())
    start = np.repeat(np.cumsum(lengths) - lengths, lengths)
    shards = [head_tail_shard(lengths, rank, degree, window) for rank in range(degree)]
    gathered = np.concatenate([tokens for tokens, _ in shards])
    assert sorted(gathered.tolist()) == list(range(total))
    heads = (total // degree + 1) // 2
    for tokens, shard in shards:
        assert len(tokens) == total // degree
        for queries, (documents, key_rows) in zip((tokens[:heads], tokens[heads:]), shard.passes(window), strict=True):
            whole, keys = documents.whole, gathered[key_rows.numpy()]
            assert (whole.num_queries, whole.num_keys) == (len(queries), len(keys))
            for i in range(len(whole.cu_seqlens_q) - 1):
                mine = queries[whole.cu_seqlens_q[i] : whole.cu_seqlens_q[i + 1]].tolist()
                seen = keys[whole.cu_seqlens_k[i] : whole.cu_seqlens_k[i + 1]].tolist()
                # The keys are the document from its start (or the first query's window) to the last query; the queries
                # are the last of them.
                assert mine == seen[-len(mine) :]
                first = start[mine[0]] if window is None else max(start[mine[0]], mine[0] + 1 - window)
                assert seen == list(range(first, mine[-1] + 1))


@pytest.mark.parametrize("degree", [2, 3, 4, 8, 16])
def test_bound_holds_for_each_document_wherever_the_dealing_stands(degree: int) -> None:
    # The spare tokens of a document start at any of the 2C chunks: a first document of so many tokens sets it.
    for length in [*range(1, 6 * degree), 1000, 4097]:
        for first in range(2 * degree):
            bounds = chunk_bounds(np.array([first, length]), degree)[1] - first
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
    pairs = causal_pairs(np.array([*lengths.tolist(), 131072 - int(lengths.sum())]), degree)
    assert pairs.max() / pairs.mean() - 1 < excess
