"""Levels: samples go up only into room that is left, and no level grows for them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hbp_titan.packing import build_plan, parse_levels
from hbp_titan.packing.baselines import pack_in_order
from hbp_titan.packing.hbp import best_fit_decreasing, paper_packs
from hbp_titan.packing.ragged import shuffled
from tests.properties import examples

LEVELS = parse_levels("10:1,40:2,100:4")


@examples(200)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=120).map(np.array), st.sampled_from([4, 8, 16]))
def test_fill_never_moves_a_sample_up_needlessly(lengths, world_size):
    plan = build_plan(lengths, LEVELS, world_size)
    own_level = np.searchsorted([level.max_tokens for level in LEVELS], lengths)
    for k, level in enumerate(LEVELS):
        own = np.sort(lengths[own_level == k])[::-1]
        samples = plan.packs.ids[np.repeat(plan.pack_levels == k, plan.packs.counts)]
        # Every sample of the level is there, or a level above had room for it.
        assert set(np.flatnonzero(own_level == k)) <= set(samples) | set(plan.packs.ids[
            np.repeat(plan.pack_levels > k, plan.packs.counts)
        ])  # fmt: skip
        dp = world_size // level.cp_degree
        if k > 0:
            # Own samples that went further up may spare packs; moved ones never cost any.
            fewest = best_fit_decreasing(own, level.max_tokens)[1]
            assert np.sum(plan.pack_levels == k) <= -(-fewest // dp) * dp
        # A sample of a lower level sits here only beside, or instead of, padding; with none below, padding stays.
        assert (own_level[samples] <= k).all()


def test_a_level_above_is_filled_until_no_lower_sample_fits():
    lengths = np.array([60, 9, 9, 9, 9, 8, 7])
    plan = build_plan(lengths, parse_levels("10:1,80:2"), world_size=2)
    top = (
        plan.packs.ids[: plan.packs.counts[0]] if plan.pack_levels[0] == 1 else plan.packs.ids[plan.packs.offsets[-2] :]
    )
    assert sorted(lengths[top].tolist()) == [9, 9, 60]  # 2 tokens are left, no sample fits


def test_the_papers_method_packs_largest_first_and_fills_in_order():
    lengths = np.array([70, 3, 20, 2, 50, 30, 4])
    order = shuffled(len(lengths), 1).tolist()
    packs = paper_packs(lengths, LEVELS[1:], lambda own, cap: pack_in_order(own, np.arange(len(own)), cap), (1,))
    expected = [[at] for at in order if lengths[at] > 40]
    pool = [at for at in order if lengths[at] <= 40]
    for pack in expected:
        for at in list(pool):
            if lengths[pack].sum() + lengths[at] <= 100:
                pack.append(at)
                pool.remove(at)
    # Two own samples that fit one pack share it when the packer puts them there: 70 and 50 do not.
    found = [packs[1].ids[a:b].tolist() for a, b in zip(packs[1].offsets[:-1], packs[1].offsets[1:], strict=True)]
    assert found == expected
    assert sorted(packs[0].ids.tolist()) == sorted(pool)
