"""Samples to packs of every level (paper section 3.2, steps 1 to 3): the decisions of methods "hbp" and "hbp_paper".

"hbp", for each level, the largest first:
1. pack the samples that fit no lower level into as few packs as best-fit decreasing needs, rounded up to whole
   iterations (nothing is dropped: a cut after a cost sort would always drop the cheapest packs);
2. balance these packs by LPT if that fits, because best fit alone puts hundreds of tiny samples into a few packs;
3. fill the free space from the levels below, largest sample first.

The placement loops work on the histogram of lengths, which makes a million samples take a tenth of a second: samples
of one length and packs of one load are interchangeable, so each step of a loop moves a whole group of packs.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.level import Level
from hbp_titan.packing.ragged import (
    IntArray,
    Ragged,
    Stream,
    grouped,
    offsets_of,
    round_up,
    runs,
    shuffled,
    stable_argsort,
)

# Share of the tokens, in the shortest samples, that fills packs up to the same token count.
TAIL_SHARE = 0.1
# How far that token count lies above the mean, so that best fit finds space for all of them.
TAIL_SLACK = 2e-4
# Share of extra packs that an even distribution is worth.
EXTRA_PACKS = 3e-4

PackOf = NDArray[np.int32]  # the pack of each sample, in the order of the given lengths


def hierarchical_packs(lengths: IntArray, order: IntArray, levels: Sequence[Level], world_size: int) -> list[Ragged]:
    """Return the packs of every level; their number is a multiple of the level's dp degree, perhaps 0.

    lengths: int64 [num_samples]; order: sample ids by descending length, int64 [num_samples]. Each sample is in exactly
    one pack, and in a level above its own only in space that the samples of that level left free.
    """
    remaining = order
    packs: list[Ragged] = []
    for i in reversed(range(len(levels))):
        lower_max = levels[i - 1].max_tokens if i else 0
        remaining_lengths = lengths[remaining]
        num_own = int(np.searchsorted(-remaining_lengths, -lower_max, side="left"))
        own, lower = remaining[:num_own], remaining[num_own:]
        capacity = levels[i].max_tokens
        pack_of, num_packs = pack_evenly(remaining_lengths[:num_own], capacity, levels[i].dp_degree(world_size))
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
    """Return the packs of every level as the paper prints them: GroupData, `pack` in each level, then GreedyFill.

    The largest level is packed and filled first. GreedyFill visits its packs in order and, for each, the lower levels
    from i - 1 down to 1, and takes every sample that still fits; the rest is packed one level below.
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


def pack_evenly(lengths: IntArray, capacity: int, multiple: int = 1) -> tuple[PackOf, int]:
    """Pack samples evenly into as few packs as best-fit decreasing needs, rounded up to `multiple`.

    lengths: int64 [n], descending, none above capacity. Returns the pack of each sample [n] and the number of packs.
    """
    pack_of, fewest = best_fit_decreasing(lengths, capacity)
    num_packs = round_up(fewest, multiple)
    attempts = [num_packs]
    more = round_up(num_packs + 1 + int(EXTRA_PACKS * num_packs), multiple)
    # Rounding to whole iterations can make one more attempt too expensive for small data.
    if more <= num_packs * (1 + 4 * EXTRA_PACKS):
        attempts.append(more)
    for attempt in attempts:
        even = spread_over(lengths, capacity, attempt)
        if even is not None:
            return even, attempt
    return pack_of, num_packs


def spread_over(lengths: IntArray, capacity: int, num_packs: int) -> PackOf | None:
    """Return the pack of each sample in an even distribution over `num_packs` packs, None if none of three ways fits.

    LPT for the longest samples and best fit for the tail up to the mean token count makes most packs equal to the
    token, so that only attention differs between them. LPT alone is the fallback if samples are too coarse for that,
    best fit of the tail up to the capacity if LPT overflows.
    """
    if not len(lengths):
        return np.zeros(0, np.int32)
    target = min(capacity, math.ceil(int(lengths.sum()) / num_packs * (1 + TAIL_SLACK)))
    pack_of = _lpt_with_tail(lengths, target, num_packs)
    if pack_of is None:
        pack_of = longest_processing_time(lengths, num_packs, capacity)
    return _lpt_with_tail(lengths, capacity, num_packs) if pack_of is None else pack_of


def _lpt_with_tail(lengths: IntArray, target: int, num_packs: int) -> PackOf | None:
    """Place all but the shortest samples by LPT, then these by best fit up to `target` tokens per pack."""
    tokens = np.cumsum(lengths)
    num_head = int(np.searchsorted(tokens, (1 - TAIL_SHARE) * tokens[-1]))
    head = longest_processing_time(lengths[:num_head], num_packs, target)
    if head is None or lengths[num_head] > target:
        return None
    loads = np.bincount(head, weights=lengths[:num_head], minlength=num_packs).astype(np.int64)
    tail, needed = best_fit_decreasing(lengths[num_head:], target, target - loads)
    return np.concatenate([head, tail]) if needed == num_packs else None


def best_fit_decreasing(lengths: IntArray, capacity: int, opened: IntArray | None = None) -> tuple[PackOf, int]:
    """Put each sample, longest first, into the fullest pack that still holds it, or into a new pack.

    lengths: int64 [n], descending, none above capacity. opened: free tokens of packs that already exist, int64 [m].
    Returns the pack of each sample [n] and the number of packs, at least m. O(n) array work plus a loop over the
    (distinct length, distinct free size) pairs that occur.
    """
    groups = _group_by_key(opened) if opened is not None else {}  # free tokens -> packs
    free_sizes = sorted(groups)
    num_packs = 0 if opened is None else len(opened)
    placed, repeats = array("i"), array("i")  # a pack, and how many samples of the current length it takes
    for length, count in _length_counts(lengths):
        while count:
            at = bisect_left(free_sizes, length)
            if at == len(free_sizes):
                new = -(-count // (capacity // length))
                groups[capacity] = array("i", range(num_packs, num_packs + new))
                free_sizes.append(capacity)
                num_packs += new
            free = free_sizes[at]
            # A pack that took one sample is the fullest that holds the next, so it takes them until it is full.
            each = min(free // length, count)
            packs, emptied = _split_off(groups[free], count // each)
            if emptied:
                del groups[free], free_sizes[at]
            placed.extend(packs)
            repeats.extend(array("i", [each]) * len(packs))
            count -= each * len(packs)
            left = free - each * length
            if left in groups:
                groups[left].extend(packs)
            elif left:
                groups[left] = packs
                insort(free_sizes, left)
    return np.repeat(np.asarray(placed, np.int32), np.asarray(repeats, np.int32)), num_packs


def longest_processing_time(lengths: IntArray, num_packs: int, capacity: int) -> PackOf | None:
    """Put each sample, longest first, into the emptiest of `num_packs` packs (Graham's LPT); None if one overflows.

    lengths: int64 [n], descending. Returns the pack of each sample [n].
    """
    result = _emptiest_first(lengths, capacity, num_packs, may_open=False)
    return None if result is None else result[0]


def shortest_pack_first(lengths: IntArray, capacity: int) -> tuple[PackOf, int]:
    """Put each sample, longest first, into the emptiest open pack if that holds it (SPFHP of Krell et al. 2021).

    Samples of one length that no open pack holds open one pack each. lengths: int64 [n], descending, none above
    capacity. Returns the pack of each sample [n] and the number of packs.
    """
    result = _emptiest_first(lengths, capacity, 0, may_open=True)
    assert result is not None
    return result


def _emptiest_first(lengths: IntArray, capacity: int, num_packs: int, may_open: bool) -> tuple[PackOf, int] | None:
    """Place samples into the emptiest of `num_packs` packs or, if that overflows, into new ones; None if not allowed.

    O(n) array work plus a loop over the (distinct length, distinct load) pairs that occur.
    """
    groups: dict[int, array[int]] = {0: array("i", range(num_packs))} if num_packs else {}  # load -> packs
    loads = list(groups)  # heap of the keys of groups
    placed = array("i")
    for length, count in _length_counts(lengths):
        while count:
            if not loads or loads[0] + length > capacity:
                if not may_open:
                    return None
                _join(groups, loads, 0, array("i", range(num_packs, num_packs + count)))
                num_packs += count
            load = loads[0]
            packs, emptied = _split_off(groups[load], count)
            if emptied:
                del groups[load]
                heapq.heappop(loads)
            placed.extend(packs)
            count -= len(packs)
            _join(groups, loads, load + length, packs)
    return np.asarray(placed, np.int32), num_packs


def fill(free: IntArray, lengths: IntArray) -> tuple[IntArray, PackOf]:
    """Fill packs with samples: always the emptiest pack, with the largest sample that fits into it.

    free: int64 [num_packs], free tokens of each pack; lengths: int64 [n], descending, the available samples.
    Returns the positions in `lengths` of the samples that were placed and the pack of each, both [num_placed].
    """
    # The emptiest pack first keeps the packs even if the samples run out before the free space does.
    available = dict(_length_counts(lengths))
    ascending = sorted(available)
    groups = _group_by_key(free)
    heap = [-size for size in groups]
    heapq.heapify(heap)
    placed, placed_length = array("i"), array("q")
    while heap and ascending and -heap[0] >= ascending[0]:
        size = -heap[0]
        length = ascending[bisect_right(ascending, size) - 1]
        packs, emptied = _split_off(groups[size], available[length])
        if emptied:
            del groups[size]
            heapq.heappop(heap)
        placed.extend(packs)
        placed_length.extend(array("q", [length]) * len(packs))
        available[length] -= len(packs)
        if not available[length]:
            ascending.remove(length)
        _join(groups, heap, size - length, packs, sign=-1)
    return _positions(lengths, np.asarray(placed_length, np.int64)), np.asarray(placed, np.int32)


def first_fit_fill(free: IntArray, lengths: IntArray) -> tuple[IntArray, PackOf]:
    """Fill packs as the paper's GreedyFill: each pack in turn takes every sample, in the given order, that fits.

    free: int64 [num_packs]; lengths: int64 [n] in any order. Returns what fill returns.
    O(n + (num_packs + moves) * sqrt(n)).
    """
    # The minimum of each block of lengths shows which blocks a pack can skip.
    block = max(1, int(len(lengths) ** 0.5))
    never = np.iinfo(np.int64).max
    left = np.full((-(-len(lengths) // block), block), never)
    left.flat[: len(lengths)] = lengths
    shortest = left.min(axis=1)
    positions, packs = array("q"), array("i")
    for pack, size in enumerate(free.tolist()):
        row, column = 0, 0
        while row < len(left):
            fits = left[row, column:] <= size
            if fits.any():
                column += int(fits.argmax())
                positions.append(row * block + column)
                packs.append(pack)
                size -= int(left[row, column])
                left[row, column] = never
                shortest[row] = left[row].min()
                continue
            later = shortest[row + 1 :] <= size
            if not later.any():
                break
            row, column = row + 1 + int(later.argmax()), 0
    return np.asarray(positions, np.int64), np.asarray(packs, np.int32)


def _length_counts(lengths: IntArray) -> list[tuple[int, int]]:
    distinct, counts = runs(lengths)
    return list(zip(distinct.tolist(), counts.tolist(), strict=True))


def _group_by_key(keys: IntArray) -> dict[int, array[int]]:
    """Return the positions of `keys` by their key."""
    order = stable_argsort(keys)
    distinct, counts = runs(keys[order])
    starts = offsets_of(counts).tolist()
    # array("i"): slices of pack numbers are then copied as memory, not as objects.
    positions = array("i", order.astype(np.int32).tobytes())
    return {key: positions[a:b] for key, a, b in zip(distinct.tolist(), starts, starts[1:], strict=False)}


def _split_off(group: array[int], count: int) -> tuple[array[int], bool]:
    """Return the last `count` packs of a group, and whether that empties it."""
    if count >= len(group):
        return group, True
    taken = group[-count:]
    del group[-count:]
    return taken, False


def _join(groups: dict[int, array[int]], heap: list[int], key: int, packs: array[int], sign: int = 1) -> None:
    """Add packs to the group of `key`; a new group enters the heap as sign * key."""
    if key in groups:
        groups[key].extend(packs)
    else:
        groups[key] = packs
        heapq.heappush(heap, sign * key)


def _positions(lengths: IntArray, taken: IntArray) -> IntArray:
    """Return a position in descending `lengths` for each requested length `taken` [m], each position once."""
    # The j-th request for a length gets the j-th sample of that length.
    first = np.searchsorted(-lengths, -taken, side="left")
    order = stable_argsort(first)
    _, counts = runs(first[order])
    rank = np.arange(len(taken)) - np.repeat(offsets_of(counts)[:-1], counts)
    positions = np.empty(len(taken), np.int64)
    positions[order] = first[order] + rank
    return positions
