"""Samples to packs of every level, in whole iterations (paper section 3.2, steps 1 to 3, with our choices).

Owns the decisions of method "hbp". For each level, the longest first:
1. the samples that fit no lower level are packed into as few packs as best-fit decreasing needs, rounded up to
   whole iterations (nothing is dropped: a cut after a cost sort would always drop the cheapest packs);
2. they are spread evenly over these packs by LPT where that fits, because best fit alone puts hundreds of tiny
   samples into a few packs and leaves a remainder;
3. the free room is filled from the levels below, largest sample first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hbp_titan.packing.arrays import IntArray, Ragged, Stream, grouped, round_up, shuffled
from hbp_titan.packing.histogram import PackOf, best_fit_decreasing, fill, first_fit_fill, longest_processing_time
from hbp_titan.packing.level import Level

# Share of the tokens, in the shortest samples, that tops packs up to the same token count.
TAIL_SHARE = 0.1
# How far above the mean that token count lies, so that best fit finds room for all.
TAIL_SLACK = 2e-4
# Share of extra packs that an even spread is worth.
EXTRA_PACKS = 3e-4


def hierarchical_packs(lengths: IntArray, order: IntArray, levels: Sequence[Level], world_size: int) -> list[Ragged]:
    """Packs of every level; their number is a multiple of the level's dp degree, 0 for a level without samples.

    lengths: int64 [num_samples]; order: sample ids by descending length, int64 [num_samples]. Each sample lies in
    exactly one pack, and in a level above its own only where the own samples of that level left room.
    """
    remaining = order
    packs: list[Ragged] = []
    for i in reversed(range(len(levels))):
        lower_max = levels[i - 1].max_tokens if i else 0
        remaining_lengths = lengths[remaining]
        num_own = int(np.searchsorted(-remaining_lengths, -lower_max, side="left"))
        own, lower = remaining[:num_own], remaining[num_own:]
        capacity = levels[i].max_tokens
        pack_of, num_packs = spread(remaining_lengths[:num_own], capacity, levels[i].dp_degree(world_size))
        loads = np.bincount(pack_of, weights=remaining_lengths[:num_own], minlength=num_packs).astype(np.int64)
        moved, moved_to = fill(capacity - loads, remaining_lengths[num_own:])
        members = np.concatenate([own, lower[moved]])
        packs.append(grouped(np.concatenate([pack_of, moved_to]), num_packs, members))
        stays = np.ones(len(lower), bool)
        stays[moved] = False
        remaining = lower[stays]
    return packs[::-1]


def paper_packs(
    lengths: IntArray, levels: Sequence[Level], pack: Callable[[IntArray, int], Ragged], stream: Stream
) -> list[Ragged]:
    """Packs of every level as the paper prints them: GroupData, `pack` in each level, then GreedyFill.

    The largest level is packed and filled first. GreedyFill goes through its packs, for each through the lower
    levels from i - 1 down to 1, and takes every sample that fits at its turn; what remains is packed a level below.
    """
    remaining = shuffled(len(lengths), *stream)
    packs: list[Ragged] = []
    for i in reversed(range(len(levels))):
        lower_max = levels[i - 1].max_tokens if i else 0
        is_own = lengths[remaining] > lower_max
        own, lower = remaining[is_own], remaining[~is_own]
        own_packs = pack(lengths[own], levels[i].max_tokens)
        # By descending level; a stable sort keeps the shuffled order within a level.
        level_of_lower = np.searchsorted([level.max_tokens for level in levels], lengths[lower])
        lower = lower[np.argsort(-level_of_lower, kind="stable")]
        taken, taken_by = first_fit_fill(levels[i].max_tokens - own_packs.sums(lengths[own]), lengths[lower])
        pack_of = np.repeat(np.arange(own_packs.num_rows, dtype=np.int32), own_packs.counts)
        members = np.concatenate([own[own_packs.ids], lower[taken]])
        packs.append(grouped(np.concatenate([pack_of, taken_by]), own_packs.num_rows, members))
        remaining = np.delete(lower, taken)
    return packs[::-1]


def spread(lengths: IntArray, capacity: int, multiple: int) -> tuple[PackOf, int]:
    """Pack samples evenly into as few packs as best-fit decreasing needs, rounded up to `multiple`.

    lengths: int64 [n], descending, none above capacity. Returns the pack of each sample [n] and the number of packs.
    """
    pack_of, fewest = best_fit_decreasing(lengths, capacity)
    num_packs = round_up(fewest, multiple)
    attempts = [num_packs]
    more = round_up(num_packs + 1 + int(EXTRA_PACKS * num_packs), multiple)
    if more <= num_packs * (1 + 4 * EXTRA_PACKS):
        attempts.append(more)
    for attempt in attempts:
        even = _spread_over(lengths, capacity, attempt)
        if even is not None:
            return even, attempt
    return pack_of, num_packs


def _spread_over(lengths: IntArray, capacity: int, num_packs: int) -> PackOf | None:
    """The pack of each sample in an even spread over `num_packs` packs, or None where none of three ways fits.

    LPT for the longest samples and best fit for the tail up to the mean token count makes most packs equal to
    the token, so that the cost sort has only attention to sort. LPT alone stands back where samples are too
    coarse for that, best fit of the tail up to the capacity where LPT overflows.
    """
    if not len(lengths):
        return np.zeros(0, np.int32)
    target = min(capacity, math.ceil(int(lengths.sum()) / num_packs * (1 + TAIL_SLACK)))
    pack_of = _topped_up(lengths, target, num_packs)
    if pack_of is None:
        lpt = longest_processing_time(lengths, num_packs, capacity)
        pack_of = _topped_up(lengths, capacity, num_packs) if lpt is None else lpt
    return pack_of


def _topped_up(lengths: IntArray, target: int, num_packs: int) -> PackOf | None:
    """LPT for all but the shortest samples, then best fit of these up to `target` tokens a pack."""
    tokens = np.cumsum(lengths)
    num_head = int(np.searchsorted(tokens, (1 - TAIL_SHARE) * tokens[-1]))
    head = longest_processing_time(lengths[:num_head], num_packs, target)
    if head is None or lengths[num_head] > target:
        return None
    loads = np.bincount(head, weights=lengths[:num_head], minlength=num_packs).astype(np.int64)
    tail, needed = best_fit_decreasing(lengths[num_head:], target, target - loads)
    return np.concatenate([head, tail]) if needed == num_packs else None
