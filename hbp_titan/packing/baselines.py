"""Packers for one packing length, behind one registry: the baselines of every comparison.

Owns the flat packers that the paper and its peers compare: each takes lengths and a capacity and returns packs.
Method "hbp" is not here: it decides over levels (hierarchy.py). m is the number of packs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hbp_titan.packing.hbp import best_fit_decreasing, shortest_pack_first, spread
from hbp_titan.packing.ragged import IntArray, Ragged, Stream, concatenated, grouped, longest_first, shuffled

# OmniBal's defaults: a pack of 4050 of 4096 tokens is full enough, ten rounds.
ISF_THRESHOLD = 4050 / 4096
ISF_ROUNDS = 10

PackFunction = Callable[[IntArray, int, Stream], Ragged]


@dataclass(frozen=True)
class Packer:
    """A packer and what is known about it.

    pack(lengths, capacity, stream) -> packs of positions in `lengths`: lengths int64 [n], none above `capacity`;
    `stream` names the random numbers. Every position lies in exactly one pack.
    """

    pack: PackFunction
    complexity: str
    source: str


def pack_in_order(lengths: IntArray, order: IntArray, capacity: int) -> Ragged:
    """Next-fit: fill a pack in the given order until a sample does not fit, then start the next one."""
    running = np.cumsum(lengths[order])
    # If a pack starts at j, the next one starts at following[j].
    following = np.searchsorted(running, running - lengths[order] + capacity, side="right").tolist()
    starts, at = [], 0
    while at < len(order):
        starts.append(at)
        at = following[at]
    return Ragged(order, np.array([*starts, len(order)], np.int64))


def next_fit(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    return pack_in_order(lengths, np.arange(len(lengths)), capacity)


def random(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    return pack_in_order(lengths, shuffled(len(lengths), *stream), capacity)


def isf(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    """Iterative sampling and filtering: keep the packs that came out full enough, shuffle and pack the rest again."""
    pool = np.arange(len(lengths))
    kept = []
    for attempt in range(ISF_ROUNDS):
        order = pool[shuffled(len(pool), *stream, attempt)]
        packs = pack_in_order(lengths, order, capacity)
        full = packs.sums(lengths) >= ISF_THRESHOLD * capacity
        if attempt == ISF_ROUNDS - 1:
            full[:] = True
        kept.append(packs.take(np.flatnonzero(full)))
        pool = packs.take(np.flatnonzero(~full)).ids
    return concatenated(kept)


def sorted_by_length(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    """Samples of like length share a pack, and like packs run side by side."""
    return pack_in_order(lengths, longest_first(lengths, *stream)[::-1], capacity)


def one_per_pack(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    order = shuffled(len(lengths), *stream)
    return Ragged(order, np.arange(len(order) + 1))


def first_fit_shuffled(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    return _first_fit(lengths, shuffled(len(lengths), *stream), capacity)


def first_fit_decreasing(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    return _first_fit(lengths, longest_first(lengths, *stream), capacity)


def best_fit_shuffled(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    """Each sample into the fullest pack that holds it, in random order."""
    order = shuffled(len(lengths), *stream)
    groups: dict[int, list[int]] = {}
    rooms: list[int] = []
    pack_of = []
    num_packs = 0
    for length in lengths[order].tolist():
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, pack = capacity, num_packs
            num_packs += 1
        else:
            room = rooms[at]
            pack = groups[room].pop()
            if not groups[room]:
                del groups[room], rooms[at]
        pack_of.append(pack)
        if room - length not in groups:
            groups[room - length] = []
            insort(rooms, room - length)
        groups[room - length].append(pack)
    return grouped(np.array(pack_of, np.int64), num_packs, order)


def best_fit_longest_first(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    order = longest_first(lengths, *stream)
    return grouped(*best_fit_decreasing(lengths[order], capacity), order)


def lpt(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    order = longest_first(lengths, *stream)
    return grouped(*spread(lengths[order], capacity, 1), order)


def spfhp(lengths: IntArray, capacity: int, stream: Stream) -> Ragged:
    order = longest_first(lengths, *stream)
    return grouped(*shortest_pack_first(lengths[order], capacity), order)


PACKERS: dict[str, Packer] = {
    "nopack": Packer(one_per_pack, "O(n)", "one sample a pack, shuffled"),
    "random": Packer(random, "O(n log n)", "next-fit of a shuffled order"),
    "next_fit": Packer(next_fit, "O(n log n)", "next-fit in the order of the data"),
    "isf": Packer(isf, "O(rounds * n log n)", "OmniBal, arXiv 2407.20761: the paper's baseline"),
    "ffs": Packer(first_fit_shuffled, "O(n log m)", "first-fit, shuffled; Johnson 1974"),
    "ffd": Packer(first_fit_decreasing, "O(n log m)", "first-fit decreasing; Johnson 1974"),
    "bfs": Packer(best_fit_shuffled, "O(n log m)", "best-fit, shuffled; Johnson 1974"),
    "bfd": Packer(best_fit_longest_first, "O(n + lengths * rooms)", "best-fit decreasing over the histogram"),
    "lpt": Packer(lpt, "O(n + lengths * loads)", "Graham 1969: emptiest of as many packs as bfd needs"),
    "spfhp": Packer(spfhp, "O(n + lengths * rooms)", "shortest-pack-first histogram packing, arXiv 2107.02027"),
    "sorted": Packer(sorted_by_length, "O(n log n)", "LongAlign sorted batching, arXiv 2401.18058, without padding"),
}


def _first_fit(lengths: IntArray, order: IntArray, capacity: int) -> Ragged:
    """Each sample into the first pack that holds it, found in a tree of the largest free room below each node."""
    # First-fit never has two packs that are both at most half full.
    most = min(len(order), 2 * int(lengths[order].sum()) // capacity + 1)
    leaves = 1 << max(0, most - 1).bit_length()
    tree = [capacity] * (2 * leaves)
    pack_of = []
    num_packs = 0
    for length in lengths[order].tolist():
        node = 1
        while node < leaves:
            node *= 2
            node += tree[node] < length
        pack = node - leaves
        pack_of.append(pack)
        num_packs = max(num_packs, pack + 1)
        tree[node] -= length
        while node > 1:
            node //= 2
            best = max(tree[2 * node], tree[2 * node + 1])
            if tree[node] == best:
                break
            tree[node] = best
    return grouped(np.array(pack_of, np.int64), num_packs, order)
