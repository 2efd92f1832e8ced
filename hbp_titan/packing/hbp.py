"""Samples to packs of every level, in whole iterations (paper section 3.2, steps 1 to 3, with our choices).

Owns the decisions of method "hbp". For each level, the longest first:
1. the samples that fit no lower level are packed into as few packs as best-fit decreasing needs, rounded up to
   whole iterations (nothing is dropped: a cut after a cost sort would always drop the cheapest packs);
2. they are spread evenly over these packs by LPT where that fits, because best fit alone puts hundreds of tiny
   samples into a few packs and leaves a remainder;
3. the free room is filled from the levels below, largest sample first.

Three greedy placements over the histogram of lengths: best-fit decreasing, LPT and the fill of free room.

Owns the loops that make a million samples take a tenth of a second: samples of one length and packs of one load
are interchangeable, so each step of a loop moves a whole group of packs. Groups are `array("i")` of pack numbers,
whose slices are copied as memory, not as objects.
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

PackOf = NDArray[np.int32]  # the pack of each sample, in the order of the lengths given


def best_fit_decreasing(lengths: IntArray, capacity: int, opened: IntArray | None = None) -> tuple[PackOf, int]:
    """Each sample, longest first, into the fullest pack that still holds it; a new pack where none does.

    lengths: int64 [n], descending, none above capacity. opened: free room of packs that exist already, int64 [m].
    Returns the pack of each sample [n] and the number of packs, at least m. O(n) array work plus a loop over
    (distinct length, distinct free room) pairs that meet.
    """
    groups = _groups(opened) if opened is not None else {}  # free room -> packs with that room
    rooms = sorted(groups)
    num_packs = 0 if opened is None else len(opened)
    placed, repeats = array("i"), array("i")  # pack, how many samples of the current length it takes
    for length, count in _length_counts(lengths):
        while count:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                new = -(-count // (capacity // length))
                groups[capacity] = array("i", range(num_packs, num_packs + new))
                rooms.append(capacity)
                num_packs += new
            room = rooms[at]
            # A pack that took one sample is the fullest that holds the next one: it goes on until it is full.
            each = min(room // length, count)
            packs, emptied = _take(groups[room], count // each)
            if emptied:
                del groups[room], rooms[at]
            placed.extend(packs)
            repeats.extend(array("i", [each]) * len(packs))
            count -= each * len(packs)
            left = room - each * length
            if left in groups:
                groups[left].extend(packs)
            elif left:
                groups[left] = packs
                insort(rooms, left)
    return np.repeat(np.asarray(placed, np.int32), np.asarray(repeats, np.int32)), num_packs


def longest_processing_time(lengths: IntArray, num_packs: int, capacity: int) -> PackOf | None:
    """Each sample, longest first, into the emptiest of a fixed number of packs (Graham's LPT).

    lengths: int64 [n], descending. Returns the pack of each sample [n], or None when one finds no room below
    `capacity`. O(n) array work plus a loop over (distinct length, distinct load) pairs that meet.
    """
    groups: dict[int, array[int]] = {0: array("i", range(num_packs))}  # load -> packs with that load
    loads = [0]  # heap of the keys of groups
    placed = array("i")
    for length, count in _length_counts(lengths):
        while count:
            load = loads[0]
            if load + length > capacity:
                return None
            packs, emptied = _take(groups[load], count)
            if emptied:
                del groups[load]
                heapq.heappop(loads)
            placed.extend(packs)
            count -= len(packs)
            _join(groups, loads, load + length, packs)
    return np.asarray(placed, np.int32)


def shortest_pack_first(lengths: IntArray, capacity: int) -> tuple[PackOf, int]:
    """Each sample, longest first, into the emptiest open pack if that holds it (SPFHP of Krell et al. 2021).

    Samples of one length that no open pack holds open one pack each. Arguments, result and cost are those of
    best_fit_decreasing.
    """
    num_packs = 0
    groups: dict[int, array[int]] = {}  # load -> packs with that load
    loads: list[int] = []  # heap of the keys of groups
    placed = array("i")
    for length, count in _length_counts(lengths):
        while count:
            if not loads or loads[0] + length > capacity:
                groups[0] = array("i", range(num_packs, num_packs + count))
                heapq.heappush(loads, 0)
                num_packs += count
            load = loads[0]
            packs, emptied = _take(groups[load], count)
            if emptied:
                del groups[load]
                heapq.heappop(loads)
            placed.extend(packs)
            count -= len(packs)
            _join(groups, loads, load + length, packs)
    return np.asarray(placed, np.int32), num_packs


def fill(rooms: IntArray, lengths: IntArray) -> tuple[IntArray, PackOf]:
    """Samples into the free room of packs: always the roomiest pack, and the largest sample that fits into it.

    rooms: int64 [num_packs], free tokens of each pack; lengths: int64 [n], descending, the samples on offer.
    Returns the positions in `lengths` of the samples that were placed and the pack of each, both [num_placed].
    The roomiest pack first keeps the packs even where the samples run out before the room does.
    """
    available = dict(_length_counts(lengths))
    ascending = sorted(available)
    groups = _groups(rooms)
    heap = [-room for room in groups]
    heapq.heapify(heap)
    placed, placed_length = array("i"), array("q")
    while heap and ascending and -heap[0] >= ascending[0]:
        room = -heap[0]
        length = ascending[bisect_right(ascending, room) - 1]
        packs, emptied = _take(groups[room], available[length])
        if emptied:
            del groups[room]
            heapq.heappop(heap)
        placed.extend(packs)
        placed_length.extend(array("q", [length]) * len(packs))
        available[length] -= len(packs)
        if not available[length]:
            ascending.remove(length)
        _join(groups, heap, room - length, packs, sign=-1)
    return _positions(lengths, np.asarray(placed_length, np.int64)), np.asarray(placed, np.int32)


def first_fit_fill(rooms: IntArray, lengths: IntArray) -> tuple[IntArray, PackOf]:
    """GreedyFill as the paper prints it: pack after pack takes each sample, in the given order, that fits.

    rooms: int64 [num_packs]; lengths: int64 [n] in any order. Returns what fill returns. O(n + (num_packs + moves)
    * sqrt(n)): the minimum of each block of lengths says which blocks a pack can skip.
    """
    block = max(1, int(len(lengths) ** 0.5))
    never = np.iinfo(np.int64).max
    left = np.full((-(-len(lengths) // block), block), never)
    left.flat[: len(lengths)] = lengths
    shortest = left.min(axis=1)
    positions, packs = array("q"), array("i")
    for pack, room in enumerate(rooms.tolist()):
        row, column = 0, 0
        while row < len(left):
            fits = left[row, column:] <= room
            if fits.any():
                column += int(fits.argmax())
                positions.append(row * block + column)
                packs.append(pack)
                room -= int(left[row, column])
                left[row, column] = never
                shortest[row] = left[row].min()
                continue
            later = shortest[row + 1 :] <= room
            if not later.any():
                break
            row, column = row + 1 + int(later.argmax()), 0
    return np.asarray(positions, np.int64), np.asarray(packs, np.int32)


def _length_counts(lengths: IntArray) -> list[tuple[int, int]]:
    distinct, counts = runs(lengths)
    return list(zip(distinct.tolist(), counts.tolist(), strict=True))


def _groups(keys: IntArray) -> dict[int, array[int]]:
    """Positions of `keys` by their key."""
    order = stable_argsort(keys)
    distinct, counts = runs(keys[order])
    starts = offsets_of(counts).tolist()
    positions = array("i", order.astype(np.int32).tobytes())
    return {key: positions[a:b] for key, a, b in zip(distinct.tolist(), starts, starts[1:], strict=False)}


def _take(group: array[int], count: int) -> tuple[array[int], bool]:
    """The last `count` packs of a group, and whether nothing is left of it."""
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
    """Positions in descending `lengths` that satisfy the requests `taken` [m], each position used once."""
    # The j-th request for a length gets the j-th sample of that length.
    first = np.searchsorted(-lengths, -taken, side="left")
    order = stable_argsort(first)
    _, counts = runs(first[order])
    rank = np.arange(len(taken)) - np.repeat(offsets_of(counts)[:-1], counts)
    positions = np.empty(len(taken), np.int64)
    positions[order] = first[order] + rank
    return positions


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
