"""The histogram placements equal their textbook forms, which place one sample at a time."""

from __future__ import annotations

import heapq

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.packing.hbp import (
    best_fit_decreasing,
    fill,
    first_fit_fill,
    longest_processing_time,
    shortest_pack_first,
)

CAPACITY = 40
descending = st.lists(st.integers(1, CAPACITY), max_size=80).map(
    lambda values: np.array(sorted(values)[::-1], np.int64)
)


def loads_of(pack_of, lengths, num_packs):
    return sorted(np.bincount(pack_of, weights=lengths, minlength=num_packs).astype(int).tolist())


@given(descending, st.lists(st.integers(0, CAPACITY), max_size=5))
def test_bfd_equals_naive_bfd_also_into_opened_packs(lengths, rooms):
    pack_of, num_packs = best_fit_decreasing(lengths, CAPACITY, np.array(rooms, np.int64))
    naive = list(rooms)
    for length in lengths.tolist():
        fitting = [room for room in naive if room >= length]
        if fitting:
            naive[naive.index(min(fitting))] -= length
        else:
            naive.append(CAPACITY - length)
    assert num_packs == len(naive)
    left = np.array([*rooms, *[CAPACITY] * (num_packs - len(rooms))]) - np.bincount(
        pack_of, weights=lengths, minlength=num_packs
    )
    assert sorted(left.astype(int).tolist()) == sorted(naive)


@given(descending, st.integers(1, 30))
def test_lpt_equals_heap_lpt_and_says_when_it_overflows(lengths, num_packs):
    pack_of = longest_processing_time(lengths, num_packs, CAPACITY)
    heap = [0] * num_packs
    for length in lengths.tolist():
        heapq.heapreplace(heap, heap[0] + length)
    if max(heap) > CAPACITY:
        assert pack_of is None
    else:
        assert pack_of is not None
        assert loads_of(pack_of, lengths, num_packs) == sorted(heap)


@given(st.lists(st.integers(0, CAPACITY), max_size=20), descending)
def test_fill_gives_the_roomiest_pack_the_largest_sample_that_fits(rooms, lengths):
    positions, packs = fill(np.array(rooms, np.int64), lengths)
    assert len(set(positions.tolist())) == len(positions)
    left = np.array(rooms, np.int64)
    np.subtract.at(left, packs, lengths[positions])

    naive, offered = list(rooms), lengths.tolist()
    while naive and any(length <= max(naive) for length in offered):
        at = naive.index(max(naive))
        length = max(length for length in offered if length <= naive[at])
        offered.remove(length)
        naive[at] -= length
    assert sorted(left.tolist()) == sorted(naive)
    assert sorted(np.delete(lengths, positions).tolist()) == sorted(offered)


@given(st.lists(st.integers(0, CAPACITY), max_size=10), st.lists(st.integers(1, CAPACITY), max_size=60))
def test_the_papers_fill_takes_in_order_what_fits(rooms, lengths):
    positions, packs = first_fit_fill(np.array(rooms, np.int64), np.array(lengths, np.int64))
    expected, free = [], dict(enumerate(lengths))
    for pack, room in enumerate(rooms):
        for position, length in list(free.items()):
            if length <= room:
                expected.append((position, pack))
                room -= free.pop(position)
    assert list(zip(positions.tolist(), packs.tolist(), strict=True)) == expected


def test_spfhp_opens_one_pack_for_each_sample_that_no_open_pack_holds():
    # 6 and 6 open a pack each; 4 and 3 fill these to 10 and 9; the first 1 fits there, the second opens a pack.
    lengths = np.array([6, 6, 4, 3, 1, 1])
    pack_of, num_packs = shortest_pack_first(lengths, 10)
    assert num_packs == 3
    assert loads_of(pack_of, lengths, 3) == [1, 10, 10]


def test_bfd_places_a_million_tiny_samples_in_full_packs():
    pack_of, num_packs = best_fit_decreasing(np.full(1_000_000, 3), 10)
    assert num_packs == 333_334
    assert np.bincount(pack_of).max() == 3
