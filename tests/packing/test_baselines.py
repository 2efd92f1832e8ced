"""Each baseline packer against a naive form of the same algorithm."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.packing import PACKERS, Level, build_plan
from hbp_titan.packing.baselines import ISF_THRESHOLD
from hbp_titan.packing.ragged import longest_first, shuffled
from hbp_titan.tuning.simulate import tulu3_longcite_like

CAPACITY = 50
lengths_strategy = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=80).map(np.array)


@given(lengths_strategy, st.sampled_from(sorted(PACKERS)))
def test_every_packer_places_each_sample_once_within_capacity(lengths, name):
    packs = PACKERS[name].pack(lengths, CAPACITY, (1, 2))
    assert sorted(packs.ids.tolist()) == list(range(len(lengths)))
    assert packs.sums(lengths).max() <= CAPACITY
    assert packs.counts.min() >= 1


def naive_first_fit(lengths, order):
    packs = []
    for at in order:
        for pack in packs:
            if lengths[pack].sum() + lengths[at] <= CAPACITY:
                pack.append(at)
                break
        else:
            packs.append([at])
    return packs


@given(lengths_strategy)
def test_first_fit_equals_naive_first_fit(lengths):
    for name, order in (("ffs", shuffled(len(lengths), 7)), ("ffd", longest_first(lengths, (7,)))):
        packs = PACKERS[name].pack(lengths, CAPACITY, (7,))
        found = [packs.ids[a:b].tolist() for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]
        assert found == naive_first_fit(lengths, order.tolist())


@given(lengths_strategy)
def test_best_fit_equals_naive_best_fit(lengths):
    packs = PACKERS["bfs"].pack(lengths, CAPACITY, (5,))
    loads: list[int] = []
    for length in lengths[shuffled(len(lengths), 5)].tolist():
        fitting = [load for load in loads if load + length <= CAPACITY]
        if fitting:
            loads[loads.index(max(fitting))] += length
        else:
            loads.append(length)
    assert sorted(packs.sums(lengths).tolist()) == sorted(loads)


def test_next_fit_starts_a_new_pack_if_a_sample_does_not_fit():
    packs = PACKERS["next_fit"].pack(np.array([30, 20, 1, 40, 20, 30]), CAPACITY, (0,))
    assert packs.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert packs.offsets.tolist() == [0, 2, 4, 6]


def test_isf_keeps_full_packs_and_repacks_the_rest():
    lengths = tulu3_longcite_like(20_000, seed=2)
    lengths = lengths[lengths <= 16384]
    tokens = PACKERS["isf"].pack(lengths, 16384, (0,)).sums(lengths)
    assert np.mean(tokens >= ISF_THRESHOLD * 16384) > 0.9
    assert PACKERS["random"].pack(lengths, 16384, (0,)).num_rows > len(tokens)


def test_sorted_batching_puts_samples_of_similar_length_into_one_iteration():
    plan = build_plan([1, 9, 1, 9, 5, 5, 1, 9, 5, 1, 9, 5], [Level(9)], world_size=2, method="sorted")
    spans = [np.ptp(plan.lengths[np.concatenate(plan.iteration(i).packs)]) for i in range(plan.num_iterations)]
    assert max(spans) <= 8
    assert np.mean(spans) < 4


def test_lpt_uses_at_most_one_pack_more_than_best_fit_and_balances_documents():
    lengths = tulu3_longcite_like(20_000, seed=1)
    lpt, bfd = (PACKERS[name].pack(lengths, 131072, (0,)) for name in ("lpt", "bfd"))
    assert lpt.num_rows <= bfd.num_rows + 1
    assert bfd.counts.max() > 1000 > 5 * lpt.counts.max() / 2
