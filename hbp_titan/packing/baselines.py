"""Packers for one packing length: the baselines of every comparison.

Owns the registry PACKERS of flat packers, which the paper and its peers compare: each takes lengths and a capacity and
returns packs. Method "hbp" is not one of them: it decides over levels (hbp.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.hbp import best_fit_decreasing, pack_evenly, shortest_pack_first
from hbp_titan.packing.ragged import IntArray, Ragged, Stream, concatenated, grouped, longest_first, shuffled

# OmniBal's defaults: a pack of 4050 of 4096 tokens is full enough; ten rounds.
ISF_THRESHOLD = 4050 / 4096
ISF_ROUNDS = 10

# (lengths, capacity, stream) -> packs of positions in `lengths` (int64 [n], none above capacity), each in one pack.
PackFunction = Callable[[IntArray, int, Stream], Ragged]
# (lengths, stream) -> the order in which samples are placed.
Order = Callable[[IntArray, Stream], IntArray]
# (lengths in that order, capacity) -> the pack of each sample and the number of packs.
Placement = Callable[[IntArray, int], tuple[NDArray[np.integer], int]]


class Packer(NamedTuple):
    pack: PackFunction
    source: str


def isf(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    """Keep the packs that are full enough, then shuffle and pack the rest again (iterative sampling and filtering)."""
    pool = np.arange(len(lengths))
    kept = []
    for attempt in range(ISF_ROUNDS):
        order = pool[shuffled(len(pool), *stream, attempt)]
        packs = grouped(*next_fit(lengths[order], capacity), order)
        full = packs.sums(lengths) >= ISF_THRESHOLD * capacity
        if attempt == ISF_ROUNDS - 1:
            full[:] = True
        kept.append(packs.take(np.flatnonzero(full)))
        pool = packs.take(np.flatnonzero(~full)).ids
    return concatenated(kept)


def next_fit(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Fill a pack in the given order until a sample does not fit, then start the next pack. O(n log n)."""
    running = np.cumsum(lengths)
    # If a pack starts at j, the next one starts at following[j].
    following = np.searchsorted(running, running - lengths + capacity, side="right").tolist()
    starts, at = [], 0
    while at < len(lengths):
        starts.append(at)
        at = following[at]
    return np.repeat(np.arange(len(starts)), np.diff([*starts, len(lengths)])), len(starts)


def first_fit(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Put each sample into the first pack that holds it. O(n log packs)."""
    # A tree that holds the largest free space below each node finds that pack.
    # First-fit never has two packs that are both at most half full.
    max_packs = min(len(lengths), 2 * int(lengths.sum()) // capacity + 1)
    leaves = 1 << max(0, max_packs - 1).bit_length()
    tree = [capacity] * (2 * leaves)
    pack_of = []
    num_packs = 0
    for length in lengths.tolist():
        node = 1
        while node < leaves:
            node *= 2
            # The left child if it holds the sample, otherwise the right one.
            node += tree[node] < length
        pack_of.append(node - leaves)
        num_packs = max(num_packs, node - leaves + 1)
        tree[node] -= length
        while node > 1:
            node //= 2
            largest = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == largest:
                break
            tree[node] = largest
    return np.array(pack_of, np.int64), num_packs


def best_fit(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Put each sample, in the given order, into the fullest pack that holds it. O(n log packs)."""
    packs_with: dict[int, list[int]] = {}  # free tokens -> packs
    free_sizes: list[int] = []  # the keys, ascending
    pack_of = []
    num_packs = 0
    for length in lengths.tolist():
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            free, pack = capacity, num_packs
            num_packs += 1
        else:
            free = free_sizes[at]
            pack = packs_with[free].pop()
            if not packs_with[free]:
                del packs_with[free], free_sizes[at]
        pack_of.append(pack)
        if free - length not in packs_with:
            packs_with[free - length] = []
            insort(free_sizes, free - length)
        packs_with[free - length].append(pack)
    return np.array(pack_of, np.int64), num_packs


def _packer(order: Order, place: Placement, source: str) -> Packer:
    def pack(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
        ids = order(lengths, stream)
        return grouped(*place(lengths[ids], capacity), ids)

    return Packer(pack, source)


def _data_order(lengths: IntArray, stream: Stream) -> IntArray:
    return np.arange(len(lengths))


def _random_order(lengths: IntArray, stream: Stream) -> IntArray:
    return shuffled(len(lengths), *stream)


def _shortest_first(lengths: IntArray, stream: Stream) -> IntArray:
    return longest_first(lengths, stream)[::-1]


def _one_each(lengths: IntArray, capacity: int) -> tuple[IntArray, int]:
    return np.arange(len(lengths)), len(lengths)


PACKERS: dict[str, Packer] = {
    "nopack": _packer(_random_order, _one_each, "one sample per pack, shuffled"),
    "random": _packer(_random_order, next_fit, "next-fit of a shuffled order"),
    "next_fit": _packer(_data_order, next_fit, "next-fit in the order of the data"),
    "isf": Packer(isf, "OmniBal, arXiv 2407.20761: the paper's baseline"),
    "ffs": _packer(_random_order, first_fit, "first-fit, shuffled; Johnson 1974"),
    "ffd": _packer(longest_first, first_fit, "first-fit decreasing; Johnson 1974"),
    "bfs": _packer(_random_order, best_fit, "best-fit, shuffled; Johnson 1974"),
    "bfd": _packer(longest_first, best_fit_decreasing, "best-fit decreasing over the histogram"),
    "lpt": _packer(longest_first, pack_evenly, "Graham 1969: emptiest of as many packs as bfd needs"),
    "spfhp": _packer(longest_first, shortest_pack_first, "shortest-pack-first histogram packing, arXiv 2107.02027"),
    "sorted": _packer(_shortest_first, next_fit, "LongAlign sorted batching, arXiv 2401.18058, without padding"),
}
