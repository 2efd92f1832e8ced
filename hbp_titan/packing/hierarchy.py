"""Samples to packs of every level, in whole iterations (paper section 3.2, steps 1 to 3, with our choices).

Owns the decisions of method "hbp". For each level, the longest first:
1. the samples that fit no lower level are packed into as few packs as best-fit decreasing needs, rounded up to
   whole iterations (nothing is dropped: a cut after a cost sort would always drop the cheapest packs);
2. they are spread evenly over these packs by LPT where that fits, because best fit alone puts hundreds of tiny
   samples into a few packs and leaves a remainder;
3. the free room is filled from the levels below, largest sample first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hbp_titan.packing.arrays import IntArray, Ragged, Stream, grouped, round_up, shuffled
from hbp_titan.packing.histogram import best_fit_decreasing, fill, first_fit_fill, longest_processing_time
from hbp_titan.packing.level import Level

# Share of tokens that finish packs by best fit where plain LPT finds no room, and the share of extra packs that is
# worth an even spread.
TAIL_SHARE = 0.05
EXTRA_PACKS = 3e-4


def hierarchical_packs(lengths: IntArray, order: IntArray, levels: Sequence[Level], world_size: int) -> list[Ragged]:
    """Ragged of every level; their number is a multiple of the level's dp degree, 0 for a level without samples.

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
        pack_of = np.repeat(np.arange(own_packs.num_rows), own_packs.counts)
        members = np.concatenate([own[own_packs.ids], lower[taken]])
        packs.append(grouped(np.concatenate([pack_of, taken_by]), own_packs.num_rows, members))
        remaining = np.delete(lower, taken)
    return packs[::-1]


def spread(lengths: IntArray, capacity: int, multiple: int) -> tuple[IntArray, int]:
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


def _spread_over(lengths: IntArray, capacity: int, num_packs: int) -> IntArray | None:
    """LPT into `num_packs` packs; where it overflows, LPT for the longest samples and best fit for the tail."""
    pack_of = longest_processing_time(lengths, num_packs, capacity)
    if pack_of is not None:
        return pack_of.astype(np.int64)
    tokens = np.cumsum(lengths)
    num_head = int(np.searchsorted(tokens, (1 - TAIL_SHARE) * tokens[-1]))
    head = longest_processing_time(lengths[:num_head], num_packs, capacity)
    if head is None:
        return None
    loads = np.bincount(head, weights=lengths[:num_head], minlength=num_packs).astype(np.int64)
    tail, needed = best_fit_decreasing(lengths[num_head:], capacity, capacity - loads)
    return np.concatenate([head.astype(np.int64), tail]) if needed == num_packs else None
