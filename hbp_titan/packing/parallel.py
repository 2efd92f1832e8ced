"""Iterations in which packs of several levels run side by side (level_order "parallel").

One level at a time trains a whole iteration of its length: with 512 ranks and cp_degree 8, 64 packs of 128K tokens, 8M
tokens of long documents in one step. Here groups of ranks train different levels at once, so that every iteration, and
with it every optimizer step, holds a share of all of them:

    rank         0   1   2   3   4   5   6   7
    iteration 0  [ 128K/cp4    ] [ 32K/cp2 ] 16K 16K
    iteration 1  [ 64K/cp2 ] 16K 16K 16K 16K 16K 16K

FSDP keeps all ranks in step, so they should need the same time: the *budget*, which is that of a pack of the lowest
level, whose length memory limits. A long document gets as many ranks as bring its pack down to the budget:

1. pack the documents that the lowest level cannot hold, longest first, into the fewest ranks that stay within the
   budget; a pack may hold several;
2. fill these packs with short documents, longest first, up to their tokens and to the budget;
3. pack the rest evenly at the lowest level, into as many packs as complete the last iteration;
4. spread the packs of each level evenly over the iterations, dear ones with dear ones.

A pack costs alpha * max_tokens + beta * squares of its level's cost model, divided by its ranks: padding is computed
like tokens. The costs of the levels must share a unit, and include what communication takes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hbp_titan.packing.cost import CostModel
from hbp_titan.packing.hbp import pack_evenly, spread_over
from hbp_titan.packing.level import Level
from hbp_titan.packing.ragged import IntArray, Ragged, Stream, concatenated, grouped, longest_first, offsets_of, runs

# Squares that a pack whose document alone exceeds the budget may take in addition, as a share of the document's.
OVER_BUDGET = 0.1
# Open packs that a long document is compared with, from the one that it fills best.
TRIES = 32


def mixed_iterations(
    lengths: IntArray, levels: Sequence[Level], costs: Sequence[CostModel], world_size: int, stream: Stream
) -> tuple[Ragged, IntArray, Ragged]:
    """Return packs of samples, the level of each pack, int64 [num_packs], and iterations, rows of pack indices.

    lengths: int64 [num_samples], none above the last level's max_tokens. levels: as check_levels wants them for
    side_by_side. Every sample is in exactly one pack. The cp degrees of an iteration sum to world_size and descend, so
    that each pack starts at a rank that its degree divides.
    """
    order = longest_first(lengths, stream)
    lowest = levels[0]
    num_long = int(np.searchsorted(-lengths[order], -lowest.max_tokens, side="left"))
    long, short = order[:num_long], order[num_long:]
    builder = _LongPacks(lengths, short, levels, costs)
    for sample in long.tolist():
        builder.add(sample)
    rest = short[builder.fill(short)]
    long_packs, long_levels = builder.packs()

    long_ranks = int(np.array([level.cp_degree for level in levels])[long_levels].sum())
    pack_of, fewest = pack_evenly(lengths[rest], lowest.max_tokens)
    num_iterations = max(1, -(-(long_ranks + fewest * lowest.cp_degree) // world_size))
    # The last iteration is completed by thinner packs rather than by empty ones.
    num_short = (num_iterations * world_size - long_ranks) // lowest.cp_degree
    even = spread_over(lengths[rest], lowest.max_tokens, num_short)
    short_packs = grouped(pack_of if even is None else even, num_short, rest)

    packs = concatenated([long_packs, short_packs])
    level_of = np.concatenate([long_levels, np.zeros(num_short, np.int64)])
    squares = costs[0].squares(lengths, packs)
    return packs, level_of, _assembled(rank_costs(levels, costs, level_of, squares), level_of, levels, num_iterations)


def rank_costs(
    levels: Sequence[Level], costs: Sequence[CostModel], level_of: IntArray, squares: IntArray
) -> NDArray[np.float64]:
    """Return what each rank of a pack has to compute, padding included, float64 [n]. level_of, squares: int64 [n]."""
    base, per_square = (np.array(values)[level_of] for values in _terms(levels, costs))
    return base + per_square * squares


def _terms(levels: Sequence[Level], costs: Sequence[CostModel]) -> tuple[list[float], list[float]]:
    """Return for each level the cost of its static length and of a square, of one of its ranks."""
    pairs = list(zip(levels, costs, strict=True))
    return [c.alpha * k.max_tokens / k.cp_degree for k, c in pairs], [c.beta / k.cp_degree for k, c in pairs]


class _LongPacks:
    """Packs of the levels above the lowest, each with the tokens and the squares that it can still take.

    Squares are net of `rate` * tokens, the squares that short documents would bring along: a pack whose net budget is
    used up can still be filled with average short documents.
    """

    def __init__(self, lengths: IntArray, short: IntArray, levels: Sequence[Level], costs: Sequence[CostModel]) -> None:
        self.lengths, self.levels, self.costs = lengths, levels, costs
        tokens = int(lengths[short].sum())
        # Per token of the shorter half: largest-first filling has used the longer ones by then.
        tail = short[len(short) // 2 :]
        self.rate = float(costs[0].squares(lengths[tail]).sum()) / max(1, int(lengths[tail].sum())) if tokens else 0.0
        base, per_square = _terms(levels, costs)
        budget = self._budget(short, base, per_square)
        # Largest net squares of a pack, by level. The static length of a level may exceed the budget by itself: such
        # packs are filled by their tokens alone.
        self.net = [
            (budget - b) / s - self.rate * level.max_tokens if s and b <= budget else np.inf
            for b, s, level in zip(base, per_square, levels, strict=True)
        ]
        self.fits = [b <= budget for b in base]
        # Fewest ranks first: they exchange the least. Then the largest static length, which is the easiest to fill.
        above = range(1, len(levels))
        self.preferred = sorted(above, key=lambda k: (levels[k].cp_degree, -levels[k].max_tokens))
        self.base, self.per_square = base, per_square
        self.level_of: list[int] = []
        self.free_tokens: list[int] = []
        self.members: list[list[int]] = []
        # (free net squares, pack), ascending.
        self.open: list[tuple[float, int]] = []

    def _budget(self, short: IntArray, base: list[float], per_square: list[float]) -> float:
        """Return the median cost of a rank at the lowest level; without short samples the least that all fit into."""
        if len(short):
            pack_of, num_packs = pack_evenly(self.lengths[short], self.levels[0].max_tokens)
            squares = self.costs[0].squares(self.lengths, grouped(pack_of, num_packs, short))
            return float(np.median(base[0] + per_square[0] * squares))
        distinct = np.unique(self.lengths)
        squares = self.costs[0].squares(distinct)
        terms = zip(self.levels, base, per_square, strict=True)
        fits = [np.where(distinct <= level.max_tokens, b + s * squares, np.inf) for level, b, s in terms]
        return float(np.min(fits, axis=0).max())

    def _need(self, length: int) -> float:
        return float(self.costs[0].squares(np.array([length]))[0]) - self.rate * length

    def add(self, sample: int) -> None:
        """Place a sample that the lowest level cannot hold; call it by descending length."""
        length = int(self.lengths[sample])
        need = self._need(length)
        at = bisect_left(self.open, (need, -1))
        for place in range(at, min(at + TRIES, len(self.open))):
            free, pack = self.open[place]
            if self.free_tokens[pack] >= length:
                del self.open[place]
                self._put(sample, length, pack, free - need)
                return
        holding = [k for k in self.preferred if self.levels[k].max_tokens >= length]
        k = next((k for k in holding if self.fits[k] and self.net[k] >= need), None)
        if k is None:
            # No level has enough ranks: the one with the shortest time.
            squares = need + self.rate * length
            k = min(holding, key=lambda k: self.base[k] + self.per_square[k] * squares)
        self.level_of.append(k)
        self.free_tokens.append(self.levels[k].max_tokens)
        self.members.append([])
        self._put(sample, length, len(self.members) - 1, max(OVER_BUDGET * need, self.net[k] - need))

    def _put(self, sample: int, length: int, pack: int, free: float) -> None:
        self.members[pack].append(sample)
        self.free_tokens[pack] -= length
        insort(self.open, (free, pack))

    def fill(self, short: IntArray) -> NDArray[np.bool_]:
        """Fill the packs with samples of `short`, by descending length; return which are left, bool [n]."""
        distinct, counts = runs(self.lengths[short][::-1])
        sizes, left = distinct.tolist(), counts.tolist()
        ends = dict(zip(sizes, (len(short) - np.cumsum(counts) + counts).tolist(), strict=True))
        needs = [self._need(size) for size in sizes]
        # Ascending from here on; samples below the rate need nothing.
        first = bisect_left(sizes, self.rate)
        stays = np.ones(len(short), bool)
        for free, pack in reversed(self.open):
            tokens, at = self.free_tokens[pack], len(sizes) - 1
            while sizes and tokens >= sizes[0]:
                # Not longer than the one before: a pack's samples descend in length.
                at = min(at, bisect_right(sizes, tokens) - 1, bisect_right(needs, free, lo=first) - 1)
                if at < 0:
                    break
                size = sizes[at]
                place = ends[size] - 1
                ends[size] = place
                stays[place] = False
                self.members[pack].append(int(short[place]))
                tokens, free, left[at] = tokens - size, free - needs[at], left[at] - 1
                if not left[at]:
                    del sizes[at], needs[at], left[at]
                    first -= at < first
                    at -= 1
        return stays

    def packs(self) -> tuple[Ragged, IntArray]:
        """Return all packs and the level of each, int64 [num_packs]."""
        counts = np.array([len(members) for members in self.members], np.int64)
        ids = np.array([sample for members in self.members for sample in members], np.int64)
        return Ragged(ids, offsets_of(counts)), np.array(self.level_of, np.int64)


def _assembled(cost: NDArray[np.float64], level_of: IntArray, levels: Sequence[Level], num_iterations: int) -> Ragged:
    """Return the packs of each iteration, by descending degree; the first iterations get the dearest of each level."""
    degrees = np.array([level.cp_degree for level in levels])
    world_size = int(degrees[level_of].sum()) // num_iterations
    room = [world_size] * num_iterations
    iteration_of = np.zeros(len(level_of), np.int64)
    # The largest degree first: what is left of an iteration is then a multiple of every smaller one.
    for degree in sorted(set(degrees[1:].tolist()), reverse=True):
        own = np.flatnonzero((degrees[level_of] == degree) & (level_of > 0))
        own = own[np.argsort(-cost[own], kind="stable")]
        later = _Later(num_iterations)
        for number, pack in enumerate(own.tolist()):
            at = later.find((2 * number + 1) * num_iterations // (2 * len(own)))
            while room[at] < degree:
                later.close(at)
                at = later.find(at)
            room[at] -= degree
            iteration_of[pack] = at
    lowest = np.flatnonzero(level_of == 0)
    lowest = lowest[np.argsort(-cost[lowest], kind="stable")]
    iteration_of[lowest] = np.repeat(np.arange(num_iterations), np.array(room) // degrees[0])
    order = np.lexsort((level_of == 0, -degrees[level_of], iteration_of))
    return Ragged(order, offsets_of(np.bincount(iteration_of, minlength=num_iterations)))


class _Later:
    """The nearest iteration, at or after a given one, that is not closed; after the last comes the first."""

    def __init__(self, num: int) -> None:
        self.next = list(range(num))

    def find(self, at: int) -> int:
        """Return the iteration; at least one must not be closed."""
        path = []
        while self.next[at] != at:
            path.append(at)
            at = self.next[at]
        for passed in path:
            self.next[passed] = at
        return at

    def close(self, at: int) -> None:
        """Take an iteration out."""
        self.next[at] = (at + 1) % len(self.next)
